"""Autograd for the bounded linear operator: what is saved, and each gradient.

S  = x sin(ωA)ᵀ                y  = x Wᵀ + b + S (s·sin ωB)ᵀ        or  y = result + S (s·sin ωB)ᵀ
dS = dy (s·sin ωB)             dx = dy W + dS sin(ωA)               or  dx = dS sin(ωA)
dA = ω cos(ωA) ⊙ (dSᵀ x)       dB = s ω cos(ωB) ⊙ (dyᵀ S)           db = Σ dy      dresult = dy

``result`` is the output of another layer, the base, for x; the base stays a black box, and the
adapter's term is added to its result. In the product form y = x (W + ΔW)ᵀ + b; there is no S, and
only x is saved (``operator/product.py``).

With dropout, mask ⊙ x replaces x in S and in dA, dS sin(ωA) is masked too, and s / (1 - p) replaces
s. The mask is recomputed from its seed: neither it nor mask ⊙ x is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbound.operator import ops
from fastbound.operator.autograd import (
    apply_of,
    differentiable_once,
    nothing_intercepts,
    plain,
    rows_alone,
)
from fastbound.operator.call import Term, autocast_to, check_operands
from fastbound.operator.dropout import check_dropout, draw_seed, keep_bits, keep_mask, keep_rate
from fastbound.truth import formula

# Nodes of the autograd graph that keep no reference to their results.
_VIEWS = frozenset({"AsStridedBackward0", "UnsafeViewBackward0", "ViewBackward0"})
_KEEP_NO_RESULT = frozenset(
    {
        "AddBackward0",
        "AddmmBackward0",
        "LinearBackward0",
        "MatMul4BitBackward",
        "MatMul8bitFpBackward",
        "MatMul8bitLtBackward",
        "MmBackward0",
        "ToCopyBackward0",
    }
)


class _BoundedLinear(torch.autograd.Function):
    """Saves x unchanged, S [M, R] and references to the parameters, but nothing of size [M, N]."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        result: Tensor | None,
        in_place: bool,
        *adapter: Any,
    ) -> tuple[Tensor, Tensor]:
        if result is not None and in_place:
            S = ops.add_in_place(x, result, *adapter)
            # The same memory as a new tensor. mark_dirty would make autograd copy dy if result is a
            # view, as a linear layer's result is for any three-dimensional x.
            return result.detach(), S
        y, S = ops.forward(x, weight, bias, result, *adapter)
        return y, S

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        x = rows_alone(info, in_dims, arguments)
        y, S = _BoundedLinear.apply(x, *arguments[1:])
        size = info.batch_size
        return (y, S.unflatten(0, (size, len(S) // size))), (0, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, _, _, *adapter = inputs
        term = Term(*adapter)
        A, B, seed = term.A, term.B, term.seed
        ctx.settings = (term.scaling, term.omega, term.backend)
        ctx.dropout, ctx.form = term.dropout, term.form
        _, S = output
        ctx.mark_non_differentiable(S)
        ctx.set_materialize_grads(False)
        ctx.dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        need_dA, need_dB = ctx.needs_input_grad[5:7]
        if term.form == "product":
            need_dA, need_dB = need_dA or need_dB, False
        ctx.save_for_backward(x if need_dA else None, S if need_dB else None, weight, A, B, seed)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        dx = db = dresult = dA = dB = None
        if dy is not None:
            x, S, weight, A, B, seed = ctx.saved_tensors
            need_dx, _, need_db, need_dresult, _, need_dA, need_dB, *_ = ctx.needs_input_grad
            if need_dx or need_dA or need_dB:
                needs = (need_dx, need_dA, need_dB)
                adapter = (A, B, *ctx.settings, seed, ctx.dropout, ctx.form)
                dx, dA, dB = ops.backward(dy, x, S, weight, ctx.dtype, *needs, *adapter)
                dx, dA, dB = (
                    dx if need_dx else None,
                    dA if need_dA else None,
                    dB if need_dB else None,
                )
            if need_db:
                rows = dy.reshape(-1, dy.shape[-1])
                wide = torch.promote_types(dy.dtype, torch.float32)
                db = rows.sum(0, dtype=wide).to(ctx.bias_dtype)
            dresult = dy if need_dresult else None
        return dx, None, db, dresult, None, dA, dB, *(None,) * (len(Term._fields) - 2)


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
    form: str = "factors",
) -> Tensor:
    """``y = x (weight + ΔW)ᵀ + bias`` with weight frozen and ΔW bounded, in one of two forms.

        factors    ΔW = scaling · sin(omega·B) sin(omega·A)      |ΔW| <= scaling · r
        product    ΔW = scaling · sin(omega·B A)                 |ΔW| <= scaling

    Accumulation is in fp32 (fp64 for fp64), and two runs give the same bits. A second derivative
    raises RuntimeError, unless the backend is "reference".

    Args:
        x: [..., K], any strides; fp32, fp16, bf16 or fp64.
        weight: [N, K], any strides, frozen; x's dtype, or any dtype under autocast.
        A: [r, K], trained; any floating dtype. fp32 is advised, since the sine is taken in fp32.
        B: [N, r], trained; as for A.
        bias: [N] or None; receives a gradient if it requires one.
        scaling: s.
        omega: ω, the frequency inside the sines.
        backend: "auto" (``fastbound.explain`` tells what it chose), "fused", "split", "torch", or
            "reference" (the formula under autograd).
        dropout: p. Above 0, the low-rank term takes drop(x), whose elements are 0 with probability
            p and x / (1 - p) otherwise. The mask is drawn from the device's default generator.
        form: "factors", whose ΔW has rank r and is never materialised, or "product", whose ΔW has
            full rank: W + ΔW is made a few rows at a time, used and dropped. "product" does not
            support dropout.

    Returns:
        [..., N] in the compute dtype: autocast's if autocast is on, else x's.

    Raises:
        TypeError: a tensor is not floating or not dense, or x and weight have different dtypes
            outside autocast.
        ValueError: shapes do not match; tensors are on different devices; weight requires grad; a
            tensor is partitioned over processes or has no storage; scaling or omega is not finite;
            dropout is outside 0 <= p < 1; backend or form is unknown; a backend other than "auto"
            cannot run these operands on this device; or form="product" is combined with dropout or
            backend="fused".
    """
    term = Term(A, B, float(scaling), float(omega), backend, None, check_dropout(dropout), form)
    check_operands(x, term, weight=weight, bias=bias)
    dtype = autocast_to(x.dtype, x.device)
    if dtype is None and x.dtype is not weight.dtype:
        raise TypeError(
            f"x is {x.dtype} and weight is {weight.dtype}: cast one of them, or use torch.autocast"
        )
    return _call(x, weight, bias, None, False, term, dtype)


def bounded_addition(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float = 1.0,
    omega: float = 1.0,
    backend: str = "auto",
    dropout: float = 0.0,
    form: str = "factors",
    give_up: bool = False,
) -> Tensor:
    """``y = result + x ΔWᵀ`` for a base layer's result, with the ΔW of ``bounded_linear``.

    S = x sin(omega·A)ᵀ, and x ΔWᵀ in the product form, are computed in x's compute dtype
    (autocast's if autocast is on, else x's own), and S (s·sin omega·B)ᵀ in result's dtype. All
    accumulate in fp32 (fp64 for fp64). A second derivative raises RuntimeError, unless the backend
    is "reference".

    Args:
        result: [..., N], the base layer's output for x; any floating dtype.
        x: [..., K], the base layer's input; its dtype may differ from result's.
        A, B: [r, K] and [N, r], trained; any floating dtype, fp32 advised.
        scaling, omega, dropout, form: as for :func:`fastbound.bounded_linear`.
        backend: as there, but not "fused".
        give_up: the caller no longer needs ``result``, so y may take its memory if
            :func:`can_write_into` finds that safe.

    Returns:
        y [..., N] in result's dtype.

    Raises:
        TypeError: a tensor is not floating or not dense.
        ValueError: shapes do not match; tensors are on different devices; a tensor is partitioned
            over processes or has no storage; scaling or omega is not finite; dropout is outside
            0 <= p < 1; backend is unknown or "fused"; form is unknown; or form="product" is
            combined with dropout.
    """
    term = Term(A, B, float(scaling), float(omega), backend, None, check_dropout(dropout), form)
    check_operands(x, term, result=result)
    in_place = give_up and plain(x, A, B) and can_write_into(result, x)
    return _call(x, None, None, result, in_place, term, autocast_to(x.dtype, x.device))


def _call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    result: Tensor | None,
    in_place: bool,
    term: Term,
    dtype: torch.dtype | None,
) -> Tensor:
    """Run a checked call: draw dropout's seed, and cast x to autocast's ``dtype`` if it is on."""
    if term.dropout:
        term = term._replace(seed=draw_seed(x.device))
    if dtype is not None:
        x = x.to(dtype)
    if term.backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return _by_the_formula(x, weight, bias, result, term)
    y, _ = _apply(x, weight, bias, result, in_place, *term)
    return y


def _by_the_formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, result: Tensor | None, term: Term
) -> Tensor:
    A, B, scaling, omega, _, seed, dropout, form = term
    keep = None
    if seed is not None:
        M, K = x.numel() // x.shape[-1], x.shape[-1]
        keep = keep_mask(keep_bits(seed, M, K, dropout), K).view(x.shape)
        scaling = scaling / keep_rate(dropout)
    if weight is None:
        return formula.bounded_addition(
            ops.given(result), x, A, B, scaling=scaling, omega=omega, form=form, keep=keep
        )
    b = None if bias is None else bias.to(x.dtype)
    return formula.bounded_linear(
        x, weight.to(x.dtype), A, B, b, scaling=scaling, omega=omega, form=form, keep=keep
    )


def can_write_into(result: Tensor, x: Tensor) -> bool:
    """Whether y may take result's memory, as far as the tensors themselves can tell.

    It may not under torch.compile, functorch or a dispatch mode (selective checkpointing keeps
    outputs); nor if result is a subclass, a parameter or a trained leaf, a part of a larger tensor,
    an expanded tensor or x itself; nor if the node that made it may keep it for its backward.
    """
    if not nothing_intercepts() or type(result) is not Tensor or result.is_neg():
        return False
    storage = result.untyped_storage()
    if not result.is_contiguous() or storage.nbytes() != result.numel() * result.itemsize:
        return False
    if storage.data_ptr() == x.untyped_storage().data_ptr():
        return False
    node: Any = result.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is None:
        return not result.requires_grad
    return node.name() in _KEEP_NO_RESULT
