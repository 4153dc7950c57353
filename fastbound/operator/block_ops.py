"""Registered operators ``fastbound::mlp_forward`` and ``mlp_backward``: a whole MLP block.

    h = f(x Wgᵀ + …) ⊙ (x Wuᵀ + …)      y = h Wdᵀ + …      each projection with its adapter's term

A plain block has no ``up``; its first projection takes the place of ``gate``. The thin products
share one width R, the largest padded rank of the three, and lie side by side if one pass computes
two of them. The product form has no thin products: each projection's W + ΔW is made and used in
turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastbound.dispatch.defaults import padded_rank
from fastbound.dispatch.entries import block_form
from fastbound.dispatch.plan import PlanKey, plan_key
from fastbound.hook import after_import
from fastbound.operator import flops
from fastbound.operator.autograd import direct
from fastbound.operator.call import BLOCK_SCHEMA, SETTINGS, BlockCall, Factors
from fastbound.operator.engine import Engine, Route, route_for
from fastbound.operator.ops import given, in_memory, layout_of, library, rows, rows_as_of, scope
from fastbound.operator.product import Delta, adapted_gemm, factor_gradients
from fastbound.operator.trials import block_backward_trial, block_forward_trial
from fastbound.truth.formula import Projection, thin_dtype

library.define(
    f"mlp_forward(Tensor x, {BLOCK_SCHEMA})"
    " -> (Tensor y, Tensor G, Tensor U, Tensor S, Tensor S_down)"
)
library.define(
    "mlp_backward(Tensor dy, Tensor x, Tensor? G, Tensor? U, Tensor S, Tensor S_down, bool need_dx,"
    # Not a list of tensors: torch.func.vmap does not accept one from an operator.
    f" {BLOCK_SCHEMA}) -> (Tensor dx, Tensor dA_gate, Tensor dB_gate,"
    " Tensor dA_up, Tensor dB_up, Tensor dA_down, Tensor dB_down)"
)


def block_key(
    device: torch.device,
    M: int,
    N: int,
    K: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    backend: str,
    form: str,
    part: str = "forward",
    layout: str = "rows",
    product: bool = False,
) -> PlanKey:
    """The key of a block: that of a layer with twice its widest padded rank, for gate and up.

    ``form`` is the block's :func:`fastbound.dispatch.entries.block_form`.
    """
    R = padded_rank(max(ranks, default=1))
    sizes = (M, N, K, 2 * R, dtype)
    return plan_key(device, *sizes, backend, form, part=part, layout=layout, product=product)


def block_route(X: Tensor, call: BlockCall, part: str) -> Route:
    """The route of a call over X [M, K]."""
    N, K = call.gate.weight.shape
    form = block_form(call.activation, call.up is not None)
    key = (X.device, X.shape[0], N, K, call.ranks, X.dtype, call.backend, form)
    how = (part, layout_of(X, call.gate.weight), call.form == "product")
    return route_for(*block_key(*key, *how))


class ReadyBlock:
    """The operands of one call in the compute dtype, and the engine that computes its products."""

    def __init__(self, X: Tensor, call: BlockCall, engine: Engine) -> None:
        self.R, self.engine, self.product = call.R, engine, call.form == "product"
        self.gate, self.down = self._ready(call.gate, X.dtype), self._ready(call.down, X.dtype)
        self.up = None if call.up is None else self._ready(call.up, X.dtype)

    def _ready(self, p: Projection, dtype: torch.dtype) -> Factors:
        SA = SB = None
        if p.A is not None and p.B is not None and not self.product:
            SA, SB = self.engine.factors(p.A, p.B, p.scaling, p.omega, dtype, self.R)
        return Factors(p.weight.to(dtype), p.bias, p.A, p.B, SA, SB, p.scaling, p.omega)

    def first(self) -> list[Factors]:
        """gate and up, or the first projection of a plain block."""
        return [p for p in (self.gate, self.up) if p is not None]

    def stacked_SA(self) -> Tensor | None:
        """SA of gate and up, if adapted, one below the other: [WIDTH, K]; None if neither is."""
        adapted = [p.SA for p in self.first() if p.SA is not None]
        if not adapted:
            return None
        return adapted[0] if len(adapted) == 1 else torch.cat(adapted)

    def preactivations(self, X: Tensor, S: Tensor) -> tuple[Tensor, Tensor | None]:
        """G and U, each X Wᵀ + S SBᵀ + b with its own columns of S; no U for a plain block."""
        made, column = [], 0
        for p in self.first():
            part = None if p.SB is None else S[:, column : column + self.R]
            column += 0 if p.SB is None else self.R
            made.append(self.output(X, p, part))
        return made[0], made[1] if len(made) > 1 else None

    def output(self, X: Tensor, p: Factors, S: Tensor | None) -> Tensor:
        """A projection's y = X (W + ΔW)ᵀ + bias, where S = X SAᵀ."""
        if self.product and p.A is not None:
            return adapted_gemm(self.engine, X, p.weight, _delta(p), p.bias)
        return self._gemm(X, p.weight, S, p.SB, p.bias)

    def input_gradient(
        self, DY: Tensor, p: Factors, DS: Tensor | None, SA: Tensor | None
    ) -> Tensor:
        """A projection's dX = DY (W + ΔW), where DS = DY SB.

        DS and SA may be those of gate and up together: the result then includes both their terms.
        """
        if self.product and p.A is not None:
            return adapted_gemm(self.engine, DY, p.weight.t(), _delta(p).t())
        return self._gemm(DY, p.weight.t(), DS, None if SA is None else SA.t(), None)

    def add_input_gradient(self, DX: Tensor, DY: Tensor, p: Factors) -> None:
        """DX += DY W, or DX += DY (W + ΔW) in the product form."""
        if self.product and p.A is not None:
            adapted_gemm(self.engine, DY, p.weight.t(), _delta(p).t(), start=DX)
        else:
            DX.addmm_(DY, p.weight)

    def product_gradients(
        self, DY: Tensor, X: Tensor, p: Factors | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """A projection's dA and dB in the product form; None if it has no adapter."""
        if p is None or p.A is None:
            return None, None
        return factor_gradients(self.engine, DY, X, _delta(p))

    def _gemm(
        self, X: Tensor, W: Tensor, S: Tensor | None, F: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """``X Wᵀ + S Fᵀ + bias``, without the low-rank term if S or F is None."""
        if S is None or F is None:
            return linear(X, W, None if bias is None else bias.to(X.dtype))
        return self.engine.lowrank_gemm(X, W, S, F, bias)


def _delta(p: Factors) -> Delta:
    return Delta(given(p.A), given(p.B), p.scaling, p.omega)


def compute_forward(
    x: Tensor, *arguments: Any, engine: Engine | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, G, U, S and S_down of ``mlp_forward``; those that are not there are empty.

    ``engine`` None means the plan's engine.
    """
    call = _readable_call(arguments)
    (x,) = in_memory(x)
    with scope(x):
        X = rows(x)
        if engine is None:
            route = block_route(X, call, "forward")
            trial = partial(block_forward_trial, route, compute_forward, X, call)
            engine = route.engine or route.decide(trial)
        block = ReadyBlock(X, call, engine)
        down, SA = block.down, block.stacked_SA()
        if SA is None:
            S = X.new_empty(X.shape[0], 0, dtype=thin_dtype(X.dtype))
        else:
            S = block.engine.thin(X, SA.t())
        G, U = block.preactivations(X, S)
        H, S_down = block.engine.activate(G, U, down.SA, call.activation)
        Y = block.output(H, down, S_down)
        U = X.new_empty(0) if U is None else U
        S_down = S.new_empty(0) if S_down is None else S_down
        return rows_as_of(x, Y), G, U, S, S_down


def compute_backward(
    dy: Tensor,
    x: Tensor,
    G: Tensor | None,
    U: Tensor | None,
    S: Tensor,
    S_down: Tensor,
    need_dx: bool,
    *arguments: Any,
    engine: Engine | None = None,
) -> tuple[Tensor, ...]:
    """dx, and dA and dB of gate, up and down; those that are not wanted are empty.

    For ``engine`` see :func:`compute_forward`.
    """
    call = _readable_call(arguments)
    dy, x, G, U, S, S_down = in_memory(dy, x, G, U, S, S_down)
    with scope(dy):
        X, DY = rows(x).to(dy.dtype), rows(dy)
        if engine is None:
            route, saved = block_route(X, call, "backward"), (G, U, S, S_down)
            made = (route, compute_backward, DY, X, saved, need_dx, call)
            engine = route.engine or route.decide(partial(block_backward_trial, *made))
        block = ReadyBlock(X, call, engine)
        if G is None:
            G, U = block.preactivations(X, S)
        backward = _product_backward if block.product else _factors_backward
        DG, DU, DS, gradients = backward(block, X, DY, G, U, S, S_down, call.activation)
        dx = dy.new_empty(0)
        if need_dx:
            DX = block.input_gradient(DG, block.gate, DS, block.stacked_SA())
            if block.up is not None:
                block.add_input_gradient(DX, given(DU), block.up)
            dx = rows_as_of(dy, DX)
    return dx, *(dy.new_empty(0) if g is None else g for g in gradients)


# DG, DU and [DS_G | DS_U] (None if there is none), and dA and dB of gate, up and down.
_Backward: TypeAlias = "tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor | None, ...]]"


def _factors_backward(
    block: ReadyBlock,
    X: Tensor,
    DY: Tensor,
    G: Tensor,
    U: Tensor | None,
    S: Tensor,
    S_down: Tensor,
    activation: str,
) -> _Backward:
    engine, gate, up, down, R = block.engine, block.gate, block.up, block.down, block.R
    DS_down = dB_down = None
    if down.B is not None:
        DS_down, dB_down = engine.thin_and_factor_gradient(
            DY, given(down.SB), S_down, down.B, down.omega, down.scaling
        )
    DH = block.input_gradient(DY, down, DS_down, down.SA)
    DG, DU, DS, dB_gate, dB_up, dA_down = engine.activate_backward(
        DH, G, U, S, DS_down, gate, up, down, activation, R
    )
    del DH
    dA_gate, dA_up = engine.stacked_factor_gradients(X, DS, gate, up, R)
    return DG, DU, DS, (dA_gate, dB_gate, dA_up, dB_up, dA_down, dB_down)


def _product_backward(
    block: ReadyBlock,
    X: Tensor,
    DY: Tensor,
    G: Tensor,
    U: Tensor | None,
    S: Tensor,
    S_down: Tensor,
    activation: str,
) -> _Backward:
    engine = block.engine
    H, _ = engine.activate(G, U, None, activation)
    of_down = block.product_gradients(DY, H, block.down)
    del H
    DH = block.input_gradient(DY, block.down, None, None)
    gate, down = _bare(block.gate), _bare(block.down)
    up = None if block.up is None else _bare(block.up)
    DG, DU, *_ = engine.activate_backward(DH, G, U, S, None, gate, up, down, activation, block.R)
    del DH
    of_gate = block.product_gradients(DG, X, block.gate)
    of_up = (None, None) if DU is None else block.product_gradients(DU, X, block.up)
    return DG, DU, None, (*of_gate, *of_up, *of_down)


def _bare(p: Factors) -> Factors:
    """The projection without its factors, so that nothing asks for their gradients."""
    return p._replace(A=None, B=None)


def _readable_call(arguments: Sequence[Any]) -> BlockCall:
    tensors, settings = arguments[:-SETTINGS], arguments[-SETTINGS:]
    return BlockCall.of((*in_memory(*tensors), *settings))


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = BlockCall.of(arguments)
    M, N = x.numel() // x.shape[-1], call.gate.weight.shape[0]
    thin = thin_dtype(x.dtype)
    R = 0 if call.form == "product" else call.R
    width = R * sum(p is not None and p.A is not None for p in (call.gate, call.up))
    return (
        x.new_empty(*x.shape[:-1], call.down.weight.shape[0]),
        x.new_empty(M, N),
        x.new_empty(0) if call.up is None else x.new_empty(M, N),
        x.new_empty(M, width, dtype=thin),
        x.new_empty((0,) if call.down.A is None or not R else (M, R), dtype=thin),
    )


def _fake_backward(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, _, need_dx, *block = arguments
    projections = BlockCall.of(block).projections()
    factors = [f for p in projections for f in ((None, None) if p is None else (p.A, p.B))]
    dx = dy.new_empty(*dy.shape[:-1], x.shape[-1]) if need_dx else dy.new_empty(0)
    return dx, *(dy.new_empty(0) if f is None else torch.empty_like(f) for f in factors)


for _device in ("CPU", "CUDA"):
    library.impl("mlp_forward", compute_forward, _device)
    library.impl("mlp_backward", compute_backward, _device)
torch.library.register_fake("fastbound::mlp_forward", _fake_forward, lib=library)
torch.library.register_fake("fastbound::mlp_backward", _fake_backward, lib=library)

after_import("torch.utils.flop_counter", flops.register)

mlp_forward = direct(torch.ops.fastbound.mlp_forward.default, compute_forward)
mlp_backward = direct(torch.ops.fastbound.mlp_backward.default, compute_backward)
