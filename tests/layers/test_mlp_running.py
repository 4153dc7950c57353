"""A fused block at work: layer by layer where it must be, and in all that a model goes through."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import fastbound
from fastbound.layers.mlp import Fusion
from tests.support.models import (
    Gated,
    assert_same,
    by_layers,
    example,
    fused,
    gradients,
    logits,
    model_of,
    pair,
)


class _OwnLinear(nn.Linear):
    pass


class _Tagged(Tensor):
    pass


def _hook(block: nn.Module) -> None:
    block.up.register_forward_hook(lambda *_: None)


def _hook_on_the_adapter(block: nn.Module) -> None:
    block.up.adapter.register_forward_pre_hook(lambda *_: None)


def _hook_on_the_activation(block: nn.Module) -> None:
    block.act.register_full_backward_hook(lambda *_: None)


def _own_forward(block: nn.Module) -> None:
    block.down.forward = block.down.forward


def _another_class(block: nn.Module) -> None:
    layer = _OwnLinear(6, 10)
    block.gate = layer.requires_grad_(False)


def _subclassed_weight(block: nn.Module) -> None:
    block.gate.weight = nn.Parameter(
        block.gate.weight.detach().as_subclass(_Tagged), requires_grad=False
    )


def _trained_weight(block: nn.Module) -> None:
    block.gate.weight.requires_grad_(True)


def _trained_bias(block: nn.Module) -> None:
    block.up.bias.requires_grad_(True)


def _zero_3(block: nn.Module) -> None:
    block.up.adapter.A.ds_id = 0


def _another_activation(block: nn.Module) -> None:
    block.act = nn.Tanh()


def _backends(block: nn.Module) -> None:
    block.up.adapter.backend = "reference"


def _parametrized(block: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(block.up.adapter, "A", nn.Identity())


def _nothing_adapted(block: nn.Module) -> None:
    block.up, block.down = block.up.to_linear(), block.down.to_linear()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_hook, "its up has hooks or a forward of its own"),
        (_hook_on_the_adapter, "its up has an adapter with hooks"),
        (_hook_on_the_activation, "its act has hooks"),
        (_own_forward, "its down has hooks or a forward of its own"),
        (_another_class, "its gate is a _OwnLinear"),
        (_subclassed_weight, "its gate has a _Tagged for weight"),
        (_trained_weight, "its gate trains its weight"),
        (_trained_bias, "its up trains its bias"),
        (_zero_3, "its up has its A partitioned by DeepSpeed ZeRO-3"),
        (
            _another_activation,
            "its act is torch.nn.modules.activation.Tanh: the supported activations",
        ),
        (_backends, "its projections ask for different backends"),
        (_parametrized, "its up has a ParametrizedBoundedAdapter as its adapter"),
        (_nothing_adapted, "none of its projections is adapted"),
    ],
)
def test_what_must_run_layer_by_layer_does_and_says_why(spoil, reason):
    block = fused(Gated, targets=["up", "down"])
    model = nn.Sequential(block)
    x = torch.randn(5, 6, requires_grad=True)
    expected = block(x)
    spoil(block)
    assert reason in (block.obstacle() or "")
    called = []
    _Spy.log = called
    block.fusion = Fusion(_Spy, block.fusion.form)
    y = block(x)
    assert called == [block]
    if spoil not in (_another_class, _another_activation):
        torch.testing.assert_close(y, expected)
    y.sum().backward()  # whatever else is trained gets its gradient from the layers
    assert all(p.grad is not None for p in block.parameters() if p.requires_grad)
    if spoil is not _nothing_adapted:
        (row,) = fastbound.explain(model).blocks
        assert not row.fused and reason in row.reason
        assert f"block 0\n  layer by layer: {row.reason}" in str(fastbound.explain(model))


class _Spy(Gated):
    log: list[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        _Spy.log.append(self)
        return Gated.forward(self, x)


def test_a_hook_on_a_projection_is_called_and_the_block_fuses_again_without_it():
    block = fused(Gated)
    seen = []
    handle = block.up.register_forward_hook(lambda module, args, output: seen.append(module))
    x = torch.randn(5, 6)
    by_layer = block(x)
    assert seen == [block.up]
    handle.remove()
    assert block.obstacle() is None
    torch.testing.assert_close(block(x), by_layer)
    assert seen == [block.up]


_EVERYWHERE = nn.modules.module


@pytest.mark.parametrize(
    "register",
    [
        _EVERYWHERE.register_module_forward_hook,
        _EVERYWHERE.register_module_forward_pre_hook,
        _EVERYWHERE.register_module_full_backward_hook,
    ],
)
def test_a_hook_on_all_modules_sees_every_projection(register):
    block, x = fused(Gated), torch.randn(5, 6, requires_grad=True)
    expected, seen = block(x), []
    hook = register(lambda module, *_: seen.append(module))
    try:
        y = block(x)
        y.sum().backward()
        (explained,) = fastbound.explain(block).blocks
        assert not explained.fused and "hooks are set on all modules" in explained.reason
    finally:
        hook.remove()
    assert all(seen.count(layer) == 1 for layer in block.adapted_layers().values())
    torch.testing.assert_close(y, expected)
    assert fastbound.explain(block).blocks[0].fused and torch.equal(block(x), expected)


@pytest.mark.interpreted
def test_a_block_takes_the_ranks_that_a_layer_takes():
    settings = {"backend": "fused", "target_modules": ["up", "down"]}
    x = torch.randn(3, 6)
    for rank in (33, 64):
        model = model_of(Gated)
        assert fastbound.inject(model, rank, **settings).fused == ("0",)
        model(x).sum().backward()
    model = model_of(Gated)
    fastbound.inject(model, 65, **settings)
    with pytest.raises(ValueError, match="the kernels support ranks up to 64"):
        model(x)


def test_explain_shows_the_form_and_the_plan_of_each_block(tiny_model):
    model = tiny_model("llama")
    fastbound.inject(model, 4, target_modules=["gate_proj", "down_proj", "q_proj"])
    explanation = fastbound.explain(model, tokens=64)
    assert [(row.block, row.fused) for row in explanation.blocks] == [
        ("model.layers.0.self_attn", False),
        ("model.layers.0.mlp", True),
        ("model.layers.1.self_attn", False),
        ("model.layers.1.mlp", True),
    ]
    assert {row.block for row in explanation if "mlp" not in row.layer} == {None}
    assert {row.block for row in explanation if "layers.1.mlp" in row.layer} == {
        "model.layers.1.mlp"
    }
    text = str(explanation)
    assert "6 bounded layers at 64 tokens, 4 of them in 2 fused blocks" in text
    assert "fused: down_proj(act_fn(gate_proj(x)) * up_proj(x))" in text
    assert "layer by layer: is a LlamaAttention, whose forward is not that of a known MLP" in text


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_copies_are_fused_and_their_own(tiny_model, model_type, how):
    model, _ = pair(lambda: tiny_model(model_type))
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    blocks = [m for m in twin.modules() if isinstance(m, fastbound.FusedBoundedMLP)]
    assert len(blocks) == 2 and all(block.obstacle() is None for block in blocks)
    assert_same(twin, model, **example(model))
    with torch.no_grad():
        blocks[0].adapted_layers().popitem()[1].adapter.A.zero_()
    assert not torch.equal(logits(twin), logits(model))
    fastbound.merge(twin)
    assert not any(isinstance(m, fastbound.FusedBoundedMLP) for m in twin.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_checkpointing_changes_nothing(tiny_model, model_type, reentrant):
    one, other = pair(lambda: tiny_model(model_type).train())
    one.gradient_checkpointing_enable({"use_reentrant": reentrant})
    one.enable_input_require_grads()
    assert_same(one, other, **example(one))


@pytest.mark.parametrize(
    "model_type",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "phi3"))],
)
def test_the_whole_model_compiles_in_one_graph(tiny_model, model_type):
    torch.compiler.reset()
    model, other = pair(lambda: tiny_model(model_type))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = example(model)
    assert_same_but_names(compiled, other, inputs)
    fastbound.merge(model)
    torch.testing.assert_close(compiled(**inputs).logits, logits(other))


def assert_same_but_names(compiled: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> None:
    output, grads = gradients(compiled, **inputs)
    expected, expected_grads = gradients(other, **inputs)
    torch.testing.assert_close(output, expected)
    assert len(grads) == len(expected_grads) > 0
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected_grads[name.removeprefix("_orig_mod.")])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_autocast_runs_the_block_in_its_dtype(tiny_model, model_type):
    one, other = pair(lambda: tiny_model(model_type))
    inputs = example(one)
    exact, _ = gradients(other, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (output, grads), (expected, expected_grads) = (
            gradients(one, **inputs),
            gradients(other, **inputs),
        )
    scale = (expected - exact).abs().max()
    assert scale > 0  # bf16 it was
    assert (output - expected).abs().max() <= 2 * scale
    for name, gradient in expected_grads.items():
        assert grads[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(
            grads[name].flatten(), gradient.flatten(), dim=0
        ) > 0.99  # fmt: skip


def test_a_bf16_model_with_fp32_factors(tiny_model):
    one, other = pair(lambda: tiny_model("llama").bfloat16())
    (output, grads), (expected, expected_grads) = (gradients(m, **example(m)) for m in (one, other))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
    for name, gradient in expected_grads.items():
        assert grads[name].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(
            grads[name].flatten(), gradient.flatten(), dim=0
        )
        assert cosine > 0.99, name


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,), (3, 6)])
def test_x_of_any_shape(shape):
    block = fused(Gated)
    x = torch.randn(shape)
    torch.testing.assert_close(block(x), by_layers(block)(x))


def test_x_with_any_strides():
    block = fused(Gated)
    for x in (torch.randn(6, 5).t(), torch.randn(8, 12)[::2, ::2], torch.randn(6).expand(4, 6)):
        torch.testing.assert_close(block(x), by_layers(block)(x))


@pytest.fixture
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_gives_the_same_gradients(process_group):
    one, other = pair(lambda: model_of(Gated), target_modules=["gate", "down"])
    x = torch.randn(5, 6)
    wrapped = nn.parallel.DistributedDataParallel(one)
    gradients(wrapped, x)
    _, expected = gradients(other, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(one.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("unit", ["block", "model", "layers"])
def test_fsdp2_runs_fused_where_the_block_or_more_is_the_unit(process_group, unit):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    one, other = pair(lambda: model_of(Gated), target_modules=["gate", "down"])
    mesh = init_device_mesh("cpu", (1,))
    if unit == "layers":
        for layer in list(one[0].children())[:3]:
            fully_shard(layer, mesh=mesh)
    elif unit == "block":
        fully_shard(one[0], mesh=mesh)
    seen = []
    one[0].register_forward_pre_hook(lambda block, args: seen.append(block.obstacle()))
    if unit != "layers":
        fully_shard(one, mesh=mesh)
    x = torch.randn(5, 6)
    _, grads = gradients(one, x)
    _, expected = gradients(other, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name].full_tensor(), gradient)
    assert seen and all(("its gate is a FSDP" in (s or "")) == (unit == "layers") for s in seen)


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)])
def test_work_in_place_may_follow(shape):
    block = fused(Gated)
    block(torch.randn(shape)).mul_(2).sum().backward()
    assert block.up.adapter.B.grad.abs().max() > 0
