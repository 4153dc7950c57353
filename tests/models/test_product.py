"""Layers, blocks, models and PEFT models whose adapters are of the form "product"."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import linear

import fastbound
from fastbound import BoundedOverBase, FusedBoundedLinear, FusedBoundedMLP
from fastbound.truth import formula
from tests.support.models import Gated, example, gradients, logits, stir
from tests.support.peft_models import stirred

PRODUCT = {"form": "product", "bound": 0.3}


class Own(nn.Linear):
    """A subclass, so that it is called itself."""


def delta_of(layer: FusedBoundedLinear) -> torch.Tensor:
    """By the definition of the form, from alpha and bound."""
    A, B = layer.adapter.A, layer.adapter.B
    return layer.bound * torch.sin(layer.alpha / (layer.rank * layer.bound) * (B @ A))


@pytest.mark.parametrize("kind", [FusedBoundedLinear, BoundedOverBase])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_the_definition_and_starts_as_its_base(kind, bias: bool) -> None:
    base = (nn.Linear if kind is FusedBoundedLinear else Own)(12, 20, bias=bias)
    layer, x = kind.from_linear(base, 3, alpha=5, **PRODUCT), torch.randn(4, 7, 12)
    expected = linear(x, base.weight, base.bias)
    torch.testing.assert_close(layer(x), expected)
    stir(layer)
    weight = base.weight + delta_of(layer)
    torch.testing.assert_close(layer(x), linear(x, weight, base.bias))
    torch.testing.assert_close(layer.delta_weight(), delta_of(layer))
    assert "form='product'" in repr(layer.adapter)


def test_a_conv1d_keeps_its_layout() -> None:
    from transformers.pytorch_utils import Conv1D

    base, x = Conv1D(20, 12), torch.randn(5, 12)
    layer = FusedBoundedLinear.from_linear(base, 3, **PRODUCT)
    stir(layer)
    torch.testing.assert_close(layer(x), x @ (base.weight + delta_of(layer).t()) + base.bias)
    torch.testing.assert_close(layer.to_linear()(x), layer(x))


@pytest.mark.parametrize(
    ("settings", "alpha", "bound"),
    [
        ({"omega": 100.0}, 400.0, 1.0),
        ({"omega": 100.0, "bound": 0.02}, 8.0, 0.02),
        ({"omega": 3.0, "form": "factors"}, 9.0, 1.0),
        ({"omega": 3.0, "form": "factors", "bound": 0.5}, 4.5, 0.5),
        ({}, 4.0, 4.0),
    ],
)
def test_omega_stands_for_the_alpha_that_makes_it(settings, alpha: float, bound: float) -> None:
    layer = FusedBoundedLinear(12, 20, 4, **{"form": "product", **settings})
    assert layer.alpha == pytest.approx(alpha) and layer.bound == pytest.approx(bound)
    assert layer.omega == pytest.approx(settings.get("omega", 0.25))


def test_omega_with_a_bound_in_units_of_the_weight_gives_each_layer_its_alpha(tiny_model) -> None:
    model = tiny_model("llama")
    fastbound.inject(model, rank=4, form="product", omega=50, bound="0.5*spectral")
    layers = [m for m in model.modules() if isinstance(m, FusedBoundedLinear)]
    assert len({layer.bound for layer in layers}) == len(layers)
    for layer in layers:
        assert layer.omega == pytest.approx(50)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_no_entry_passes_the_bound_and_the_share_in_use_is_that_of_all(size: float) -> None:
    layer = FusedBoundedLinear(40, 30, 4, **PRODUCT)
    stir(layer, size)
    delta = layer.delta_weight()
    assert delta.abs().max() <= 0.3 * (1 + 1e-6)
    expected = delta.square().mean().sqrt() / 0.3
    assert layer.adapter.bound_in_use() == pytest.approx(expected.item(), rel=1e-5)


def test_a_saturated_adapter_keeps_the_guarantee_of_a_spectral_bound() -> None:
    base = nn.Linear(40, 60)
    layer = FusedBoundedLinear.from_linear(base, 4, bound="0.5*spectral", form="product")
    stir(layer, 1e3)
    norm = torch.linalg.matrix_norm(base.weight, 2)
    assert torch.linalg.matrix_norm(layer.delta_weight()) <= 0.5 * norm * (1 + 1e-4)


@pytest.mark.parametrize("recompute", [None, "gate_up"])
def test_a_fused_block_computes_what_its_layers_do(recompute: str | None) -> None:
    torch.manual_seed(0)
    block = FusedBoundedMLP.from_mlp(Gated(), 3, recompute=recompute, **PRODUCT)
    stir(block)
    assert block.obstacle() is None
    x = torch.randn(2, 5, 6)
    one_by_one = block.fusion.block_class.forward(block, x)
    torch.testing.assert_close(block(x), one_by_one)
    torch.testing.assert_close(block.to_mlp()(x), one_by_one)


def test_a_block_of_two_forms_runs_layer_by_layer_and_says_so() -> None:
    block = Gated().requires_grad_(False)
    block.gate = FusedBoundedLinear.from_linear(block.gate, 3, **PRODUCT)
    block.up = FusedBoundedLinear.from_linear(block.up, 3)
    with pytest.raises(ValueError, match="adapters of different forms"):
        FusedBoundedMLP(block)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "opt"])
def test_a_model_starts_as_its_base_and_trains_saves_loads_and_merges(
    tiny_model, tmp_path, model_type: str
) -> None:
    base = logits(tiny_model(model_type))
    model = tiny_model(model_type)
    fastbound.inject(model, rank=3, alpha=5, form="product", bound="1*rms")
    torch.testing.assert_close(logits(model), base)
    stir(model)
    y, found = gradients(model, **example(model))
    assert (y - base).abs().max() > 1e-3 and all(g.isfinite().all() for g in found.values())
    fastbound.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["form"] == "product"
    loaded = tiny_model(model_type)
    fastbound.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    of_peft = PeftModel.from_pretrained(tiny_model(model_type), tmp_path)
    torch.testing.assert_close(logits(of_peft), logits(model))
    torch.testing.assert_close(logits(fastbound.merge(model)), y, rtol=1e-5, atol=1e-6)


def test_a_peft_model_with_omega_comes_back_from_its_files(tiny_model, tmp_path) -> None:
    config = fastbound.BoundedConfig(r=3, form="product", omega=40, bound="0.5*spectral")
    model = stirred(get_peft_model(tiny_model("llama"), config))
    y = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["omega"] is None and saved["format_version"] == 2
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), y)
    injected = tiny_model("llama")
    fastbound.load_adapter(injected, tmp_path)
    assert torch.equal(logits(injected), y)
    torch.testing.assert_close(logits(model.merge_and_unload()), y, rtol=1e-5, atol=1e-6)


def test_two_active_peft_adapters_are_both_added(tiny_model) -> None:
    model = get_peft_model(tiny_model("llama"), fastbound.BoundedConfig(r=3, **PRODUCT))
    model.add_adapter("second", fastbound.BoundedConfig(r=2, bound=0.2))
    stirred(model)
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.get_submodule(model.base_model.targeted_module_names[0])
    x = torch.randn(3, layer.in_features)
    deltas = sum(layer.get_delta_weight(name) for name in ("default", "second"))
    torch.testing.assert_close(layer(x), linear(x, layer.weight + deltas, layer.bias))
    with pytest.raises(ValueError, match="not the sine of a product"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


def test_a_state_dict_of_the_other_form_is_refused_before_anything_is_loaded() -> None:
    product, factors = FusedBoundedLinear(6, 8, 2, **PRODUCT), FusedBoundedLinear(6, 8, 2)
    stir(product)
    before = factors.adapter.A.clone()
    with pytest.raises(ValueError, match='has form="factors", but the state has form="product"'):
        factors.load_state_dict(product.state_dict())
    assert torch.equal(factors.adapter.A, before)
    other = FusedBoundedLinear(6, 8, 2, alpha=9, **PRODUCT)
    other.load_state_dict(product.state_dict())
    x = torch.randn(3, 6)
    assert other.alpha == 2 and torch.equal(other(x), product(x))


def test_files_of_the_other_form_are_refused(tiny_model, tmp_path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    fastbound.inject(model, rank=3, **PRODUCT)
    fastbound.save_adapter(model, tmp_path)
    fastbound.inject(other, rank=3)
    with pytest.raises(ValueError, match="form='factors' in the model and form='product'"):
        fastbound.load_adapter(other, tmp_path)


def test_a_lora_of_it_needs_a_rank_and_is_the_nearest(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    fastbound.inject(model, rank=3, **PRODUCT)
    stir(model, 1.0)
    with pytest.raises(ValueError, match=r"full rank: no LoRA is equal to it\. Give rank="):
        fastbound.export_lora(model, tmp_path)
    report = fastbound.export_lora(model, tmp_path, rank=5)
    lora = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    for name, layer in fastbound.models.adapted.injected_layers(model).items():
        delta = layer.delta_weight().detach()
        best = torch.linalg.svdvals(delta)[5:].square().sum().sqrt() / delta.norm()
        assert 0.01 < report.errors[name] == pytest.approx(best.item(), rel=1e-3)
        made = lora.base_model.model.get_submodule(name).get_delta_weight("default")
        assert (made - delta).norm() / delta.norm() == pytest.approx(best.item(), rel=1e-3)
    assert "LoRA of rank 5" in str(report) and "% of ΔW (in " in str(report)
    for rank in (0, 17, True):
        with pytest.raises(ValueError, match="rank must be a number from 1 to 16"):
            fastbound.export_lora(model, tmp_path, rank=rank)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "sum"}, "unknown form 'sum': choose one of factors, product"),
        ({"form": "product", "dropout": 0.1}, "does not support adapter dropout, got 0.1"),
        ({"form": "product", "omega": 0.0}, "omega must be"),
        ({"form": "product", "omega": float("nan")}, "omega must be"),
        ({"omega": 2.0, "alpha": 4.0}, "alpha=4.0 and omega=2.0 set the same thing twice"),
        ({"form": "product", "omega": 1e15, "bound": 1.0}, "alpha must lie between"),
    ],
)
def test_settings_that_do_not_fit_are_named(tiny_model, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedBoundedLinear(6, 8, 2, **settings)
    with pytest.raises(ValueError, match=message):
        fastbound.inject(tiny_model("llama"), rank=2, **settings)
    with pytest.raises(ValueError, match=message):
        fastbound.BoundedConfig(r=2, **settings)


def test_explain_names_the_path_of_the_form(tiny_model) -> None:
    model = tiny_model("llama")
    fastbound.inject(model, rank=3, fuse_mlp=False, **PRODUCT)
    text = str(fastbound.explain(model))
    assert "product form" in text


def test_the_formula_and_the_layer_agree_on_what_a_product_is() -> None:
    layer = FusedBoundedLinear(12, 20, 4, alpha=7, **PRODUCT)
    stir(layer)
    adapter = layer.adapter
    numbers = {"scaling": layer.scaling, "omega": layer.omega, "form": "product"}
    expected = formula.delta_weight(adapter.A, adapter.B, **numbers)
    torch.testing.assert_close(delta_of(layer), expected)
