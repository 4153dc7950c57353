"""Registered operators ``fastbound::forward`` and ``fastbound::backward``.

    y  = x Wᵀ + b + S SBᵀ      or, over a base layer that computes x Wᵀ + b,      y = result + S SBᵀ

In the product form, y = x (W + ΔW)ᵀ + b or result + x ΔWᵀ (``operator/product.py``). The plan
decides whether Triton or PyTorch computes the products (factors, thin, low-rank GEMM, gradient
reductions). The operators are functional and opaque: ``torch.compile(fullgraph=True)``, export and
fake tensors see only their shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbound.dispatch.device import describe
from fastbound.operator.autograd import direct
from fastbound.operator.call import TERM_SCHEMA, Term
from fastbound.operator.dropout import keep_rate
from fastbound.operator.engine import Engine, Route, route_for
from fastbound.operator.product import Delta, adapted_gemm, factor_gradients
from fastbound.operator.trials import backward_trial, forward_trial
from fastbound.truth.formula import thin_dtype
from fastbound.truth.linear_algebra import without_autocast

# Kept for the life of the process: collecting a Library would leave dangling operators behind.
library = torch.library.Library("fastbound", "DEF")
library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? result,"
    f" {TERM_SCHEMA}) -> (Tensor y, Tensor S)"
)
library.define(
    "backward(Tensor dy, Tensor? x, Tensor? S, Tensor? weight, ScalarType dtype,"
    f" bool need_dx, bool need_dA, bool need_dB, {TERM_SCHEMA})"
    " -> (Tensor dx, Tensor dA, Tensor dB)"
)


def compute_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    result: Tensor | None,
    *adapter: Any,
    in_place: bool = False,
    engine: Engine | None = None,
) -> tuple[Tensor, Tensor]:
    """y and S of ``fastbound::forward``; with ``in_place``, y takes result's memory.

    ``engine`` None means the plan's engine.
    """
    x, weight, bias, result, A, B = in_memory(x, weight, bias, result, *adapter[:2])
    term = Term(A, B, *adapter[2:])
    with scope(x):
        X = rows(x)
        if engine is None:
            route = _route(X, weight, term, "forward")
            call = (compute_forward, X, weight, bias, result, term)
            engine = route.engine or route.decide(partial(forward_trial, route, *call))
        if term.form == "product":
            return _product_forward(x, X, weight, bias, result, term, in_place, engine)
        keep, scaling = kept(engine, term, X.shape[0])
        SA, SB = engine.factors(term.A, term.B, scaling, term.omega, X.dtype, term.R)
        S = engine.thin(X, SA.t(), keep)
        if weight is not None:
            return rows_as_of(x, engine.lowrank_gemm(X, _cast(weight, X.dtype), S, SB, bias)), S
        base = given(result)
        if base.dtype is not X.dtype:  # SB again from B, so that it is not rounded twice
            _, SB = engine.factors(term.A, term.B, scaling, term.omega, base.dtype, term.R)
        # One product with beta = 1 reads the base's result once and writes y once.
        S_wide = _cast(S, SB.dtype)
        if in_place:
            engine.add_lowrank(base.view(-1, base.shape[-1]), S_wide, SB, True)
            return base, S
        return rows_as_of(base, engine.add_lowrank(rows(base), S_wide, SB)), S


def compute_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    *adapter: Any,
    engine: Engine | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB, or None for what is not wanted.

    ``dtype`` is x's; over a base layer, dy has the dtype of its result. For ``engine`` see
    :func:`compute_forward`.
    """
    dy, x, S, weight, A, B = in_memory(dy, x, S, weight, *adapter[:2])
    term = Term(A, B, *adapter[2:])
    omega = term.omega
    dx = dA = dB = None
    with scope(dy):
        DY = rows(dy)
        if engine is None:
            route = _route(DY, weight, term, "backward")
            needs = (need_dx, need_dA, need_dB)
            X = None if x is None else rows(x)
            call = (compute_backward, DY, X, S, weight, dtype, needs, term)
            engine = route.engine or route.decide(partial(backward_trial, route, *call))
        if term.form == "product":
            return _product_backward(
                dy, DY, x, weight, dtype, need_dx, need_dA, need_dB, term, engine
            )
        keep, scaling = kept(engine, term, DY.shape[0])
        SA, SB = engine.factors(A, B, scaling, omega, DY.dtype, term.R)
        S = None if S is None else _cast(S, SB.dtype)
        DS, dB = dS_and_dB(engine, DY, SB, S, B, scaling, omega, need_dx or need_dA, need_dB)
        if dtype is not DY.dtype:
            DS = None if DS is None else _cast(DS, thin_dtype(dtype))
            SA, _ = engine.factors(A, B, scaling, omega, dtype, term.R) if need_dx else (SA, SB)
        if need_dx:
            if weight is None:
                DX = engine.lowrank_product(given(DS), SA.t(), dtype, keep)
            else:
                W = _cast(weight, DY.dtype)
                DX = engine.lowrank_gemm(DY, W.t(), given(DS), SA.t(), None, keep)
            dx = rows_as_of(dy, DX)
        if need_dA:
            X = rows(given(x))
            dA = engine.factor_gradient(X, given(DS), A.t(), omega, 1.0, keep).t()
    return dx, dA, dB


