"""FusedBoundedMLP: the block it stands for, name for name, and what cannot be one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastbound
from fastbound.operator.block_function import bounded_mlp
from fastbound.truth.formula import Projection
from tests.support.models import (
    MLP,
    Gated,
    Packed,
    Plain,
    assert_same,
    by_layers,
    example,
    fused,
    logits,
    model_of,
    pair,
    stir,
    trained,
)

UNFUSED = {"opt"}  # its projections are parts of the decoder layer
FUSED = [model_type for model_type in MLP if model_type not in UNFUSED]


@pytest.mark.parametrize("model_type", MLP)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_fused_model_is_the_model_layer_by_layer(tiny_model, model_type, training):
    one, other = pair(lambda: tiny_model(model_type).train(training))
    assert list(one.state_dict()) == list(other.state_dict())
    assert [n for n, _ in one.named_parameters()] == [n for n, _ in other.named_parameters()]
    blocks = [m for m in one.modules() if isinstance(m, fastbound.FusedBoundedMLP)]
    assert len(blocks) == (0 if model_type in UNFUSED else 2)
    assert not any(isinstance(m, fastbound.FusedBoundedMLP) for m in other.modules())
    assert_same(one, other, **example(one))


@pytest.mark.parametrize("target", [0, 1, -1])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "phi"])
def test_any_subset_of_the_projections_is_adapted(tiny_model, model_type, target):
    one, other = pair(lambda: tiny_model(model_type), target_modules=[MLP[model_type][target]])
    assert sum(isinstance(m, fastbound.FusedBoundedMLP) for m in one.modules()) == 2
    assert_same(one, other, **example(one))


@pytest.mark.parametrize("model_type", FUSED)
def test_the_report_counts_the_fused_blocks(tiny_model, model_type):
    report = fastbound.inject(tiny_model(model_type), 2)
    assert len(report.fused) == 2 and all(name.endswith("mlp") for name in report.fused)
    assert not report.unfused
    assert "fused 2 MLP blocks\n  2 x " in str(report)


def test_the_report_says_why_a_block_is_not_fused(tiny_model):
    report = fastbound.inject(tiny_model("opt"), 2)
    assert report.fused == () and len(report.unfused) == 2
    (reason,) = set(report.unfused.values())
    assert reason.startswith(
        (
            "is a OPTDecoderLayer, whose forward is not that of a known MLP",
            "is a OPTDecoderLayer, which has a __call__ of its own",  # in older transformers
        )
    )
    assert f"  not fused: 2 x model.decoder.layers.*: {reason}" in str(report)
    off = fastbound.inject(tiny_model("llama"), 2, fuse_mlp=False)
    assert set(off.unfused.values()) == {"was injected with fuse_mlp=False"}


def test_opts_projections_run_as_one_operator_where_they_are_called_so(tiny_model):
    """OPT's layer holds them itself, which `inject` leaves alone and `explain` says."""
    model = tiny_model("opt")
    fastbound.inject(model, 4, bound=0.5, target_modules=["fc1", "fc2"])
    stir(model)
    layer = model.model.decoder.layers[0]
    with torch.no_grad():
        for projection in (layer.fc1, layer.fc2):
            projection.bias.normal_()
    x = torch.randn(2, 7, layer.fc1.in_features, requires_grad=True)
    up, down = (
        Projection(p.weight, p.bias, p.adapter.A, p.adapter.B, p.scaling, p.omega)
        for p in (layer.fc1, layer.fc2)
    )
    inputs = (x, up.A, up.B, down.A, down.B)
    results = []
    for y in (
        bounded_mlp(x, up, down, activation="relu"),
        layer.fc2(torch.relu(layer.fc1(x))),
    ):
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    torch.testing.assert_close(*results)
    assert "OPTDecoderLayer" in str(fastbound.explain(model))


