"""Adapters over layers that compute x Wᵀ themselves: real bitsandbytes and torchao on the CPU."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from unittest import mock

import bitsandbytes
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import fastbound
from fastbound.dispatch.device import Device, pretending
from fastbound.operator import ops
from fastbound.operator.engine import route_for
from fastbound.truth.formula import bounded_linear
from tests.support.bases import (
    BASES,
    QUANTISED,
    K,
    N,
    float8,
    int8,
    linear4bit,
    linear8bit,
    offloaded,
    plain,
    pruned,
    subclass,
    with_hook,
    with_old_weight_norm,
    with_weight_norm,
)
from tests.support.models import example, logits, stir, trained


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.up = layer
        self.down = nn.Linear(N, K)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def injected(build, **settings) -> nn.ModuleDict:
    torch.manual_seed(1)
    model = nn.ModuleDict({"mlp": Block(build())})
    each = {"rank": 3, "bound": 0.5, "target_modules": ["up", "down"], **settings}
    model.report = fastbound.inject(model, **each)
    stir(model, 0.5)
    return model


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", ["factors", "product"])
@pytest.mark.parametrize("build", BASES)
def test_the_result_is_the_bases_own_plus_the_adapters_term_with_its_gradients(build, form):
    base, model = build(), injected(build, form=form)
    layer, x = model.mlp.up, rows(2, 5, K)
    adapter = layer.adapter
    leaves = [t.detach().clone().requires_grad_() for t in (x, adapter.A, adapter.B)]
    numbers = {"scaling": layer.scaling, "omega": layer.omega, "form": form}
    term = bounded_linear(leaves[0], torch.zeros(N, K), *leaves[1:], **numbers)
    (base(leaves[0]) + term).square().mean().backward()
    ours = x.clone().requires_grad_()
    y = layer(ours)
    y.square().mean().backward()
    torch.testing.assert_close(y, base(x) + term)
    for got, leaf in zip((ours.grad, adapter.A.grad, adapter.B.grad), leaves, strict=True):
        assert got.abs().max() > 0
        torch.testing.assert_close(got, leaf.grad)


@pytest.mark.parametrize("build", BASES)
def test_a_new_adapter_changes_no_bit_and_trains_alone(build):
    base = build()
    model = nn.ModuleDict({"up": build()})
    fastbound.inject(model, 3, bound="4*rms", target_modules=["up"])
    x = rows(7, K)
    assert torch.equal(model["up"](x), base(x))
    assert trained(model) == {"up.adapter.A", "up.adapter.B"}


@pytest.mark.parametrize("build", BASES)
def test_report_and_explanation_say_why_the_base_is_called(build):
    model = injected(build)
    report, reason = model.report, BASES[build]
    assert report.replaced == ("mlp.up", "mlp.down") and report.over_base == {"mlp.up": reason}
    assert not report.skipped and f"  still calling the base layer: 1 x mlp.up: {reason}" in str(
        report
    )
    assert report.unfused == {"mlp": f"its up is adapted over its base: {reason}"}
    explanation = fastbound.explain(model, tokens=64)
    row = next(row for row in explanation if row.layer == "mlp.up")
    assert row.plan.strategy == "torch" and row.shape == (N, K)
    assert f"  torch: {reason}; " in str(explanation)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["auto", "torch", "split"])
def test_the_explanation_over_a_base_is_the_plan_that_runs(backend):
    """On the CPU: PyTorch's, and Triton's in the interpreter where it is asked for by name."""
    layer = injected(subclass, backend=backend).mlp.up
    with mock.patch("fastbound.operator.ops.route_for", side_effect=route_for) as chosen:
        layer(rows(5, K)).backward(rows(5, N))
    (row,) = fastbound.explain(layer, tokens=5)
    plans = {route_for(*call.args).plan for call in chosen.call_args_list}
    assert plans == {replace(row.plan, reason=row.plan.reason.removeprefix("base is Doubled; "))}
    assert row.plan.strategy == ("split" if backend == "split" else "torch")


def test_the_explanation_over_a_base_on_a_hopper_is_the_split_plan():
    layer = fastbound.BoundedOverBase.from_linear(nn.Linear(K, N, device="meta"), 3, bound=1.0)
    with pretending(Device("sm_90", 132)):
        (row,) = fastbound.explain(layer, tokens=4096)
    assert row.device == "sm_90" and row.plan.strategy == "split" and row.plan.tiles is not None
    assert str(row.plan.reason).startswith("base is to be called; ")


@pytest.mark.parametrize("build", QUANTISED)
def test_a_bound_in_units_of_the_weight_is_of_the_dequantised_weight(build):
    layer = fastbound.BoundedOverBase.from_linear(build(), 3, bound="4*rms")
    weight = dequantize_module_weight(build()).float()
    assert layer.bound == pytest.approx(4 * weight.square().mean().sqrt().item(), rel=1e-5)
    assert layer.bound == pytest.approx(4 * plain().weight.square().mean().sqrt().item(), rel=0.02)


@pytest.mark.parametrize("build", [with_weight_norm, with_old_weight_norm, offloaded, with_hook])
def test_a_bound_in_units_of_the_weight_is_of_the_weight_that_runs(build):
    layer = fastbound.BoundedOverBase.from_linear(build(), 3, bound="4*rms")
    assert layer.bound == pytest.approx(4 * plain().weight.square().mean().sqrt().item(), rel=1e-5)
    if build is offloaded:
        assert layer.weight.is_meta  # brought in for the reading only
        assert not layer.adapter.A.is_meta


@pytest.mark.parametrize("build", [*QUANTISED, offloaded])
def test_an_adapter_goes_onto_a_quantised_base_and_back(build, tmp_path):
    whole = injected(plain, bound="4*rms")
    fastbound.save_adapter(whole, tmp_path / "whole")
    over = nn.ModuleDict({"mlp": Block(build())})
    report = fastbound.load_adapter(over, tmp_path / "whole")
    assert report.over_base == {"mlp.up": BASES[build]}
    for name in ("up", "down"):  # the bound of the whole weight, not of this one
        here, there = over.mlp.get_submodule(name), whole.mlp.get_submodule(name)
        assert (here.alpha, here.bound) == (there.alpha, there.bound)
    fastbound.save_adapter(over, tmp_path / "over")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "over" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("build", BASES)
def test_merge_refuses_by_name_before_it_merges_anything(build):
    model = injected(build)
    refused = {
        **dict.fromkeys(QUANTISED, r"'mlp\.up' cannot be merged: .*rounded away.*floating dtype"),
        subclass: "its base is a Doubled with a forward of its own",
        with_weight_norm: "remove_parametrizations",
        with_old_weight_norm: "recomputed in each call by WeightNorm",
        pruned: "recomputed in each call by L1Unstructured",
        with_hook: "forward hooks of its base",
        offloaded: "its base is offloaded",
    }
    kept = model.mlp.down
    with pytest.raises(ValueError, match=refused[build]):
        fastbound.merge(model)
    assert model.mlp.down is kept  # nothing was merged


@pytest.mark.parametrize(
    ("build", "remedy"),
    [
        (with_weight_norm, lambda base: parametrize.remove_parametrizations(base, "weight")),
        (with_old_weight_norm, nn.utils.remove_weight_norm),
        (pruned, lambda base: prune.remove(base, "weight")),
        (with_hook, lambda base: base._forward_hooks.clear()),
    ],
)
def test_merge_after_the_remedy_it_names(build, remedy):
    model, x = injected(build), rows(5, K)
    remedy(model.mlp.up.base_layer)
    adapted = model["mlp"](x)
    fastbound.merge(model)
    assert type(model.mlp.up) is nn.Linear
    torch.testing.assert_close(model["mlp"](x), adapted)


def test_a_subclass_with_its_parents_forward_keeps_its_class():
    class Named(nn.Linear):
        pass

    layer = fastbound.BoundedOverBase.from_linear(Named(K, N), 3, bound=0.5)
    stir(nn.ModuleDict({"x": layer}))
    x = rows(5, K)
    merged = fastbound.merge(layer)
    assert type(merged) is Named and layer.to_linear(merge=False) is layer.base_layer
    torch.testing.assert_close(merged(x), layer(x))
    assert not torch.equal(merged.weight, layer.weight)


def test_hooks_see_the_bases_own_output_unharmed():
    seen: list[Tensor] = []
    base = plain()
    layer = copy.deepcopy(base)
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    over = fastbound.BoundedOverBase.from_linear(layer, 3, bound=0.5)
    stir(nn.ModuleDict({"x": over}))
    x = rows(5, K)
    y = over(x)
    assert torch.equal(seen[0], base(x)) and not torch.equal(y, seen[0])


@pytest.mark.parametrize("build", [linear4bit, linear8bit, int8])
def test_copies_compute_the_same(build):
    layer, x = injected(build).mlp.up, rows(5, K)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    if build is not int8:  # torchao's tensor does not pickle by itself either
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.parametrize("build", [linear4bit, int8])
def test_autocast_and_bf16_rows(build):
    layer, x = injected(build).mlp.up, rows(5, K)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), exact, rtol=0.05, atol=0.05)


def test_a_whole_language_model_in_four_bits(tiny_model):
    model = tiny_model("llama")
    exact = logits(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "mlp" in name:
            new = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32
            )
            new.load_state_dict(layer.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    before = logits(model)
    torch.testing.assert_close(before, exact, rtol=0.2, atol=0.2)
    report = fastbound.inject(model, 4, bound="4*rms")
    assert len(report.over_base) == 6 and not report.fused
    assert torch.equal(logits(model), before)
    stir(model)
    model(**example(model)).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapter." in name)
    with pytest.raises(ValueError, match=r"gate_proj' cannot be merged: .*Params4bit"):
        fastbound.merge(model)


@pytest.mark.parametrize("build", [linear4bit, linear8bit, int8, with_weight_norm, subclass])
def test_compiles_whole_with_the_same_gradient(build):
    layer, x = injected(build).mlp.up, rows(5, K)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    wanted = (layer.adapter.A, layer.adapter.B)
    one = torch.autograd.grad(compiled(x).square().sum(), wanted)
    other = torch.autograd.grad(layer(x).square().sum(), wanted)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [linear4bit, linear8bit, int8, float8, offloaded])
def test_activation_checkpointing_changes_no_gradient(build, reentrant):
    layer = injected(build).mlp.up
    x = rows(5, K).requires_grad_()
    wanted = (x, layer.adapter.A, layer.adapter.B)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        for leaf in wanted:
            leaf.grad = None
        run(x).square().sum().backward()
        gradients.append([leaf.grad for leaf in wanted])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("build", [linear4bit, linear8bit, int8, float8, subclass, with_hook])
def test_where_the_bases_output_is_written_into(build):
    layer = injected(build).mlp.up
    seen = []
    with mock.patch("fastbound.operator.ops.add_in_place", side_effect=ops.add_in_place) as spy:
        layer(rows(2, 5, K).requires_grad_())
        seen.append(spy.call_count)
        with torch.no_grad():
            layer(rows(2, 5, K))
        seen.append(spy.call_count)
    # int8's last node is none of those known to keep nothing; a hook, and a forward of its own, may
    # have kept the output.
    assert seen == {subclass: [0, 0], int8: [0, 1], with_hook: [0, 0]}.get(build, [1, 2])


class Keeping(nn.Linear):
    """Keeps its last output and returns it again, as a frozen tower's memo does."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("grad", [False, True])
