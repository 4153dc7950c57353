"""inject and merge: which layers, what trains, what is computed, and what is refused unharmed."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from torch import nn
from transformers import pytorch_utils

import fastbound
from tests.support.models import MLP, example, logits, stir, trained


class MLPBlock(nn.Module):
    """A model that is not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(6, 12)
        self.down_proj = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


@pytest.mark.parametrize("model_type", MLP)
def test_mlp_means_the_projections_of_the_architecture(tiny_model, model_type):
    model = tiny_model(model_type)
    before = logits(model)
    report = fastbound.inject(model, rank=4)

    ends = [name for name in report.replaced if name.endswith(tuple(MLP[model_type]))]
    assert list(report.replaced) == ends and len(ends) == 2 * len(MLP[model_type])
    assert not any("attn" in name or "attention" in name for name in ends)
    assert not report.skipped
    # Frozen weights in the same order of operations, B zero: nothing may move but the last bits.
    torch.testing.assert_close(logits(model), before)
    assert trained(model) == {f"{n}.adapter.{f}" for n in report.replaced for f in "AB"}
    numbers = dict(model.named_parameters())
    assert report.trainable_parameters == sum(numbers[n].numel() for n in trained(model))
    assert report.total_parameters == sum(p.numel() for p in numbers.values())


@pytest.mark.parametrize("model_type", MLP)
def test_merge_computes_what_the_adapted_model_did(tiny_model, model_type):
    model = tiny_model(model_type)
    kinds = {name: type(module) for name, module in model.named_modules()}
    base = logits(model)
    fastbound.inject(model, rank=4, bound=0.5)
    stir(model)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-3
    assert fastbound.merge(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    torch.testing.assert_close(logits(model), adapted)
    assert not trained(model)


def test_suffixes_match_whole_dotted_ends_only(tiny_model):
    model = tiny_model("gpt2")
    report = fastbound.inject(model, rank=2, target_modules=["mlp.c_proj"])
    assert report.replaced == ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")
    with pytest.raises(ValueError, match="no module's name ends in '_proj'"):
        fastbound.inject(tiny_model("gpt2"), rank=2, target_modules=["_proj"])


def test_a_regular_expression_matches_whole_names(tiny_model):
    report = fastbound.inject(tiny_model("llama"), 2, target_modules=r".*\.1\.self_attn\.[qv]_proj")
    stem = "model.layers.1.self_attn"
    assert report.replaced == (f"{stem}.q_proj", f"{stem}.v_proj")
    with pytest.raises(ValueError, match="matches no module's whole name"):
        fastbound.inject(tiny_model("llama"), 2, target_modules="q_proj")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "vit"])
def test_all_linear_is_every_linear_layer_but_the_output_layer(tiny_model, model_type):
    model = tiny_model(model_type)
    kinds = (nn.Linear, pytorch_utils.Conv1D)
    linear = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    report = fastbound.inject(model, 2, target_modules="all-linear")
    assert report.replaced == tuple(name for name in linear if name != "lm_head")
    assert not report.skipped


def test_all_linear_needs_a_linear_layer():
    with pytest.raises(ValueError, match="Sequential holds no linear layer beside its output"):
        fastbound.inject(nn.Sequential(nn.LayerNorm(4)), 2, target_modules="all-linear")


def test_every_misspelt_target_is_named_with_what_it_may_have_meant(tiny_model):
    message = "ends in 'gate_prj' .near misses: gate_proj.*, nor in 'xyzzy' .its linear layers end"
    with pytest.raises(ValueError, match=message):
        fastbound.inject(tiny_model("llama"), 2, target_modules=["gate_prj", "up_proj", "xyzzy"])


def test_weights_are_shared_with_the_replaced_layers():
    model = MLPBlock()
    weight, bias = model.up_proj.weight, model.up_proj.bias
    fastbound.inject(model, 2, target_modules=["up_proj"])
    assert model.up_proj.weight is weight and model.up_proj.bias is bias


