"""The truth for a sample of rows: y and dx in fp64, with a few rows of a weight at a time.

A row of y or dx depends only on the same row of x and dy, so a few rows show whether a call over
many is correct, without an fp64 copy of a whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbound.truth import formula
from fastbound.truth.formula import Projection

_AT_ONCE = 2**22  # elements of a weight in fp64 at a time


class _Wide(torch.autograd.Function):
    """``x Wᵀ`` in fp64, for x [M, K] in fp64 and W [N, K] in any dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return torch.cat([x @ part.double().t() for part in _parts(weight)], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (dy,) = gradients
        dx = dy.new_zeros(dy.shape[0], ctx.weight.shape[1])
        parts = _parts(ctx.weight)
        for gradient, part in zip(dy.split(len(parts[0]), dim=1), parts, strict=True):
            dx += gradient @ part.double()
        return dx, None


class _Delta(torch.autograd.Function):
    """``x ΔWᵀ`` in fp64, where ΔW = scaling·sin(omega·B A) is made a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, omega: float) -> Tensor:
        ctx.parts = [(A, b, scaling, omega) for b in B.split(max(1, _AT_ONCE // A.shape[1]))]
        return torch.cat([x @ _delta(*part).t() for part in ctx.parts], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        dx = dy.new_zeros(dy.shape[0], ctx.parts[0][0].shape[1])
        widths = [part[1].shape[0] for part in ctx.parts]
        for gradient, part in zip(dy.split(widths, dim=1), ctx.parts, strict=True):
            dx += gradient @ _delta(*part)
        return dx, None, None, None, None


def _delta(A: Tensor, B: Tensor, scaling: float, omega: float) -> Tensor:
    return formula.delta_weight(A, B, scaling=scaling, omega=omega, form="product")


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.detach().split(max(1, _AT_ONCE // weight.shape[1]))


def wide_product(
    x: Tensor, p: Projection, keep: Tensor | None = None, result: Tensor | None = None
) -> Tensor:
    """One projection of x [M, K] in fp64; ``result``, if given, takes the place of x Wᵀ + b.

    For ``keep`` see ``formula.bounded_linear``.
    """
    if result is None:
        result = _Wide.apply(x, p.weight)
        result = result if p.bias is None else result + p.bias.detach().double()
    if p.A is None or p.B is None:
        return result
    A, B = p.A.detach().double(), p.B.detach().double()
    settings: dict[str, Any] = {"scaling": p.scaling, "omega": p.omega}
    if p.form == "product":
        return result.double() + _Delta.apply(x, A, B, *settings.values())
    settings["keep"] = keep
    return formula.bounded_addition(result.double(), x, A, B, **settings)


def wide_mlp(
    x: Tensor, gate: Projection, up: Projection | None, down: Projection, activation: str
) -> Tensor:
    """A block of x [M, K] in fp64; if ``up`` is None, a plain one that starts with ``gate``."""
    first, second, last = (
        None if p is None else partial(wide_product, p=p) for p in (gate, up, down)
    )
    if first is None or last is None:
        raise ValueError("a block needs its first and its last projection")
    if second is None:
        return formula.mlp(x, first, last, activation=activation)
    return formula.mlp(x, second, last, first, activation=activation)


def y_and_dx(
    call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y and dx in fp64 of a call over the rows of x; dx is None without a dy."""
    x = x.detach().double().requires_grad_(dy is not None)
    with torch.enable_grad():
        y = call(x)
    if dy is None:
        return y.detach(), None
    (dx,) = torch.autograd.grad(y, x, dy.detach().double())
    return y.detach(), dx


def sampled_rows(M: int, device: torch.device, count: int = 64) -> Tensor:
    """Row indices: both ends, where a kernel's blocks may be cut, and ``count`` spread evenly."""
    spread = torch.linspace(0, M - 1, count, dtype=torch.float64, device=device).round().long()
    ends = torch.arange(8, device=device).clamp(max=M - 1)
    return torch.unique(torch.cat([spread, ends, M - 1 - ends]))
