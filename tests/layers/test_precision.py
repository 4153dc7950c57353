"""Dtypes of base, adapter and autocast together, scaled losses, and what else may train."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import fastbound
from fastbound import bounded_linear
from fastbound.truth import formula
from fastbound.truth.exactness import assert_as_exact_as_the_formula
from fastbound.truth.operands import layer_operands
from fastbound.unlearning.training.fila import fila_factors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "split", "fused"]


def by_autocast(dtype: torch.dtype):
    """The operator over fp32 x and weight under autocast to ``dtype``, as a user calls it."""

    def call(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor, **settings) -> Tensor:
        with torch.autocast("cpu", dtype):
            return bounded_linear(x, weight, A, B, bias, **settings)

    return call


@pytest.mark.interpreted
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_base_with_every_adapter(backend, dtype, adapter_dtype, interpreted_bf16):
    o = layer_operands((7, 33), 29, 5, dtype, adapter_dtype=adapter_dtype)
    assert_as_exact_as_the_formula(o, bounded_linear, backend=backend)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_as_if_x_came_in_its_dtype(dtype, base_dtype):
    o = layer_operands((7, 32), 24, 5, base_dtype)
    settings = {"scaling": o.scaling, "omega": o.omega}
    for leaf in (o.A, o.B, o.bias):
        leaf.requires_grad_()
    x = o.x.requires_grad_()
    y = by_autocast(dtype)(x, o.weight, o.A, o.B, o.bias, **settings)
    found = torch.autograd.grad(y, (x, o.A, o.B, o.bias), o.dy.to(dtype))
    cast = o.x.detach().to(dtype).requires_grad_()
    expected_y = bounded_linear(cast, o.weight.to(dtype), o.A, o.B, o.bias, **settings)
    expected = torch.autograd.grad(expected_y, (cast, o.A, o.B, o.bias), o.dy.to(dtype))
    assert y.dtype is dtype and torch.equal(y, expected_y)
    for got, same, leaf in zip(found, expected, (x, o.A, o.B, o.bias), strict=True):
        assert got.dtype is leaf.dtype and torch.equal(got, same.to(got.dtype))


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_are_not_rounded_before_the_sine(backend, interpreted_bf16):
    """At arguments near 20 a bf16 master is off by up to 0.06: the sine would be another one."""
    o = layer_operands((16, 32), 32, 8, torch.bfloat16, bias=False, magnitude=10.0, omega=2.0)
    truth = formula.bounded_linear(
        *(t.double() for t in (o.x, o.weight, o.A, o.B)), scaling=o.scaling, omega=o.omega
    )
    rounded = replace(o, A=o.A.bfloat16().float(), B=o.B.bfloat16().float())

    def error(p) -> float:
        settings = {"scaling": p.scaling, "omega": p.omega, "backend": backend}
        y = bounded_linear(p.x, p.weight, p.A, p.B, **settings)
        return (y.double() - truth).abs().max().item()

    assert 5 * error(o) < error(rounded)
    assert_as_exact_as_the_formula(o, bounded_linear, backend=backend)


def trained_layer(form: str, weight: Tensor, seed: int = 0) -> fastbound.FusedBoundedLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    layer = fastbound.FusedBoundedLinear.from_linear(linear, 8, bound="0.5*spectral", form=form)
    nn.init.normal_(layer.adapter.B)
    return layer


@pytest.mark.parametrize("form", formula.ADAPTER_FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_made_of_weight_and_factors_does_not_depend_on_autocast(form, dtype, tmp_path):
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))

    def made(folder) -> list[object]:
        layer = trained_layer(form, weight)
        model = nn.Sequential(layer)
        fastbound.export_lora(model, folder, rank=4)
        return [
            layer.bound,
            layer.adapter.bound_in_use(),
            fila_factors(weight, weight.abs().sum(1), 4, 1.0)[1].tolist(),
            layer.delta_weight().tolist(),
            layer.to_linear().weight.tolist(),
            (folder / "adapter_model.safetensors").read_bytes(),
        ]

    expected = made(tmp_path / "without")
    with torch.autocast("cpu", dtype):
        assert made(tmp_path / "under") == expected


@pytest.mark.parametrize("form", formula.ADAPTER_FORMS)
def test_autocast_leaves_fp64_alone(form):
    layer = trained_layer(form, torch.randn(48, 32, dtype=torch.float64))
    x = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)

    def made() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y.sum(), [x, layer.adapter.A, layer.adapter.B])]

    expected = made()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, made(), expected))


def test_an_fp64_weight_is_not_rounded_when_fp32_factors_are_merged():
    weight = torch.randn(48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = trained_layer("factors", weight)
    nn.init.zeros_(layer.adapter.B)
    assert torch.equal(layer.to_linear().weight, weight)
    model = get_peft_model(
        nn.Sequential(nn.Linear(32, 48).double()), fastbound.BoundedConfig(target_modules=["0"])
    )
    before = model.base_model.model[0].base_layer.weight.clone()
    assert torch.equal(model.merge_and_unload()[0].weight, before)


@pytest.mark.parametrize("fuse_mlp", [True, False], ids=["block", "layers"])
def test_a_scaled_loss_gives_the_same_step(tiny_model, fuse_mlp):
    def step(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
        model = tiny_model("llama").train()
        fastbound.inject(model, rank=4, bound=0.5, fuse_mlp=fuse_mlp)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for number, parameter in enumerate(trained.values()):
            generator = torch.Generator().manual_seed(number)
            nn.init.normal_(parameter, 0, 0.3, generator=generator)
        optimizer = torch.optim.SGD(trained.values(), lr=1.0)
        tokens = torch.arange(3, 15).view(2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = {n: p.grad.clone() for n, p in trained.items()}
        scaler.step(optimizer)
        return gradients

    plain = step(torch.amp.GradScaler("cpu", enabled=False))
    scaled = step(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    for name, gradient in plain.items():  # a power of two moves exponents alone
        assert gradient.abs().max() > 0
        torch.testing.assert_close(scaled[name], gradient, rtol=1e-5, atol=1e-8)


def test_an_overflow_skips_the_step():
    layer = fastbound.FusedBoundedLinear(8, 8, rank=2, bound=0.5)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = layer.adapter.B.detach().clone()
    with torch.autocast("cpu", torch.float16):
        y = layer(torch.full((4, 8), 100.0))
    scaler.scale(y.square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.adapter.B, before) and scaler.get_scale() < 2.0**16


class TestWhatElseMayTrain:
    def test_a_bias_of_a_layer_gets_its_gradient(self):
        layer = fastbound.FusedBoundedLinear(8, 6, rank=2, bound=0.5)
        layer.bias.requires_grad_(True)
        x = torch.randn(5, 8)
        dy = torch.randn(5, 6)
        layer(x).backward(dy)
        torch.testing.assert_close(layer.bias.grad, dy.sum(0))

    def test_a_bias_inside_a_block_gets_its_gradient_and_explain_says_how(self, tiny_model):
        model = tiny_model("phi")
        fastbound.inject(model, rank=2, bound=0.5)
        model.model.layers[0].mlp.fc1.bias.requires_grad_(True)
        tokens = torch.arange(3, 15).view(2, 6)
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert model.model.layers[0].mlp.fc1.bias.grad.abs().max() > 0
        first, second = fastbound.explain(model).blocks
        assert not first.fused and "its fc1 trains its bias" in first.reason
        assert second.fused

    def test_a_trained_weight_is_refused_by_name(self):
        layer = fastbound.FusedBoundedLinear(8, 6, rank=2, bound=0.5)
        layer.weight.requires_grad_(True)
        with pytest.raises(ValueError, match=r"weight requires grad.*requires_grad_\(False\)"):
            layer(torch.randn(5, 8))
