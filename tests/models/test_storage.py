"""save_adapter and load_adapter: the same bits back, or an error that leaves the model alone."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import fastbound

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def adapted(model: nn.Module, **settings) -> nn.Module:
    fastbound.inject(model, **{"rank": 3, "bound": "4*rms", **settings})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.normal_(0, 0.5, generator=generator)
    return model


def state(model: nn.Module) -> dict[str, object]:
    """Everything that loading could change, comparable by ==."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[name] = type(module).__name__
        if isinstance(module, fastbound.BoundedAdapter):
            found[name] = (module.alpha, module.bound, module.scaling, module.omega)
    for name, p in model.named_parameters():
        found[f"{name} (parameter)"] = (p.dtype, p.requires_grad, p.tolist())
    return found


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 15).view(2, 6)).logits


@pytest.fixture
def saved(tiny_model, tmp_path) -> tuple[nn.Module, Path]:
    model = adapted(tiny_model("llama"))
    fastbound.save_adapter(model, tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_plain_model_gets_the_same_bits(tiny_model, tmp_path, model_type, dtype):
    model = adapted(tiny_model(model_type), adapter_dtype=dtype)
    fastbound.save_adapter(model, tmp_path / "new" / "folder")
    loaded = tiny_model(model_type)
    report = fastbound.load_adapter(loaded, tmp_path / "new" / "folder")
    assert state(loaded) == state(model)
    assert torch.equal(logits(loaded), logits(model))
    assert report.trainable_parameters == sum(
        p.numel() for p in loaded.parameters() if p.requires_grad
    )


def test_an_injected_model_takes_values_and_bound_from_the_file(tiny_model, saved):
    model, folder = saved
    other = tiny_model("llama")
    fastbound.inject(other, 3, alpha=7, bound=0.25)
    assert state(other) != state(model)
    fastbound.load_adapter(other, folder)
    assert state(other) == state(model)


def test_an_auto_bound_survives_another_base(tiny_model, saved):
    model, folder = saved
    base = tiny_model("llama")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(3)
    fastbound.load_adapter(base, folder)
    for name in fastbound.load_adapter(base, folder).replaced:
        here, there = base.get_submodule(name), model.get_submodule(name)
        assert (here.alpha, here.bound) == (there.alpha, there.bound)
        assert torch.equal(here.delta_weight(), there.delta_weight())


def test_layers_of_different_rank_alpha_and_bound(tmp_path):
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4)})

    model = block()
    model["a"] = fastbound.FusedBoundedLinear.from_linear(model["a"], 2, alpha=3, bound=0.1)
    model["b"] = fastbound.FusedBoundedLinear.from_linear(model["b"], 5, alpha=1, bound=0.7)
    model.requires_grad_(False)
    for layer in model.values():
        layer.adapter.requires_grad_(True)
    fastbound.save_adapter(model, tmp_path)
    loaded = block()
    loaded.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter" not in k})
    fastbound.load_adapter(loaded, tmp_path)
    assert state(loaded) == state(model)


def test_the_files_are_in_the_layout_of_peft(saved):
    model, folder = saved
    assert {path.name for path in folder.iterdir()} == {TENSORS, CONFIG}
    tensors = safetensors.torch.load_file(folder / TENSORS)
    layers = [n for n, m in model.named_modules() if isinstance(m, fastbound.FusedBoundedLinear)]
    assert set(tensors) == {f"base_model.model.{n}.fastbound_ab.{f}" for n in layers for f in "AB"}
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["format_version"], config["r"]) == ("FASTBOUND", 1, 3)
    assert config["fastbound_version"] == fastbound.__version__
    assert config["target_modules"] == layers
    for name in layers:
        layer = model.get_submodule(name)
        assert config["bound_pattern"][name] == layer.bound
        assert config["shapes"][name] == [layer.out_features, layer.in_features]


def test_a_shared_layer_is_saved_once_and_shared_again(tmp_path):
    def shared() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(4, 4)})
        model["b"] = model["a"]
        return model

    model = adapted(shared(), target_modules=["a"])
    fastbound.save_adapter(model, tmp_path)
    assert len(safetensors.torch.load_file(tmp_path / TENSORS)) == 2
    loaded = shared()
    fastbound.load_adapter(loaded, tmp_path)
    assert loaded["a"] is loaded["b"]
    assert torch.equal(loaded["b"].adapter.B, model["b"].adapter.B)


