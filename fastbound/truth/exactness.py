"""The measures of error: how exact a result must be, and how exact the plain formula is.

Truth is the formula in fp64 over the same numbers. A path passes when its error against the truth
is no larger than the plain formula's in the same dtype, plus a slack of a few roundings; a kernel,
when it is within rounding of its product in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbound.truth import formula
from fastbound.truth.operands import BlockOperands, LayerOperands, run


def assert_as_exact_as_the_formula(
    o: LayerOperands,
    function: Callable[..., Tensor],
    formula: Callable[..., Tensor] = formula.bounded_linear,
    **kwargs: Any,
) -> None:
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
    plain = run(o, formula)
    truth = run(o.to(torch.float64), formula)
    for name, expected in truth.items():
        got = ours[name]
        if got.shape != expected.shape:
            raise AssertionError(f"{name}: {got.shape} for {expected.shape}")
        if got.dtype != plain[name].dtype:
            raise AssertionError(f"{name}: {got.dtype} for {plain[name].dtype}")
        if expected.numel() == 0:
            continue
        error = (got.double() - expected).abs().max().item()
        eager_error = (plain[name].double() - expected).abs().max().item()
        slack = 4 * rounding * expected.abs().max().item()
        slack += 2 * fp32_rounding * sums[name].max().item()
        slack += (underflown[name] - sums[name]).max().item() + smallest / 2
        if not error <= eager_error + slack:  # a NaN fails too
            raise AssertionError(
                f"{name}: error {error:.3e}, the plain formula's {eager_error:.3e}, "
                f"slack {slack:.3e}"
            )


def assert_block_as_exact(
    block: BlockOperands, function: Callable[..., Tensor], activation: str, **kwargs: Any
) -> None:
    """The error's norm is at most the plain formula's in the same dtype, plus six roundings.

    A norm and not a maximum: h, dg and du are rounded in another place than autograd does it, so
    the two errors are equal in distribution and not entry by entry. Six, because rank one leaves
    few numbers, behind each of which stand six roundings (S, y's, dh, dg, dS and dA).
    """
    ours = block.run(function, activation=activation, **kwargs)
    plain = block.run(formula.bounded_mlp, activation=activation)
    expected = block.double().run(formula.bounded_mlp, activation=activation)
    rounding = torch.finfo(block.x.dtype).eps / 2
    for name, exact in expected.items():
        if ours[name].shape != exact.shape:
            raise AssertionError(f"{name}: {ours[name].shape} for {exact.shape}")
        if ours[name].dtype != plain[name].dtype:
            raise AssertionError(f"{name}: {ours[name].dtype} for {plain[name].dtype}")
        error = (ours[name].double() - exact).norm()
        allowed = (plain[name].double() - exact).norm() + 6 * rounding * exact.norm()
        if not error <= allowed:  # a NaN fails too
            raise AssertionError(f"{name}: error {error:.3e}, allowed {allowed:.3e}")


def assert_within_rounding(got: Tensor, expected: Tensor, terms: Tensor) -> None:
    """Within a unit of the output dtype and four of fp32 over ``terms``, the magnitudes' sum."""
    if got.shape != expected.shape:
        raise AssertionError(f"{got.shape} for {expected.shape}")
    rounding = torch.finfo(got.dtype).eps * expected.abs()
    accumulation = 4 * torch.finfo(torch.float32).eps * terms
    excess = (got.double() - expected).abs() - rounding - accumulation
    if torch.isnan(excess).any():
        raise AssertionError("an element was not written")
    if excess.numel() and excess.max() > 0:
        raise AssertionError(f"error {excess.max():.3e} beyond rounding")


def assert_same_bits(first: Tensor, second: Tensor, name: str = "result") -> None:
    """Two runs over the same operands."""
    if not torch.equal(first, second):
        raise AssertionError(f"{name}: two runs differ")


def _sums_of_magnitudes(o: LayerOperands, underflow: float = 0.0) -> dict[str, Tensor]:
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