def test_an_output_that_the_base_keeps_is_not_changed(grad):
    layer = fastbound.BoundedOverBase.from_linear(Keeping(K, N), 3)
    nn.init.normal_(layer.adapter.B)
    x = rows(2, 5, K)
    with torch.set_grad_enabled(grad):
        first, second = layer(x).clone(), layer(x)
        kept = layer.base_layer.kept
        torch.testing.assert_close(kept, nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(first, second) and kept.data_ptr() != second.data_ptr()


def test_an_output_that_a_hook_on_all_modules_keeps_is_not_changed():
    layer, x, kept = injected(linear8bit).mlp.up, rows(5, K), []

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        if module is layer.base_layer:
            kept.append((output, output.clone()))

    hook = nn.modules.module.register_module_forward_hook(keep)
    try:
        with torch.no_grad():
            layer(x)
    finally:
        hook.remove()
    ((output, before),) = kept
    assert torch.equal(output, before)


def test_a_base_with_more_arguments_gets_them():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    layer = fastbound.BoundedOverBase.from_linear(Scaled(K, N), 3)
    x = rows(5, K)
    assert torch.equal(layer(x, scale=3.0), layer.base_layer(x, 3.0))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_acts_in_training_only(dropout):
    layer, x = injected(linear4bit, dropout=dropout).mlp.up, rows(5, K)
    assert torch.equal(layer(x), layer(x)) == (dropout == 0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_whole_offloaded_language_model_trains_as_the_loaded_one(tiny_model):
    from accelerate import cpu_offload

    results = []
    for offload in (True, False):
        model = tiny_model("llama")
        if offload:
            cpu_offload(model, torch.device("cpu"))
        fastbound.inject(model, 4, bound="4*rms", fuse_mlp=False)
        stir(model)
        output = model(**example(model)).logits
        output.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(gradients) == trained(model)
        results.append((output, gradients))
        assert model.model.layers[0].mlp.up_proj.weight.is_meta == offload
    torch.testing.assert_close(*results)


@pytest.fixture(scope="module")
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("unit", ["mlp.up.adapter", "mlp.up", "mlp", ""])
@pytest.mark.parametrize("build", [subclass, with_hook])
def test_sharded_factors_are_gathered_for_the_addition(process_group, build, unit):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    one, other, x = injected(build), injected(build), rows(5, K)
    one = nn.Sequential(one["mlp"])
    for name in dict.fromkeys([unit.replace("mlp", "0"), ""]):
        fully_shard(one.get_submodule(name), mesh=init_device_mesh("cpu", (1,)))
    one(x).square().mean().backward()
    other["mlp"](x).square().mean().backward()
    for name in ("up", "down"):
        here, there = one[0].get_submodule(name).adapter, other.mlp.get_submodule(name).adapter
        torch.testing.assert_close(here.A.grad.full_tensor(), there.A.grad)
        torch.testing.assert_close(here.B.grad.full_tensor(), there.B.grad)


class TestRefusals:
    def test_a_base_that_returns_no_tensor_is_named(self):
        class Router(nn.Linear):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, super().forward(x)

        layer = fastbound.BoundedOverBase.from_linear(Router(K, N), 3)
        with pytest.raises(TypeError, match=r"a Router, returns a tuple, not a tensor.*leave"):
            layer(rows(5, K))

    def test_a_base_that_cuts_the_gradient_off_is_an_error_not_a_wrong_gradient(self):
        class Inference(nn.Linear):  # as bitsandbytes' packed weights on a CPU with AVX512-BF16
            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    return super().forward(x)

        layer = fastbound.BoundedOverBase.from_linear(Inference(K, N), 3)
        with pytest.raises(RuntimeError, match=r"Inference, gives x no gradient: its forward"):
            layer(rows(5, K).requires_grad_())
        layer(rows(5, K)).sum().backward()  # a first layer's x needs none

    def test_a_pre_hook_of_the_users_may_change_x(self):
        layer = plain()
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        model = nn.ModuleDict({"up": layer, "down": nn.Linear(N, K)})
        report = fastbound.inject(model, 3, target_modules=["up", "down"])
        assert report.replaced == ("down",) and "forward pre-hooks" in report.skipped["up"]

    def test_training_after_inference_in_four_bits_is_right_or_an_error(self):
        base = bitsandbytes.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.float32).to("cpu")
        layer = fastbound.BoundedOverBase.from_linear(base, 3)
        x = rows(5, K).requires_grad_()
        (expected,) = torch.autograd.grad(layer(x).sum(), x)
        with torch.no_grad():
            layer.eval()(x.detach())
        layer.train()
        if getattr(base.weight.quant_state, "packing_format_for_cpu", False):
            with pytest.raises(RuntimeError, match="a Linear4bit, gives x no gradient"):
                layer(x)
        else:
            assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], expected)

    def test_a_tied_weight_is_named(self):
        model = nn.ModuleDict({"up": linear4bit(), "down": nn.Linear(N, K)})
        model["other"] = nn.Module()
        model["other"].weight = model["up"].weight
        report = fastbound.inject(model, 3, target_modules=["up", "down"])
        assert "tied to other" in report.skipped["up"]

    def test_fused_is_not_for_a_closed_base(self):
        model = nn.ModuleDict({"up": linear4bit()})
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=r'backend="fused" cannot be used with a Linear4bit'):
            fastbound.inject(model, 3, target_modules=["up"], backend="fused")
        assert dict(model.named_modules()) == before

    def test_other_classes_and_bad_settings(self):
        with pytest.raises(TypeError, match="got Bilinear"):
            fastbound.BoundedOverBase.from_linear(nn.Bilinear(3, 3, 3), 2)
        with pytest.raises(TypeError, match=r"use BoundedOverBase\.from_linear"):
            fastbound.BoundedOverBase(3, 3)
        with pytest.raises(ValueError, match="rank must be >= 1"):
            fastbound.BoundedOverBase.from_linear(linear4bit(), 0)


class Strided(nn.Linear):
    def forward(self, x):
        return super().forward(x).transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("form", ["factors", "product"])
def test_compiles_over_a_base_whose_result_is_strided(form):
    model = nn.Sequential(Strided(8, 12))
    fastbound.inject(model, 2, target_modules=["0"], form=form)
    nn.init.normal_(model[0].adapter.B)
    x = torch.randn(5, 8, requires_grad=True)
    assert not model[0].base_layer(x).is_contiguous()
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