class Shared(nn.Module):
    """A layer under two names, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def test_peft_adapts_a_shared_layer_under_both_names(tmp_path):
    model = adapted(Shared(), target_modules=["a", "c"])
    fastbound.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Shared(), tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x)) and loaded.b is loaded.a
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(x), model(x))
    assert type(merged.b) is nn.Linear and merged.b is merged.a


def test_a_shared_layer_is_not_exported_as_lora(tmp_path):
    model = adapted(Shared(), target_modules=["a", "c"])
    with pytest.raises(ValueError, match="'a' is also 'b', one layer under two names"):
        fastbound.export_lora(model, tmp_path)


@pytest.mark.parametrize("inner", [nn.Linear(4, 4), nn.Embedding(3, 4)])
@pytest.mark.parametrize("save", [fastbound.save_adapter, fastbound.export_lora])
def test_peft_adapts_the_named_layers_and_none_whose_name_ends_so(tmp_path, save, inner):
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "sub": nn.ModuleDict({"fc": inner})})
    base = copy.deepcopy(model)
    save(adapted(model, target_modules="fc"), tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    trains = {
        n.rpartition(".fastbound_ab")[0] or n.rpartition(".lora_")[0] for n in _trained(loaded)
    }
    assert trains == {"base_model.model.fc"}


def _trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_file_that_lists_all_names_is_read_as_it_was(tiny_model, saved):
    model, folder = saved
    config = json.loads((folder / CONFIG).read_text())
    assert isinstance(config["target_modules"], list)
    _rewrite(folder, target_modules=f"^({'|'.join(config['target_modules'])})$")
    loaded = tiny_model("llama")
    fastbound.load_adapter(loaded, folder)
    assert state(loaded) == state(model)


def test_a_compiled_model_has_the_names_of_its_base(tiny_model, tmp_path, saved):
    model, folder = saved
    fastbound.save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    for name in (TENSORS, CONFIG):
        assert (tmp_path / "compiled" / name).read_bytes() == (folder / name).read_bytes()


def test_a_failed_save_keeps_the_earlier_one(saved, monkeypatch):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".adapter." in n).add_(1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fastbound.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_to_save_and_nan_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no FusedBoundedLinear"):
        fastbound.save_adapter(tiny_model("llama"), tmp_path)
    model = adapted(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.adapter.A[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"adapter\.A of model\.layers\.1\.mlp\.up_proj holds a"):
        fastbound.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def _truncate(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-8])


def _rewrite(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def _retensor(folder: Path, change) -> None:
    """Change the tensors and make the two files belong together again."""
    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    data = safetensors.torch.save(tensors)
    (folder / TENSORS).write_bytes(data)
    _rewrite(folder, tensors_sha256=hashlib.sha256(data).hexdigest())


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.mlp.up_proj.fastbound_ab.B"][1, 1] = float("nan")


def _less(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.mlp.up_proj.fastbound_ab.B"]


def _wide(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.mlp.up_proj.fastbound_ab.A"] = torch.zeros(3, 99)


SPOILED = [
    (lambda f: (f / TENSORS).unlink(), FileNotFoundError, "safetensors does not exist"),
    (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "json does not exist"),
    (_truncate, ValueError, "is not the file that adapter_config.json was written with"),
    (lambda f: (f / CONFIG).write_text("{"), ValueError, "adapter_config.json is damaged"),
    (lambda f: (f / CONFIG).write_bytes(b"\xff"), ValueError, "adapter_config.json is damaged"),
    (lambda f: (f / CONFIG).write_text("[]"), ValueError, "must hold a JSON object, got a list"),
    (lambda f: _rewrite(f, peft_type="LORA"), ValueError, "got 'LORA'"),
    (lambda f: _rewrite(f, format_version=3), ValueError, "which reads format_version 1"),
    (lambda f: _rewrite(f, bound_pattern={}), ValueError, "bound_pattern do not agree"),
    (lambda f: _rewrite(f, shapes=None), ValueError, "shapes must be a dict, got None"),
    (lambda f: _retensor(f, _nan), ValueError, r"0\.mlp\.up_proj\.fastbound_ab\.B holds a NaN"),
    (lambda f: _retensor(f, _less), ValueError, r"missing 'base_model.*up_proj\.fastbound_ab\.B'"),
    (lambda f: _retensor(f, _wide), ValueError, r"A of model.*up_proj is torch.float32 \[3, 99\]"),
]


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize(("spoil", "error", "message"), SPOILED)
def test_spoiled_files_leave_the_model_alone(tiny_model, saved, spoil, error, message, injected):
    _, folder = saved
    spoil(folder)
    _refused(tiny_model("llama"), folder, error, message, injected)


@pytest.mark.parametrize("value", [-0.5, 0, float("nan"), "0.5", True, None])
def test_a_bound_that_is_no_bound_is_refused(tiny_model, saved, value):
    _, folder = saved
    config = json.loads((folder / CONFIG).read_text())
    name = config["target_modules"][-1]
    _rewrite(folder, bound_pattern={**config["bound_pattern"], name: value})
    message = f"bound_pattern of {name} must be positive and finite"
    _refused(tiny_model("llama"), folder, ValueError, message, injected=False)


def _refused(model, folder, error, message, injected) -> None:
    if injected:
        fastbound.inject(model, 3)
    before = state(model)
    with pytest.raises(error, match=message):
        fastbound.load_adapter(model, folder)
    assert state(model) == before


def test_another_model_is_refused(tiny_model, saved):
    _, folder = saved
    message = r"for another model: GPT2LMHeadModel has no 'model\.layers\.0\.mlp\.gate_proj'"
    _refused(tiny_model("gpt2"), folder, ValueError, message, injected=False)

    wider = tiny_model("llama")
    wider.model.layers[1].mlp.down_proj = nn.Linear(40, 16)
    message = r"down_proj is \[N, K\] = \[16, 40\] in the model and \[16, 32\] in the file"
    _refused(wider, folder, ValueError, message, injected=False)

    hooked = tiny_model("llama")
    hooked.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: None)
    message = "cannot be put on model.layers.1.mlp.down_proj: it has forward pre-hooks"
    _refused(hooked, folder, ValueError, message, injected=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4}, r"A of .* is torch.float32 \[4, 16\] in the model.* inject with rank=3"),
        ({"rank": 3, "adapter_dtype": torch.bfloat16}, "adapter_dtype=torch.float32"),
        ({"rank": 3, "target_modules": ["up_proj"]}, r"missing 'model\.layers\.0\.mlp\.gate_proj'"),
        ({"rank": 3, "target_modules": r".*_proj"}, "unexpected 'model"),
    ],
)
def test_another_injection_is_refused(tiny_model, saved, settings, message):
    _, folder = saved
    model = tiny_model("llama")
    fastbound.inject(model, **settings)
    _refused(model, folder, ValueError, message, injected=False)


def checkpointed(model: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper

    wrapper.apply_activation_checkpointing(
        model, check_fn=lambda module: type(module).__name__.endswith("DecoderLayer")
    )


def compiled_by_layers(model: nn.Module) -> None:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")


@pytest.mark.parametrize("wrap", [checkpointed, compiled_by_layers])
class TestPartsInsideWrappers:
    def test_the_files_are_those_of_the_plain_model(self, tiny_model, tmp_path, wrap):
        model = adapted(tiny_model("llama"))
        fastbound.save_adapter(model, tmp_path / "plain")
        fastbound.export_lora(model, tmp_path / "plain-lora")
        wrap(model)
        fastbound.save_adapter(model, tmp_path / "wrapped")
        fastbound.export_lora(model, tmp_path / "wrapped-lora")
        for kind in ("", "-lora"):
            for file in (TENSORS, CONFIG):
                plain, wrapped = (
                    tmp_path / f"{name}{kind}" / file for name in ("plain", "wrapped")
                )
                assert plain.read_bytes() == wrapped.read_bytes()

    @pytest.mark.parametrize("first", ["inject", "load"])
    def test_they_load_into_wrapped_parts(self, tiny_model, tmp_path, wrap, first):
        model = adapted(tiny_model("llama"))
        fastbound.save_adapter(model, tmp_path)
        other = tiny_model("llama")
        if first == "inject":
            fastbound.inject(other, 3, bound="4*rms")
        wrap(other)
        fastbound.load_adapter(other, tmp_path)
        found, wanted = logits(other), logits(model)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # fp32 sums, by alignment


def test_peft_refuses_to_save_an_adapter_without_its_factors(tiny_model, tmp_path):
    model = peft.get_peft_model(tiny_model("llama"), fastbound.BoundedConfig(r=3))
    checkpointed(model)
    with pytest.raises(ValueError, match="take off what was put around parts of the model"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("copied", ["deepcopy", "saved"])
def test_a_copy_made_while_the_adapter_is_off_has_it_on(tmp_path, copied):
    layer = fastbound.FusedBoundedLinear(6, 7, 2)
    nn.init.normal_(layer.adapter.B)
    x = torch.randn(3, 6)
    with fastbound.disable_adapter(layer):
        if copied == "deepcopy":
            other = copy.deepcopy(layer)
        else:
            torch.save(layer, tmp_path / "layer.pt")
            other = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert other.disablers == layer.disablers == 0
    torch.testing.assert_close(torch.compile(other, backend="eager")(x), layer(x))
