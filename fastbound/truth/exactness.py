"""The measures of error: how exact a result must be, and how exact the plain formula is.

The truth is the formula in fp64 on the same numbers. A path passes if its error against the truth
is at most that of the plain formula in the same dtype, plus a slack of a few roundings. A kernel
passes if it is within rounding of its product in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastbound.truth import formula
from fastbound.truth.operands import BlockOperands, LayerOperands, Operands, run

# The relative Frobenius errors above which a result is wrong: about ten times what the roundings of
# the dtype explain, and a tenth of the error of a forgotten sine or factor.
CORRECT = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 2**-12}
ROWS_AT_ONCE = 1024  # in fp64, so that the truth of 32k tokens does not fill the card


def assert_as_exact_as_the_formula(
    o: LayerOperands,
    function: Callable[..., Tensor],
    formula: Callable[..., Tensor] = formula.bounded_linear,
    **kwargs: Any,
) -> None:
    """Assert that each result's error is at most the plain formula's in the same dtype, plus slack.

    The slack is four roundings of the compute dtype at the largest entry, plus two fp32 roundings
    at the largest sum of magnitudes: both errors are maxima over possibly few entries, and a sum
    that cancels is rounded in another order than the formula's. It also includes the dtype's
    smallest number, half of it for the result and once for each term of the low-rank sum, because
    one operand of a term may have underflowed while the other is near one.

    Raises AssertionError, naming the result and its error.
    """
    rounding, fp32_rounding = torch.finfo(o.x.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    smallest = torch.finfo(o.x.dtype).smallest_normal * torch.finfo(o.x.dtype).eps
    sums = _sums_of_magnitudes(o.to(torch.float64))
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
        slack += (o.A.shape[0] + 0.5) * smallest
        if not error <= eager_error + slack:  # a NaN fails too
            raise AssertionError(
                f"{name}: error {error:.3e}, the plain formula's {eager_error:.3e}, "
                f"slack {slack:.3e}"
            )


def assert_block_as_exact(
    block: BlockOperands, function: Callable[..., Tensor], **kwargs: Any
) -> None:
    """Assert that the error's norm is at most the plain formula's in the dtype plus six roundings.

    It is a norm and not a maximum because h, dg and du are rounded elsewhere than in autograd, so
    the two errors are equal in distribution but not entry by entry. Six, because at rank one there
    are few numbers, each the result of six roundings (S, y, dh, dg, dS and dA).

    Raises AssertionError, naming the result and its error.
    """
    ours = run(block, function, **kwargs)
    plain = run(block, formula.bounded_mlp)
    expected = run(block.to(torch.float64), formula.bounded_mlp)
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
    """Assert an error of at most one rounding of the output dtype plus four of fp32 at ``terms``.

    ``terms`` is the sum of the magnitudes of each element's terms. Raises AssertionError.
    """
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
    """Assert that two runs over the same operands gave the same bits."""
    if not torch.equal(first, second):
        raise AssertionError(f"{name}: two runs differ")


def assert_same_results(first: Mapping[str, Tensor], *others: Mapping[str, Tensor]) -> None:
    """Assert that all calls over the same operands gave the same bits, each by name."""
    for other in others:
        for name, value in first.items():
            assert_same_bits(value, other[name], name)


def exact(o: Operands, checked: slice | Tensor) -> dict[str, Tensor]:
    """y and dx in fp64 for the checked rows of x [M, K], and the gradients of the trained tensors.

    Those gradients are sums over all rows, of which `ROWS_AT_ONCE` are taken at a time.
    """
    alone = o.formula if isinstance(o, BlockOperands) else _without_the_weight
    o = o.changed(lambda name, t: t if name in ("x", "dy") else t.double())
    found = run(o.rows(checked).to(torch.float64), o.formula)
    sums = {name: torch.zeros_like(found[name]) for name in o.trained}
    for start in range(0, o.x.shape[0], ROWS_AT_ONCE):
        part = run(o.rows(slice(start, start + ROWS_AT_ONCE)).to(torch.float64), alone)
        for name, gradient in sums.items():
            gradient += part[name]
    return {"y": found["y"], "dx": found["dx"], **sums}


def _without_the_weight(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, **settings: Any
) -> Tensor:
    """The layer without x Wᵀ, on which the gradients of A, B and b do not depend."""
    rest = x.new_zeros(len(weight)) if bias is None else bias
    return formula.bounded_addition(rest, x, A, B, **settings)


def require_truth(name: str, value: Tensor, truth: Tensor, tolerance: float) -> None:
    """Raise ArithmeticError if a result's relative error is above ``tolerance``."""
    error = float((value.double() - truth).norm() / truth.norm())
    if not error <= tolerance:  # a NaN fails too
        raise ArithmeticError(f"{name} is off by {error:.2e} (relative), more than {tolerance:.2e}")


def _sums_of_magnitudes(o: LayerOperands) -> dict[str, Tensor]:
    """The formula with every term replaced by its magnitude, which cancellation would hide."""
    x, W, dy = (t.abs().reshape(-1, t.shape[-1]) for t in (o.x, o.weight, o.dy))
    if o.form == "product":
        return _of_product(o, x, W, dy)
    SA = torch.sin(o.omega * o.A).abs()
    SB = o.scaling * torch.sin(o.omega * o.B).abs()
    S, dS = x @ SA.T, dy @ SB
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


def _of_product(o: LayerOperands, x: Tensor, W: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The same for the product form, where the roundings of ω·BA's terms carry over to its sine."""
    sine = o.scaling * (1 + o.omega * (o.B.abs() @ o.A.abs()))  # [N, K]
    dZ = o.omega * sine * (dy.T @ x)
    sums = {
        "y": x @ (W + sine).T,
        "dx": dy @ (W + sine),
        "dA": o.B.abs().T @ dZ,
        "dB": dZ @ o.A.abs().T,
    }
    if o.bias is not None:
        sums["y"] += o.bias.abs()
        sums["db"] = dy.sum(0)
    return sums
