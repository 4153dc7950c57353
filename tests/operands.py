"""Operands and the measure of error that the operator's tests share.

Truth is the formula in fp64 over the same numbers. A path passes when its error against the truth
is no larger than the plain formula's in the same dtype, plus a slack of a few roundings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastbound import reference

GRADIENTS = ("dx", "dA", "dB", "db")


@dataclass(frozen=True)
class Operands:
    """What one call takes, and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float
    omega: float

    def to(self, dtype: torch.dtype) -> Operands:
        moved = {
            name: getattr(self, name).detach().to(dtype) for name in ("x", "weight", "A", "B", "dy")
        }
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return replace(self, **moved, bias=bias)


def operands(
    shape: tuple[int, ...],
    N: int,
    rank: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    adapter_dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
    scaling: float = 0.7,
    omega: float = 1.3,
    seed: int = 0,
    device: str = "cpu",
) -> Operands:
    """x of ``shape`` [..., K]; near magnitude 0 a kernel that forgot the sine would pass."""
    generator = torch.Generator().manual_seed(seed)
    K = shape[-1]

    def normal(*size: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    return Operands(
        normal(*shape),
        normal(N, K, scale=K**-0.5),
        normal(rank, K, dtype=adapter_dtype, scale=magnitude),
        normal(N, rank, dtype=adapter_dtype, scale=magnitude),
        normal(N) if bias else None,
        normal(*shape[:-1], N),
        scaling,
        omega,
    )


def run(o: Operands, function, **kwargs: object) -> dict[str, Tensor]:
    """y and every gradient of ``function`` at the operands."""
    leaves = [t.detach().requires_grad_() for t in (o.x, o.A, o.B)]
    bias = None if o.bias is None else o.bias.detach().requires_grad_()
    x, A, B = leaves
    y = function(x, o.weight, A, B, bias, scaling=o.scaling, omega=o.omega, **kwargs)
    wanted = leaves if bias is None else [*leaves, bias]
    return {
        "y": y.detach(),
        **dict(zip(GRADIENTS, torch.autograd.grad(y, wanted, o.dy), strict=False)),
    }


def assert_as_exact_as_the_formula(o: Operands, function, **kwargs: object) -> None:
    """Each result's error is at most the plain formula's in the same dtype, plus slack.

    Slack: four roundings of the compute dtype at the largest entry, and two fp32 roundings at the
    largest sum of magnitudes. Both errors are maxima over what may be few entries, and a sum that
    cancels is rounded in another order than the formula's. Where SA, SB, S or dS underflows (fp16),
    half the smallest number each, carried to the result.
    """
    rounding, fp32_rounding = torch.finfo(o.x.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    smallest = torch.finfo(o.x.dtype).smallest_normal * torch.finfo(o.x.dtype).eps
    sums = _sums_of_magnitudes(o.to(torch.float64))
    underflown = _sums_of_magnitudes(o.to(torch.float64), smallest / 2)
    ours = run(o, function, **kwargs)
    plain = run(o, reference.bounded_linear)
    truth = run(o.to(torch.float64), reference.bounded_linear)
    for name, expected in truth.items():
        got = ours[name]
        assert got.shape == expected.shape, f"{name}: {got.shape} for {expected.shape}"
        assert got.dtype == plain[name].dtype, f"{name}: {got.dtype} for {plain[name].dtype}"
        if expected.numel() == 0:
            continue
        error = (got.double() - expected).abs().max().item()
        eager_error = (plain[name].double() - expected).abs().max().item()
        slack = 4 * rounding * expected.abs().max().item()
        slack += 2 * fp32_rounding * sums[name].max().item()
        slack += (underflown[name] - sums[name]).max().item() + smallest / 2
        assert error <= eager_error + slack, (
            f"{name}: error {error:.3e}, the plain formula's {eager_error:.3e}, slack {slack:.3e}"
        )


def _sums_of_magnitudes(o: Operands, underflow: float = 0.0) -> dict[str, Tensor]:
    """The formula with every term replaced by its magnitude: what cancellation hides.

    ``underflow`` is added to every intermediate.
    """
    x, W, dy = (t.abs().reshape(-1, t.shape[-1]) for t in (o.x, o.weight, o.dy))
    SA = torch.sin(o.omega * o.A).abs() + underflow
    SB = o.scaling * torch.sin(o.omega * o.B).abs() + underflow
    S, dS = x @ SA.T + underflow, dy @ SB + underflow
    sums = {
        "y": x @ W.T + S @ SB.T,
        "dx": dy @ W + dS @ SA,
        "dA": o.omega * torch.cos(o.omega * o.A).abs() * (dS.T @ x),
        "dB": o.scaling * o.omega * torch.cos(o.omega * o.B).abs() * (dy.T @ S),
    }
    if o.bias is not None:
        sums["y"] += o.bias.abs()
        sums["db"] = dy.sum(0)
    return sums