def test_settings_reach_every_layer():
    model = MLPBlock()
    fastbound.inject(
        model, 3, alpha=6, bound="4*rms", target_modules=["up_proj", "down_proj"],
        adapter_dtype=torch.bfloat16, backend="torch",
    )  # fmt: skip
    for layer in (model.up_proj, model.down_proj):
        rms = layer.weight.square().mean().sqrt().item()
        assert layer.bound == pytest.approx(4 * rms, rel=1e-5)
        assert (layer.rank, layer.alpha) == (3, 6.0)
        assert layer.adapter.A.dtype == layer.adapter.B.dtype == torch.bfloat16
        assert layer.adapter.backend == "torch"
    assert model.up_proj.bound != model.down_proj.bound


def test_a_layer_under_two_names_stays_one_layer():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["c"] = model["a"]
    report = fastbound.inject(model, 2, target_modules=["a", "c"])
    assert report.replaced == ("a",)
    assert model["a"] is model["c"] and isinstance(model["c"], fastbound.FusedBoundedLinear)
    fastbound.merge(model)
    assert model["a"] is model["c"] and type(model["c"]) is nn.Linear

    again = nn.ModuleDict({"a": nn.Linear(4, 4)})
    again["c"] = again["a"]
    assert fastbound.inject(again, 2, target_modules=["c"]).replaced == ("a",)
    assert again["a"] is again["c"]


def test_training_mode_of_the_replaced_layers_is_kept():
    model = MLPBlock().eval()
    fastbound.inject(model, 2, target_modules=["up_proj"])
    assert not model.up_proj.training
    fastbound.merge(model.train())
    assert model.up_proj.training


def _with_pre_hook(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda module, args: None)


def _with_own_forward(layer: nn.Linear) -> None:
    layer.forward = layer.forward


def _on_meta(layer: nn.Linear) -> None:
    layer.to("meta")


def _as_dtensor(layer: nn.Linear) -> None:
    class Sharded(torch.Tensor):
        pass

    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Sharded))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_with_pre_hook, "has forward pre-hooks"),
        (_with_own_forward, "has a forward set on the instance"),
        (_on_meta, "on the meta device"),
        (_as_dtensor, "its weight is a Sharded"),
    ],
)
def test_layers_that_a_replacement_would_harm_are_skipped_with_the_reason(spoil, reason):
    model = MLPBlock()
    spoil(model.up_proj)
    kept = model.up_proj
    report = fastbound.inject(model, 2, target_modules=["up_proj", "down_proj"])
    assert report.replaced == ("down_proj",) and model.up_proj is kept
    assert reason in report.skipped["up_proj"]
    assert f"skipped up_proj: {report.skipped['up_proj']}" in str(report)


def test_nothing_that_can_be_replaced_is_an_error():
    model = nn.ModuleDict({"own": nn.Bilinear(4, 4, 4)})
    with pytest.raises(ValueError, match=r"none of which can be replaced \(own: is a Bilinear"):
        fastbound.inject(model, 2, target_modules=["own"])


