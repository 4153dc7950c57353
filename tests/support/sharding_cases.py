"""What two processes run for test_sharding.py: gradients against one process on all rows."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fastbound
from tests.support.models import stir

ROWS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(1))
MODELS = ("fused", "by layers", "product", "peft")
CHECKPOINTING = ("off", "non-reentrant", "reentrant")
Wrapper = Callable[[nn.Module], nn.Module]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def build(how: str, checkpointing: str = "off", dtype: torch.dtype | None = None) -> nn.Module:
    model = llama().to(dtype or torch.float32).train()
    if how == "peft":
        model = get_peft_model(model, fastbound.BoundedConfig(r=4, bound=0.5))
    else:
        form = "product" if how == "product" else "factors"
        fastbound.inject(model, 4, bound=0.5, form=form, fuse_mlp=how != "by layers")
    stir(model)
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model


def backward(model: nn.Module, rows: Tensor) -> None:
    model(input_ids=rows, use_cache=False).logits.float().square().mean().backward()


def names(model: nn.Module) -> dict[str, nn.Parameter]:
    clean = ("_fsdp_wrapped_module.", "_orig_mod.", "module.")
    named = {}
    for name, parameter in model.named_parameters():
        for part in clean:
            name = name.replace(part, "")
        if name.endswith((".A", ".B")):
            named[name] = parameter
    return named


def error(gradients: dict[str, Tensor], reference: nn.Module) -> float:
    """The largest |g - g'| / |g| over A and B of all layers."""
    wanted = {name: p.grad for name, p in names(reference).items()}
    assert gradients.keys() == wanted.keys() and len(wanted) == 12
    return max(float((gradients[n] - g).norm() / g.norm()) for n, g in wanted.items())


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2_blocks(model: nn.Module) -> nn.Module:
    for layer in layers(model):
        fully_shard(layer.mlp)
    return fully_shard(model)


def fsdp2_kept(model: nn.Module) -> nn.Module:
    return fastbound.shard(model, reshard_after_forward=False)


def fsdp1(model: nn.Module, adapters_apart: bool, use_orig_params: bool) -> nn.Module:
    whole_layers = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}
    )
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if adapters_apart else whole_layers,
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


WRAPPERS: dict[str, Wrapper] = {
    "ddp": ddp,
    "fsdp2 layers": fastbound.shard,
    "fsdp2 layers kept": fsdp2_kept,
    "fsdp2 blocks": fsdp2_blocks,
    "fsdp1 adapters apart": functools.partial(fsdp1, adapters_apart=True, use_orig_params=True),
    "fsdp1 flat": functools.partial(fsdp1, adapters_apart=True, use_orig_params=False),
}


def gathered(model: nn.Module, wrapped: nn.Module) -> dict[str, Tensor]:
    """The whole gradients of A and B."""
    if isinstance(wrapped, FullyShardedDataParallel):
        with torch.no_grad():  # parameters are what FSDP1 gathers in all its forms
            for parameter in wrapped.parameters():
                if parameter.grad is not None:
                    parameter.data.copy_(parameter.grad)
        with FullyShardedDataParallel.summon_full_params(wrapped):
            return {n: p.detach().clone() for n, p in names(wrapped).items()}
    grads = {name: p.grad for name, p in names(model).items()}
    return {n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in grads.items()}


def gradients(
    wrap: Wrapper, checkpointing: str, how: str, dtype: torch.dtype = torch.float32
) -> dict[str, object]:
    reference, model = build(how, dtype=dtype), build(how, checkpointing, dtype)
    backward(reference, ROWS)
    fused, factor_dtypes, weight_dtypes = [], [], []

    def look(block: nn.Module, _: object) -> None:
        fused.append(isinstance(block, fastbound.FusedBoundedMLP) and block.obstacle() is None)
        factor_dtypes.append(str(block.up_proj.adapter.A.dtype))
        weight_dtypes.append(str(block.up_proj.weight.dtype))

    blocks = [layer.mlp for layer in layers(model)]
    wrapped = wrap(model)
    for block in blocks:
        block.register_forward_pre_hook(look)
    half = len(ROWS) // 2
    backward(wrapped, ROWS[dist.get_rank() * half :][:half])
    return {
        "error": error(gathered(model, wrapped), reference),
        "fused": sorted(set(fused)),
        "factors": sorted(set(factor_dtypes)),
        "weights": sorted(set(weight_dtypes)),
    }


