"""The unfused PEFT baselines compute the stated formula, in PEFT's own way."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbound.layers.bounds import bound_of_weight
from fastbound.performance.profiling import baselines

M, K, N, RANK = 33, 40, 56, 4
SCALING, OMEGA = 0.7, 1.9
NAMES = ("y", "dx", "dA", "dB")


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """fp64 operands that bf16 holds exactly, with factors large enough for the sine to bend."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16().double()

    return {
        "x": normal(M, K, scale=1.0),
        "weight": normal(N, K, scale=K**-0.5),
        "bias": normal(N, scale=0.1),
        "A": normal(RANK, K, scale=1.0),
        "B": normal(N, RANK, scale=1.0),
        "dy": normal(M, N, scale=1.0),
    }


def formula(tensors: dict[str, Tensor], scaling: float, omega: float) -> tuple[Tensor, ...]:
    """y, dx, dA, dB of y = x Wᵀ + b + s (x sin(ωA)ᵀ) sin(ωB)ᵀ in fp64, gradients by hand."""
    x, weight, bias, A, B, dy = (tensors[name] for name in ("x", "weight", "bias", "A", "B", "dy"))
    sin_A, sin_B = torch.sin(omega * A), torch.sin(omega * B)
    S, dS = x @ sin_A.T, scaling * dy @ sin_B
    y = x @ weight.T + bias + scaling * S @ sin_B.T
    dx = dy @ weight + dS @ sin_A
    dA = omega * torch.cos(omega * A) * (dS.T @ x)
    dB = scaling * omega * torch.cos(omega * B) * (dy.T @ S)
    return y, dx, dA, dB