def test_a_tied_weight_is_skipped(tiny_model):
    model = tiny_model("gpt2")
    report = fastbound.inject(model, 2, target_modules=["lm_head", "mlp.c_fc"])
    assert "tied to transformer.wte" in report.skipped["lm_head"]
    assert all(name.endswith("c_fc") for name in report.replaced)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"alpha": -1.0}, "alpha must be positive and finite, got -1"),
        ({"bound": float("nan")}, "bound must be positive and finite, got nan"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"rank": 129}, r"rank 129 of .*gate_proj is out of proportion.*\[32, 16\].*at most 128"),
        ({"alpha": 1e13}, "alpha must lie between 1e-12 and 1e.12, .*got 1e.13"),
        ({"bound": 1e-13}, "bound must lie between"),
        ({"target_modules": ["gate_prj"]}, "near misses: gate_proj"),
        ({"target_modules": "gate_proj"}, "near misses: gate_proj"),
        ({"target_modules": "("}, r"'\(' is not a regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["mlp"]}, "is a LlamaMLP: only nn.Linear"),
        ({"target_modules": ["xyzzy"]}, "its linear layers end in: down_proj, gate_proj"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(tiny_model, settings, message):
    model = tiny_model("llama")
    modules, trains = dict(model.named_modules()), trained(model)
    with pytest.raises(ValueError, match=message):
        fastbound.inject(model, **settings)
    assert dict(model.named_modules()) == modules and trained(model) == trains


def test_a_late_refusal_leaves_the_model_as_it_was():
    model = MLPBlock()
    nn.init.zeros_(model.down_proj.weight)  # bound="auto" of a zero weight: the second layer fails
    with pytest.raises(ValueError, match="auto"):
        fastbound.inject(model, 2, bound="auto", target_modules=["up_proj", "down_proj"])
    assert type(model.up_proj) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


class Sealed(MLPBlock):
    def __setattr__(self, name: str, value: object) -> None:
        if name == "down_proj" and isinstance(value, fastbound.FusedBoundedLinear):
            raise RuntimeError("sealed")
        super().__setattr__(name, value)


def test_a_place_that_takes_no_other_module_leaves_the_model_as_it_was():
    model = nn.Sequential(Sealed())
    modules, trains = dict(model.named_modules()), trained(model)
    with pytest.raises(RuntimeError, match="sealed"):
        fastbound.inject(model, 2, target_modules=["up_proj", "down_proj"])
    assert dict(model.named_modules()) == modules and trained(model) == trains


def test_an_unknown_architecture_says_what_can_be_given():
    with pytest.raises(ValueError, match=r"no config.model_type.*suffixes.*end in: down_proj, up"):
        fastbound.inject(MLPBlock(), 2)


def test_a_second_injection_names_the_remedy():
    model = MLPBlock()
    fastbound.inject(model, 2, target_modules=["up_proj"])
    with pytest.raises(ValueError, match=r"already holds 1 injected.*fastbound.merge\(model\)"):
        fastbound.inject(model, 2, target_modules=["down_proj"])


def test_a_single_layer_is_for_from_linear():
    with pytest.raises(TypeError, match=r"use FusedBoundedLinear.from_linear"):
        fastbound.inject(nn.Linear(2, 2), 2, target_modules=["x"])


def test_merge_of_the_layer_itself_and_of_nothing():
    layer = fastbound.FusedBoundedLinear(5, 3, rank=2)
    stir(nn.ModuleDict({"x": layer}))
    x = torch.randn(4, 5)
    plain = fastbound.merge(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), layer(x))
    with pytest.raises(ValueError, match="Linear holds no FusedBoundedLinear: nothing to merge"):
        fastbound.merge(plain)


def test_merge_refuses_a_nan_before_merging_anything():
    model = MLPBlock()
    fastbound.inject(model, 2, target_modules=["up_proj", "down_proj"])
    with torch.no_grad():
        model.down_proj.adapter.B[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"'down_proj' cannot be merged: its adapter\.B holds a NaN"
    ):
        fastbound.merge(model)
    assert isinstance(model.up_proj, fastbound.FusedBoundedLinear)


def test_the_report_reads_well_and_cannot_be_changed(tiny_model):
    report = fastbound.inject(tiny_model("llama"), 2)
    text = str(report)
    assert text.startswith("replaced 6 layers\n  2 x model.layers.*.mlp.gate_proj\n")
    assert re.search(r"training 576 of [\d,]+ parameters \([\d.]+%\)$", text)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.replaced = ()


@pytest.mark.parametrize("first", ["checkpointing", "inject"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny_model, first, reentrant):
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    enable = {"use_reentrant": reentrant}
    if first == "checkpointing":
        model.gradient_checkpointing_enable(enable)
    fastbound.inject(model, 2)
    if first == "inject":
        model.gradient_checkpointing_enable(enable)
    fastbound.inject(plain, 2)
    gradients = []
    for each in (model, plain):
        stir(each)
        each.train()
        each(**example(each)).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == trained(plain)
    for name, gradient in gradients[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[0][name], gradient)