def _product_forward(
    x: Tensor,
    X: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    result: Tensor | None,
    term: Term,
    in_place: bool,
    engine: Engine,
) -> tuple[Tensor, Tensor]:
    delta = Delta(term.A, term.B, term.scaling, term.omega)
    S = X.new_empty(X.shape[0], 0, dtype=thin_dtype(X.dtype))
    if weight is not None:
        return rows_as_of(x, adapted_gemm(engine, X, weight, delta, bias)), S
    base = given(result)
    if in_place:
        adapted_gemm(engine, X, None, delta, start=base.view(-1, base.shape[-1]))
        return base, S
    start = rows(base).clone(memory_format=torch.contiguous_format)
    return rows_as_of(base, adapted_gemm(engine, X, None, delta, start=start)), S


def _product_backward(
    dy: Tensor,
    DY: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    term: Term,
    engine: Engine,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    delta = Delta(term.A, term.B, term.scaling, term.omega)
    dx = dA = dB = None
    if need_dx:
        W = None if weight is None else weight.t()
        dx = rows_as_of(dy, _cast(adapted_gemm(engine, DY, W, delta.t()), dtype))
    if need_dA or need_dB:
        dA, dB = factor_gradients(engine, DY, rows(given(x)), delta, need_dA, need_dB)
    return dx, dA, dB


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, result: Tensor | None, *adapter: Any
) -> tuple[Tensor, Tensor]:
    term = Term(*adapter)
    like = x.new_empty(*x.shape[:-1], term.B.shape[0]) if result is None else result
    y = like.new_empty(like.shape)  # contiguous, however a base's result is stored
    return y, x.new_empty(x.numel() // x.shape[-1], term.R, dtype=thin_dtype(x.dtype))


def _fake_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, dtype, need_dx, need_dA, need_dB, A, B, *_ = arguments
    dx = dy.new_empty(*dy.shape[:-1], A.shape[1], dtype=dtype) if need_dx else dy.new_empty(0)
    dA = torch.empty_like(A) if need_dA else dy.new_empty(0)
    dB = torch.empty_like(B) if need_dB else dy.new_empty(0)
    return dx, dA, dB


def with_empty(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """A backward for an operator, which must return tensors: empty ones in place of None."""

    def implementation(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(dy.new_empty(0) if g is None else g for g in backward(dy, *arguments))

    return implementation


for _device in ("CPU", "CUDA"):
    library.impl("forward", compute_forward, _device)
    library.impl("backward", with_empty(compute_backward), _device)
torch.library.register_fake("fastbound::forward", _fake_forward, lib=library)
torch.library.register_fake("fastbound::backward", _fake_backward, lib=library)

forward = direct(torch.ops.fastbound.forward.default, compute_forward)
backward = direct(torch.ops.fastbound.backward.default, compute_backward)


def add_in_place(x: Tensor, result: Tensor, *adapter: Any) -> Tensor:
    """:func:`forward` over a base's ``result``, written to its memory. Returns S; eager only."""
    return compute_forward(x, None, None, result, *adapter, in_place=True)[1]


def _route(T: Tensor, weight: Tensor | None, term: Term, part: str) -> Route:
    """The route for a tall matrix T [M, ·], in whose dtype the products are computed."""
    A, B = term.A, term.B
    rank, K = A.shape
    where = describe(T.device) if T.is_meta else T.device
    shape = (T.shape[0], B.shape[0], K, rank, T.dtype, term.backend, None, weight is None)
    how = (part, layout_of(T, weight), term.seed is not None, term.form == "product")
    return route_for(where, *shape, *how)


def layout_of(T: Tensor, weight: Tensor | None) -> str:
    """How T and the weight are stored: one of ``choices.LAYOUTS``."""
    if not T.is_contiguous():
        return "strided"
    if weight is None or weight.is_contiguous():
        return "rows"
    return "columns" if weight.t().is_contiguous() else "strided"


def dS_and_dB(
    engine: Engine,
    DY: Tensor,
    SB: Tensor,
    S: Tensor | None,
    B: Tensor,
    scaling: float,
    omega: float,
    need_dS: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dS [M, R] and dB [N, r], or None for what is not needed; dy is read once for both."""
    if not need_dB:
        return (engine.thin(DY, SB) if need_dS else None), None
    if not need_dS:
        return None, engine.factor_gradient(DY, given(S), B, omega, scaling)
    return engine.thin_and_factor_gradient(DY, SB, given(S), B, omega, scaling)


def rows(x: Tensor) -> Tensor:
    """x [..., K] as a matrix. Making a view takes a microsecond, so a matrix is returned as is."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def rows_as_of(x: Tensor, Y: Tensor) -> Tensor:
    """Y [M, N], whose rows are those of ``rows(x)``, as [..., N].

    Not as a view: a Function's output that is a view refuses all in-place operations.
    """
    return Y if x.dim() == 2 else Y.view(*x.shape[:-1], Y.shape[1]).detach()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def kept(engine: Engine, term: Term, M: int) -> tuple[Tensor | None, float]:
    """Dropout's mask as bits, and scaling / (1 - p): S itself is not divided by 1 - p."""
    if term.seed is None:
        return None, term.scaling
    keep = engine.keep_bits(term.seed, M, term.A.shape[1], term.dropout)
    return keep, term.scaling / keep_rate(term.dropout)


def scope(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off (operands have the compute dtype) and make x's device the current one."""
    autocast_off = without_autocast(x.device)
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return autocast_off
    entered = ExitStack()
    entered.enter_context(autocast_off)
    entered.enter_context(torch.cuda.device(x.device))
    return entered


def in_memory(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in a form whose memory a kernel can read directly; None stays None.

    PyTorch's lazy negative bit, and zero tensors without memory, are materialised. Raises
    RuntimeError for a tensor whose memory was released.
    """
    for tensor in tensors:
        if tensor is not None and (tensor.is_neg() or not tensor.data_ptr()):
            return tuple(None if t is None else _in_memory(t) for t in tensors)
    return tensors


def _in_memory(tensor: Tensor) -> Tensor:
    if tensor._is_zerotensor():
        return torch.zeros_like(tensor)
    if tensor.data_ptr() or not tensor.numel() or tensor.is_meta:
        return tensor.resolve_neg()
    raise RuntimeError(
        f"a tensor {list(tensor.shape)} has no memory: the wrapper that shards or offloads it did "
        "not gather it for this module. Make the module that owns it, or one that contains that "
        "module, the unit that is gathered"
    )


def given(saved: Tensor | None) -> Tensor:
    """A tensor that must not be None: a weight, a base's result, or what a gradient needs."""
    if saved is None:
        raise RuntimeError("fastbound: a tensor that the requested result needs is missing")
    return saved
