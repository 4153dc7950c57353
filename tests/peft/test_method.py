"""The PEFT method: what PEFT offers for an adapter works, and computes what fastbound does."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

import fastbound
from tests.support.models import MLP, example, gradients, logits, trained
from tests.support.peft_models import adapted, stirred

ARCHITECTURES = ["llama", "gpt2", "gpt_neo", "phi", "gpt_neox", "opt", "qwen2", "mistral", "vit"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_starts_as_its_base_and_comes_back_from_disk(
    tiny_model, tmp_path, model_type
):
    base = logits(tiny_model(model_type))
    model = get_peft_model(tiny_model(model_type), fastbound.BoundedConfig(r=3, bound="4*rms"))
    torch.testing.assert_close(logits(model), base, rtol=1e-6, atol=1e-7)
    names = model.base_model.targeted_module_names
    assert [n.split(".", n.count(".") - MLP[model_type][0].count("."))[-1] for n in names] == (
        2 * MLP[model_type]
    )
    y = logits(stirred(model))
    assert (y - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), y)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), y, rtol=1e-5, atol=1e-6)
    assert {type(m) for m in merged.modules()} == {
        type(m) for m in tiny_model(model_type).modules()
    }


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_training_matches_inject_bit_for_bit(tiny_model, model_type):
    model = adapted(tiny_model(model_type), alpha=5, bound=0.4)
    injected = tiny_model(model_type)
    fastbound.inject(injected, rank=3, alpha=5, bound=0.4)
    with torch.no_grad():
        for name in model.base_model.targeted_module_names:
            there = model.base_model.model.get_submodule(name).fastbound_ab["default"]
            here = injected.get_submodule(name).adapter
            here.A.copy_(there.A)
            here.B.copy_(there.B)
    y, grads = gradients(model, **example(model))
    expected, expected_grads = gradients(injected, **example(injected))
    assert torch.equal(y, expected)
    assert len(grads) == len(expected_grads) > 0
    for gradient, wanted in zip(grads.values(), expected_grads.values(), strict=True):
        assert torch.equal(gradient, wanted)


def test_a_new_adapter_changes_nothing_until_it_is_active(tiny_model):
    model = adapted(tiny_model("llama"))
    first = logits(model)
    model.add_adapter("second", fastbound.BoundedConfig(r=2, bound=0.1, init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert all(".second." in name for name in trained(model))
    second = logits(model)
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any(".second." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_two_active_adapters_add_up(tiny_model, model_type):
    model = adapted(tiny_model(model_type))
    model.add_adapter("second", fastbound.BoundedConfig(r=2, bound=0.1, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected = tiny_model(model_type)
    with torch.no_grad():
        for name in dict.fromkeys(model.base_model.targeted_module_names):
            layer = model.base_model.model.get_submodule(name)
            for adapter in ("default", "second"):
                expected.get_submodule(name).weight += layer.get_delta_weight(adapter)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merging_and_unmerging(tiny_model, model_type):
    model = adapted(tiny_model(model_type))
    y = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y, rtol=1e-5, atol=1e-6)
    assert all(row.plan.strategy == "base" for row in fastbound.explain(model))
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model.unload()), logits(tiny_model(model_type)))


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_weight(tiny_model):
    model = adapted(tiny_model("llama"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    weight = layer.weight.clone()
    with torch.no_grad():
        layer.fastbound_ab["default"].A[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, weight)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(transformers.integrations.peft.MIN_PEFT_VERSION),
    reason="this transformers asks for a later PEFT in its own adapter methods",
)
def test_transformers_own_adapter_methods(tiny_model, tmp_path):
    model = tiny_model("llama")
    base = logits(model)
    model.add_adapter(fastbound.BoundedConfig(r=3, bound="auto"), adapter_name="one")
    stirred(model, "one")
    y = logits(model)
    assert not torch.equal(y, base)
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    other = tiny_model("llama")
    other.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(logits(other), y)
    fastbound.load_adapter(plain := tiny_model("llama"), tmp_path)
    assert torch.equal(logits(plain), y)
    other.load_adapter(str(tmp_path), adapter_name="again")
    other.delete_adapter("loaded")
    other.set_adapter("again")
    assert torch.equal(logits(other), y)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"target_modules": ["q_proj"]}, {"self_attn.q_proj"}),
        ({"target_modules": r".*\.1\.mlp\.up_proj"}, {"mlp.up_proj"}),
        ({"layers_to_transform": [1]}, {f"mlp.{n}_proj" for n in ("gate", "up", "down")}),
        ({"exclude_modules": ["down_proj"]}, {"mlp.gate_proj", "mlp.up_proj"}),
        ({"target_modules": "all-linear"}, None),
    ],
)
def test_the_layers_that_are_adapted(tiny_model, settings, names):
    model = adapted(tiny_model("llama"), **settings)
    found = model.base_model.targeted_module_names
    if names is None:
        assert len(found) == 14
        return
    assert {name.split(".", 3)[3] for name in found} == names
    if "layers_to_transform" in settings:
        assert all(".1." in name for name in found)


def test_patterns_and_the_bound_that_each_layer_got(tiny_model):
    config = fastbound.BoundedConfig(
        r=3,
        bound="4*rms",
        rank_pattern={"up_proj": 5},
        alpha_pattern={r"layers\.1\.mlp\.down_proj": 7.0},
        bound_pattern={"gate_proj": 0.25},
    )
    model = get_peft_model(tiny_model("llama"), config)
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        gate, up, down = (
            getattr(layer.mlp, f"{n}_proj").fastbound_ab["default"] for n in ("gate", "up", "down")
        )
        assert (gate.rank, up.rank, down.rank) == (3, 5, 3)
        assert (gate.alpha, up.alpha, down.alpha) == (3, 5, 7 if index else 3)
        assert gate.bound == 0.25
        weight = layer.mlp.up_proj.weight
        assert up.bound == pytest.approx(4 * weight.square().mean().sqrt().item())
        kept = model.peft_config["default"].to_dict()["bound_pattern"]
        assert kept[f"model.layers.{index}.mlp.up_proj"] == up.bound
    assert config.bound_pattern == {"gate_proj": 0.25}  # the user's own is as it was


def test_an_auto_bound_is_that_of_the_file_on_another_base(tiny_model, tmp_path):
    model = adapted(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    base = tiny_model("llama")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(3)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for name in model.base_model.targeted_module_names:
        here, there = (m.base_model.model.get_submodule(name) for m in (loaded, model))
        assert torch.equal(here.get_delta_weight("default"), there.get_delta_weight("default"))


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="PEFT 0.20 saves no biases: refused there"
)
@pytest.mark.parametrize(("bias", "also"), [("none", 0), ("fastbound_only", 4), ("all", 14)])
def test_biases_are_trained_as_asked_and_saved(tiny_model, tmp_path, bias, also):
    model = adapted(tiny_model("phi"), bias=bias)
    names = {n for n in trained(model) if n.endswith(".bias")}
    assert len(names) >= also and (bias != "fastbound_only" or len(names) == also)
    _, grads = gradients(model, **example(model))
    assert names <= set(grads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.add_(0.1)
    y = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("phi"), tmp_path)
    assert torch.equal(logits(loaded), y)


def test_modules_to_save_are_trained_and_come_back(tiny_model, tmp_path):
    model = adapted(tiny_model("vit"), modules_to_save=["classifier"])
    assert any("classifier" in name for name in trained(model))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(0.1)
    y = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("vit"), tmp_path)), y)


def test_dropout_acts_in_training_only(tiny_model):
    model = adapted(tiny_model("llama"), dropout=0.5)
    y = logits(model)
    assert torch.equal(logits(model), y)
    model.train()
    assert not torch.equal(logits(model), y)
    model.eval()
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_fp32_on_a_base_of_half_precision(tiny_model, dtype):
    model = adapted(tiny_model("llama").to(dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype is dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_take_the_bases_dtype_where_no_cast_is_asked_for(tiny_model, tmp_path, dtype):
    config = fastbound.BoundedConfig(r=3, init_weights=False)
    base = tiny_model("llama").to(dtype)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    y = logits(model)
    assert y.dtype is dtype and y.isfinite().all()
    model.save_pretrained(tmp_path)
    for cast, wanted in ((False, dtype), (True, torch.float32)):
        loaded = PeftModel.from_pretrained(
            tiny_model("llama").to(dtype), tmp_path, is_trainable=True, autocast_adapter_dtype=cast
        )
        assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {wanted}


def test_state_dicts_and_copies(tiny_model):
    model = adapted(tiny_model("llama"))
    state = get_peft_model_state_dict(model)
    assert {key.rpartition("fastbound_ab.")[2] for key in state} == {"A", "B"}
    other = get_peft_model(tiny_model("llama"), fastbound.BoundedConfig(r=3, bound="4*rms"))
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_lora_beside_it_on_other_layers_is_refused_by_name(tiny_model):
    model = adapted(tiny_model("llama"))
    with pytest.raises((ValueError, TypeError)):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
