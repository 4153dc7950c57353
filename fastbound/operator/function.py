"""Autograd for the bounded linear operator: what is saved, what each gradient is.

S  = x sin(ωA)ᵀ                y  = x Wᵀ + b + S (s·sin ωB)ᵀ
dS = dy (s·sin ωB)             dx = dy W + dS sin(ωA)
dA = ω cos(ωA) ⊙ (dSᵀ x)       dB = s ω cos(ωB) ⊙ (dyᵀ S)        db = Σ dy

With dropout, x in S and in dA is mask ⊙ x, dS sin(ωA) is masked too, and s is s / (1 - p). The mask
is made again from its seed: neither it nor mask ⊙ x is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbound.dispatch.plan import BACKENDS
from fastbound.operator import ops
from fastbound.operator.dropout import check_dropout, draw_seed, keep_bits, keep_mask, keep_rate
from fastbound.operator.eager import apply_of
from fastbound.operator.partition import GATHER, partition
from fastbound.operator.transforms import differentiable_once, rows_alone
from fastbound.truth import formula as reference


class _BoundedLinear(torch.autograd.Function):
    """Saves x as it came, S [M, R] and references to the parameters; nothing of size [M, N]."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scaling: float,
        omega: float,
        backend: str,
        seed: Tensor | None,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        y, S = ops.forward(x, weight, bias, A, B, scaling, omega, backend, seed, dropout)
        return y, S

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        x = rows_alone(info, in_dims, arguments)
        y, S = _BoundedLinear.apply(x, *arguments[1:])
        return (y, S.view(info.batch_size, -1, S.shape[-1])), (0, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, A, B, bias, ctx.scaling, ctx.omega, ctx.backend, seed, ctx.dropout = inputs
        _, S = output
        ctx.mark_non_differentiable(S)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        _, _, need_dA, need_dB, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_dA else None, S if need_dB else None, weight, A, B, seed)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        x, S, weight, A, B, seed = ctx.saved_tensors
        need_dx, _, need_dA, need_dB, need_db, *_ = ctx.needs_input_grad
        dx = dA = dB = db = None
        if need_dx or need_dA or need_dB:
            dx, dA, dB = ops.backward(
                dy,
                x,
                S,
                weight,
                A,
                B,
                ctx.scaling,
                ctx.omega,
                ctx.backend,
                seed,
                ctx.dropout,
                need_dx,
                need_dA,
                need_dB,
            )
        if need_db:
            rows = dy.reshape(-1, dy.shape[-1])
            db = rows.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return (
            dx if need_dx else None,
            None,
            dA if need_dA else None,
            dB if need_dB else None,
            db,
            None,
            None,
            None,
            None,
            None,
        )


_apply = apply_of(_BoundedLinear)


def bounded_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    omega: float = 1.0,
    backend: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """``y = x weightᵀ + bias + scaling · (x sin(omega·A)ᵀ) sin(omega·B)ᵀ`` with weight frozen.

    Args:
        x: [..., K], any strides; fp32, fp16, bf16 or fp64.
        weight: [N, K], any strides, frozen; x's dtype, or any under autocast.
        A: [r, K], trained; any floating dtype, fp32 advised: the sine is taken in fp32.
        B: [N, r], trained.
        bias: [N] or None; receives a gradient if it asks for one.
        scaling: s; every |ΔW| entry is at most ``scaling * r``.
        omega: the frequency inside both sines.
        backend: "auto" (``fastbound.explain`` says what it chose), "fused", "split", "torch", or
            "reference" (the formula under autograd).
        dropout: p; above 0 the low-rank term takes drop(x): elements of x are zero with probability
            p and the others x / (1 - p). The mask is drawn from the device's default generator.

    Returns:
        [..., N] in the compute dtype: autocast's where autocast is on, else x's.

    Accumulation is in fp32 (fp64 for fp64) and two runs give the same bits. The gradient is
    differentiable once.

    Raises:
        TypeError: a non-floating tensor, or x and weight of different dtypes outside autocast.
        ValueError: shapes that do not match, tensors on different devices, a weight that requires
            grad, a tensor that is spread over processes or has no storage, a scaling or omega that
            is not finite, a dropout outside 0 <= p < 1, an unknown backend.
    """
    check_operands(x, weight, A, B, bias, scaling, omega, backend)
    seed = draw_seed(x.device) if check_dropout(dropout) else None
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    elif x.dtype is not weight.dtype:
        raise TypeError(
            f"x is {x.dtype} and weight is {weight.dtype}: cast one of them, or use torch.autocast"
        )
    if backend == "reference":
        with torch.autocast(device_type, enabled=False):
            dtype = x.dtype
            b = None if bias is None else bias.to(dtype)
            keep = None
            if seed is not None:
                M, K = x.numel() // x.shape[-1], x.shape[-1]
                keep = keep_mask(keep_bits(seed, M, K, dropout), K).view(x.shape)
                scaling = scaling / keep_rate(dropout)
            return reference.bounded_linear(
                x, weight.to(dtype), A, B, b, scaling=scaling, omega=omega, keep=keep
            )
    y, _ = _apply(
        x, weight, A, B, bias, float(scaling), float(omega), backend, seed, float(dropout)
    )
    return y


def check_operands(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    omega: float,
    backend: str,
) -> None:
    """Raise what :func:`bounded_linear` documents, before any work is done."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    # Not math.isfinite: torch.compile traces this with symbolic floats. inf - inf is a NaN.
    if scaling - scaling != 0 or omega - omega != 0:
        raise ValueError(f"scaling and omega must be finite, got {scaling} and {omega}")
    device = x.device
    for name, tensor in (("x", x), ("weight", weight), ("A", A), ("B", B), ("bias", bias)):
        if tensor is None:
            continue
        spread = partition(tensor)
        if spread is not None:
            raise ValueError(f"{name} {spread}: {GATHER}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: expected a floating dtype")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and x on {device}: move one of them")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no storage: load it first")
    if weight.dim() != 2 or A.dim() != 2 or B.dim() != 2 or x.dim() < 1:
        raise ValueError(
            "expected x [..., K], weight [N, K], A [r, K], B [N, r]; got "
            f"x {list(x.shape)}, weight {list(weight.shape)}, A {list(A.shape)}, B {list(B.shape)}"
        )
    (N, K), (rank, K_of_A), (N_of_B, rank_of_B) = weight.shape, A.shape, B.shape
    if x.shape[-1] != K:
        raise ValueError(f"x {list(x.shape)} does not match weight {list(weight.shape)}: K differs")
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got A {list(A.shape)}")
    if K_of_A != K:
        raise ValueError(f"A {list(A.shape)} does not match weight {list(weight.shape)}: K differs")
    if N_of_B != N:
        raise ValueError(f"B {list(B.shape)} does not match weight {list(weight.shape)}: N differs")
    if rank_of_B != rank:
        raise ValueError(f"B {list(B.shape)} does not match A {list(A.shape)}: rank differs")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise ValueError(
            f"bias {list(bias.shape)} does not match weight {list(weight.shape)}: expected [{N}]"
        )
    if weight.requires_grad:
        raise ValueError(
            "weight requires grad, but the operator returns no gradient for it: "
            "call weight.requires_grad_(False), or train it through a plain layer"
        )