def frozen_layer(tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(K, N, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(tensors["weight"])
        assert layer.bias is not None
        layer.bias.copy_(tensors["bias"])
    return layer


def run(layer: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = tensors["x"].to(dtype, copy=True).requires_grad_()
    y = layer(x)
    y.backward(tensors["dy"].to(dtype))
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    return y, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.detach().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("base_dtype", "adapter_dtype", "tolerance"),
    [
        # eps of the coarsest dtype; without its sine, scaling or omega a result is 0.3 or more off
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 2**-8),
        (torch.bfloat16, torch.bfloat16, 2 * 2**-8),
    ],
)
def test_peft_linear_matches_fp64_formula(
    tensors: dict[str, Tensor],
    base_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    tolerance: float,
) -> None:
    layer = baselines.peft_linear(
        frozen_layer(tensors, base_dtype),
        tensors["A"],
        tensors["B"],
        scaling=SCALING,
        omega=OMEGA,
        adapter_dtype=adapter_dtype,
    )
    actual = run(layer, tensors, base_dtype)
    assert actual[2].dtype == actual[3].dtype == adapter_dtype
    for name, value, truth in zip(NAMES, actual, formula(tensors, SCALING, OMEGA), strict=True):
        assert relative_error(value, truth) <= tolerance, name


def test_baseline_saves_what_peft_lora_saves_for_activations(tensors: dict[str, Tensor]) -> None:
    """The sine adds weight-sized tensors only: each saved [M, ·] tensor is one of PEFT LoRA."""

    def saved_shapes(layer: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
        shapes = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape[0] == M:
                shapes.append((tuple(tensor.shape), tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(tensors["x"].bfloat16().requires_grad_())
        return sorted(shapes, key=str)

    def adapted(variant: Any) -> Any:
        model = nn.Sequential(frozen_layer(tensors, torch.bfloat16))
        return baselines.inject_peft(model, RANK, target_modules=["0"], variant=variant)

    shapes = saved_shapes(adapted("sine"))
    assert ((M, K), torch.float32) in shapes  # PEFT's fp32 copy of x
    assert shapes == saved_shapes(adapted("lora"))


def adapted_layer(model: Any) -> Any:
    return model.base_model.model[0]


def fill(layer: Any, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(tensors["A"])
        layer.lora_B["default"].weight.copy_(tensors["B"])


@pytest.mark.parametrize(
    ("alpha", "bound"), [(None, None), (8.0, None), (6.0, 0.5), (None, 0.25), (2.0, "4*rms")]
)
def test_inject_turns_alpha_and_bound_into_scaling_and_omega(
    tensors: dict[str, Tensor], alpha: float | None, bound: Any
) -> None:
    model = baselines.inject_peft(
        nn.Sequential(frozen_layer(tensors, torch.float32)),
        RANK,
        alpha=alpha,
        bound=bound,
        target_modules=["0"],
    )
    layer = adapted_layer(model)
    slope = RANK if alpha is None else alpha
    limit = slope if bound is None else bound
    if isinstance(bound, str):
        limit = bound_of_weight(bound, tensors["weight"])
    fill(layer, tensors)
    truth = formula(tensors, limit / RANK, math.sqrt(slope / limit))
    for name, value, expected in zip(NAMES, run(layer, tensors, torch.float32), truth, strict=True):
        assert relative_error(value, expected) <= 2e-6, name
    delta = layer.get_delta_weight("default")
    assert delta.abs().max() <= limit * (1 + 1e-6)


def test_inject_lora_is_plain_peft_lora(tensors: dict[str, Tensor]) -> None:
    model = baselines.inject_peft(
        nn.Sequential(frozen_layer(tensors, torch.float64)),
        RANK,
        alpha=3.0,
        target_modules=["0"],
        variant="lora",
        adapter_dtype=torch.float64,
    )
    layer = adapted_layer(model)
    fill(layer, tensors)
    y = layer(tensors["x"])
    truth = tensors["x"] @ (tensors["weight"] + 3.0 / RANK * tensors["B"] @ tensors["A"]).T
    assert relative_error(y, truth + tensors["bias"]) <= 1e-14


@pytest.mark.parametrize("variant", ["sine", "lora"])
def test_inject_trains_the_adapter_alone_and_starts_at_the_base(
    tensors: dict[str, Tensor], variant: Any
) -> None:
    base = nn.Sequential(frozen_layer(tensors, torch.bfloat16), nn.GELU())
    x = tensors["x"].bfloat16()
    before = base(x)
    model: Any = baselines.inject_peft(base, RANK, target_modules=["0"], variant=variant)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.equal(model(x), before)


def test_merge_keeps_the_function_for_linear_and_conv1d(tensors: dict[str, Tensor]) -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(N, K)
    with torch.no_grad():
        conv.weight.copy_(tensors["weight"].T)
    for base in (frozen_layer(tensors, torch.float32), conv):
        model: Any = baselines.inject_peft(
            nn.Sequential(base), RANK, bound=0.5, target_modules=["0"]
        )
        fill(adapted_layer(model), tensors)
        x = tensors["x"].float()
        before = model(x)
        merged = model.merge_and_unload()
        assert type(merged[0]) is type(base)
        torch.testing.assert_close(merged(x), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"alpha": -1.0}, "alpha must be positive and finite, got -1.0"),
        ({"alpha": float("nan")}, "alpha must be positive and finite, got nan"),
        ({"bound": 0.0}, "bound must be positive and finite, got 0.0"),
        ({"variant": "cosine"}, "variant must be 'sine' or 'lora', got 'cosine'"),
        ({"variant": "lora", "bound": 1.0}, "plain LoRA has no bound"),
    ],
)
def test_inject_names_the_bad_value(arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(K, N))
    with pytest.raises(ValueError, match=message):
        baselines.inject_peft(model, target_modules=["0"], **arguments)
    assert type(model[0]) is nn.Linear


def test_peft_linear_names_both_shapes_when_they_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"A must be \[rank, 40\].*A \[4, 41\] and B \[56, 4\]"):
        baselines.peft_linear(
            nn.Linear(K, N), torch.zeros(4, 41), torch.zeros(56, 4), scaling=1.0, omega=1.0
        )


def test_missing_private_surface_names_the_peft_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft
    from peft.tuners.lora import Linear

    baselines._sine_classes.cache_clear()
    monkeypatch.delattr(Linear, "lora_variants")
    monkeypatch.delattr("peft.tuners.lora.layer.LoraLayer.lora_variants")
    with pytest.raises(RuntimeError, match=rf"Linear\.lora_variants.*PEFT {peft.__version__}"):
        baselines.inject_peft(nn.Sequential(nn.Linear(K, N)), target_modules=["0"])


def test_importing_baselines_does_not_import_peft() -> None:
    code = "import sys, fastbound.performance.profiling.baselines"
    code += "; print({'peft', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