@pytest.mark.parametrize("written_fused", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_files_and_state_dicts_go_both_ways(tiny_model, tmp_path, model_type, written_fused):
    one, other = pair(lambda: tiny_model(model_type))
    writer, reader = (one, other) if written_fused else (other, one)
    with torch.no_grad():
        for p in reader.parameters():
            if p.requires_grad:
                p.zero_()
    fastbound.save_adapter(writer, tmp_path)
    fastbound.load_adapter(reader, tmp_path)
    torch.testing.assert_close(logits(reader), logits(writer))
    plain = tiny_model(model_type)
    report = fastbound.load_adapter(plain, tmp_path, fuse_mlp=not written_fused)
    assert bool(report.fused) is not written_fused
    torch.testing.assert_close(logits(plain), logits(writer))
    assert not reader.load_state_dict(writer.state_dict()).missing_keys


def test_merge_gives_the_original_class_and_attributes_back(tiny_model):
    model = tiny_model("gpt2")
    before = {name: type(module) for name, module in model.named_modules()}
    attributes = set(vars(model.transformer.h[0].mlp))
    fastbound.inject(model, 4, bound=0.5, target_modules=["mlp.c_proj"])
    stir(model)
    adapted = logits(model)
    fastbound.merge(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert set(vars(model.transformer.h[0].mlp)) == attributes
    torch.testing.assert_close(logits(model), adapted)


@pytest.mark.parametrize("build", [Gated, Plain, Packed, lambda: Packed(bias=False)])
@pytest.mark.parametrize("merge", [True, False])
def test_a_block_there_and_back(build, merge):
    torch.manual_seed(0)
    original = build().eval()
    x = torch.randn(4, 6)
    expected = original(x)
    block = fastbound.FusedBoundedMLP.from_mlp(original, 3, bound=0.5)
    assert block.obstacle() is None and not block.training
    torch.testing.assert_close(block(x), expected)
    stir(block)
    assert (block(x) - expected).abs().max() > 1e-3
    plain = block.to_mlp(merge)
    assert type(plain) is type(original) and vars(plain).keys() == vars(original).keys()
    assert {type(m) for m in plain.children()} == {type(m) for m in original.children()}
    torch.testing.assert_close(plain(x), block(x) if merge else expected)
    merged = fastbound.merge(block)
    torch.testing.assert_close(merged(x), block(x))


@pytest.mark.parametrize("build", [Gated, Plain, Packed])
@pytest.mark.parametrize("recompute", [None, "gate_up"])
def test_a_block_computes_its_original_forward(build, recompute):
    block = fused(build, recompute=recompute)
    x = torch.randn(2, 3, 6, requires_grad=True)
    torch.manual_seed(1)
    y = block(x)
    adapters = {n: p for n, p in block.named_parameters() if p.requires_grad}
    wanted = {"x": x, **adapters}
    grads = torch.autograd.grad(y.square().sum(), list(wanted.values()))
    torch.manual_seed(1)
    expected = by_layers(block)(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(wanted.values()))
    torch.testing.assert_close(y, expected)
    for name, gradient, expected_gradient in zip(wanted, grads, expected_grads, strict=True):
        assert expected_gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected_gradient)


def test_from_mlp_adapts_what_targets_names():
    mlp = Gated()
    weight = mlp.up.weight
    block = fastbound.FusedBoundedMLP.from_mlp(
        mlp, 3, alpha=6, bound="auto", targets=["up"], adapter_dtype=torch.bfloat16, backend="torch"
    )
    assert type(block.gate) is nn.Linear and type(mlp.up) is nn.Linear
    assert block.up.weight is weight and block.note == "kept"
    assert (block.up.rank, block.up.alpha, block.up.adapter.A.dtype) == (3, 6.0, torch.bfloat16)
    assert trained(block) == {"up.adapter.A", "up.adapter.B"}
    assert "Gated: down(act(gate(x)) * up(x))" in repr(block)


class _OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("build", "settings", "error", "message"),
    [
        (
            lambda: Gated(nn.Tanh()),
            {},
            ValueError,
            "Tanh: the supported activations are silu, gelu,",
        ),
        (Gated, {"rank": 0}, ValueError, "rank must be >= 1, got 0"),
        (Gated, {"bound": "wide"}, ValueError, "bound must be"),
        (
            Gated,
            {"targets": ["updown"]},
            ValueError,
            "a list of projections, out of gate, up, down; got",
        ),
        (Gated, {"targets": []}, ValueError, "a list of projections, out of gate, up, down; got"),
        (Gated, {"targets": "up"}, ValueError, "a list of projections, out of gate, up, down; got"),
        (Gated, {"recompute": "all"}, ValueError, "unknown recompute 'all'"),
        (lambda: Packed(N=9), {}, ValueError, "its both has 18 outputs, but down needs it to have"),
        (lambda: nn.Linear(2, 2), {}, TypeError, "is a Linear, whose forward is not that of"),
        (lambda: _with(Gated(), "up", nn.Linear(6, 9)), {}, ValueError, "differ in size"),
        (lambda: _with(Gated(), "down", nn.Linear(9, 6)), {}, ValueError, "has 10 outputs, but"),
        (lambda: _with(Gated(), "up", _OwnLinear(6, 10)), {}, ValueError, "its up is a _OwnLinear"),
        (lambda: _with(Gated(), "up", None), {}, TypeError, "its up is not a module"),
        (
            lambda: _with(Gated(), "up", nn.Linear(6, 10).double()),
            {},
            ValueError,
            "and its up torch.float64 on cpu",
        ),
    ],
)
def test_from_mlp_refuses_with_the_reason_and_changes_nothing(build, settings, error, message):
    mlp = build()
    children, trains = dict(mlp.named_children()), trained(mlp)
    with pytest.raises(error, match=message):
        fastbound.FusedBoundedMLP.from_mlp(mlp, **settings)
    assert dict(mlp.named_children()) == children and trained(mlp) == trains


def _with(block: nn.Module, name: str, layer: nn.Module | None) -> nn.Module:
    setattr(block, name, layer)
    return block


def test_a_fused_block_is_not_fused_again():
    block = fused(Gated)
    for again in (fastbound.FusedBoundedMLP, fastbound.FusedBoundedMLP.from_mlp):
        with pytest.raises(TypeError, match=r"the Gated is already fused: call to_mlp\(\) first"):
            again(block)
    with pytest.raises(ValueError, match="already holds 3 injected layers"):
        fastbound.inject(nn.Sequential(block), 2, target_modules=["up"])


def test_hooks_on_the_block_before_fusing_are_not_lost():
    model = model_of(Gated)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    report = fastbound.inject(model, 2, target_modules=["up"])
    assert report.unfused == {"0": "has forward or backward hooks, which a replacement would lose"}
    model(torch.randn(2, 6))
    assert seen == [1]


def test_a_block_compiled_in_place_is_left_compiled():
    model = model_of(Gated)
    model[0].compile(backend="eager")
    report = fastbound.inject(model, 2, target_modules=["up"])
    assert report.unfused == {"0": "was compiled in place: compile it after fusing"}


def test_the_model_itself_is_left_in_place():
    block = Gated()
    report = fastbound.inject(block, 2, target_modules=["up"])
    assert report.unfused[""].startswith("it cannot be replaced in place")
    assert "not fused: 1 x the model itself: it cannot be replaced in place" in str(report)