def files(folder: Path) -> dict[str, object]:
    """Saved from shards, read into shards: the bits of an unsharded model."""
    model, other = build("fused"), build("fused")
    fastbound.shard(model)
    fastbound.save_adapter(model, folder / "sharded")
    fastbound.save_adapter(other, folder / f"whole-{dist.get_rank()}")
    same = [
        (folder / "sharded" / name).read_bytes()
        == (folder / f"whole-{dist.get_rank()}" / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    ]
    with torch.no_grad():
        for parameter in names(model).values():
            parameter.zero_()
    report = fastbound.load_adapter(model, folder / "sharded")
    wanted = names(other)
    loaded = [torch.equal(p.full_tensor(), wanted[n]) for n, p in names(model).items()]
    return {"same": same, "loaded": loaded, "fused": list(report.fused)}


def peft_files(folder: Path) -> dict[str, object]:
    """As docs/distributed.md has it."""
    model, other = build("peft"), build("peft")
    fastbound.shard(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "peft", state_dict=state)
    dist.barrier()
    loaded = names(PeftModel.from_pretrained(llama(), folder / "peft"))
    return {"same": [torch.equal(loaded[n], p) for n, p in names(other).items()]}


def explained() -> dict[str, object]:
    whole, apart = build("fused"), build("fused")
    fastbound.shard(whole)
    for layer in apart.model.layers:
        fully_shard(layer.mlp.down_proj)
    fully_shard(apart)
    return {"layers": str(fastbound.explain(whole)), "projections": str(fastbound.explain(apart))}


def steps() -> dict[str, object]:
    """Three steps of AdamW with clipping, on shards and on one process."""
    reference, model = build("fused"), build("fused")
    fastbound.shard(model)
    half = len(ROWS) // 2
    norms = []
    for each, rows in ((reference, ROWS), (model, ROWS[dist.get_rank() * half :][:half])):
        optimizer = torch.optim.AdamW(list(names(each).values()), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            backward(each, rows)
            norm = nn.utils.clip_grad_norm_(list(names(each).values()), 1e-3)
            norms.append(float(getattr(norm, "full_tensor", lambda norm=norm: norm)()))
            optimizer.step()
    wanted = names(reference)
    moved = max(float((p.full_tensor() - wanted[n]).abs().max()) for n, p in names(model).items())
    return {"difference": moved, "norms": norms}


def replicas() -> dict[str, object]:
    """The factors of two replicas whose generators differ, after two steps of shared gradients."""
    model, dimensions = llama().train(), ("replicate", "shard")
    torch.manual_seed(100 + dist.get_rank())
    fastbound.inject(model, 4)
    fastbound.shard(model, dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=dimensions))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, ROWS[:2])
        optimizer.step()
    own = [p.full_tensor().detach().contiguous() for p in names(model).values()]
    for tensor in own:
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor)
        if not torch.equal(*both):
            return {"same": False}
    return {"same": len(own) > 0 and all(tensor.any() for tensor in own)}


CASES: dict[str, Callable[[Path], dict[str, object]]] = {
    **{
        f"{wrapper}, checkpointing {checkpointing}, {how}": (
            lambda _, w=wrap, c=checkpointing, h=how: gradients(w, c, h)
        )
        for wrapper, wrap in WRAPPERS.items()
        for checkpointing in CHECKPOINTING
        for how in MODELS
    },
    "bf16": lambda _: gradients(fastbound.shard, "off", "fused", torch.bfloat16),
    "bf16 fsdp1": lambda _: gradients(WRAPPERS["fsdp1 flat"], "off", "fused", torch.bfloat16),
    "fsdp1 together": lambda _: gradients(
        functools.partial(fsdp1, adapters_apart=False, use_orig_params=True), "off", "fused"
    ),
    "files": files,
    "peft files": peft_files,
    "explained": lambda _: explained(),
    "steps": lambda _: steps(),
    "replicas": lambda _: replicas(),
}


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    results: dict[str, object] = {}
    for name, case in CASES.items():
        try:
            results[name] = case(folder)
        except Exception:  # the test of this case fails with it, the other cases still run
            results[name] = {"failed": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    # A process group that FSDP's objects still hold can abort the interpreter's exit, now and then.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
