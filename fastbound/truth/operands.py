"""Operands and the measures of error that the tests and the check on a GPU share.

Truth is the formula in fp64 over the same numbers. A path passes when its error against the truth
is no larger than the plain formula's in the same dtype, plus a slack of a few roundings; a kernel,
when it is within rounding of its product in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastbound.truth import formula as reference

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
    device: str | torch.device = "cpu",
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


def run(o: Operands, function: Callable[..., Tensor], **kwargs: Any) -> dict[str, Tensor]:
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


def assert_as_exact_as_the_formula(
    o: Operands,
    function: Callable[..., Tensor],
    formula: Callable[..., Tensor] = reference.bounded_linear,
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


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty, empty_like and new_empty give NaN: an element that nothing writes is seen."""

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


@contextmanager
def interpreted_bf16() -> Iterator[None]:
    """Mends bf16 in Triton's interpreter, which keeps it as uint16.

    Its dot multiplies the bits: it is given the values, the upper half of an fp32. Its cast from
    fp32 drops the lower half: it is made to round to the nearest, ties to even, as a GPU does.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    original_cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return original_cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        kept = np.where(np.isnan(src.data), (bits >> 16).astype(np.uint16) | 0x40, nearest)
        return TensorHandle(kept.astype(np.uint16), tl.bfloat16)

    with (
        mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        mock.patch.object(InterpreterBuilder, "cast_impl", cast_impl),
    ):
        yield


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
