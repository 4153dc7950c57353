"""Registered operators ``fastbound::mlp_forward`` and ``mlp_backward``: a whole MLP block.

    h = f(x Wgᵀ + …) ⊙ (x Wuᵀ + …)      y = h Wdᵀ + …      each projection with its low-rank term

A plain block has no ``up``; its first projection stands in the place of ``gate``. The thin products
share one width R, the largest padded rank of the three, and stand side by side where one pass makes
two of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastbound.dispatch.entries import block_form
from fastbound.dispatch.plan import Plan, plan_for
from fastbound.operator.eager import direct
from fastbound.operator.ops import check_storage, rows, rows_as_of, scope
from fastbound.operator.torch_block_engine import TorchMLPProducts
from fastbound.operator.torch_engine import padded_rank

if TYPE_CHECKING:
    from fastbound.operator.triton_block_engine import TritonMLPProducts

_PROJECTION = "Tensor? {0}_weight, Tensor? {0}_bias, Tensor? {0}_A, Tensor? {0}_B"
_BLOCK = ", ".join(_PROJECTION.format(name) for name in ("gate", "up", "down"))
_SETTINGS = "float[] scalings, float[] omegas, str activation, str backend"

# Kept for the life of the process: a collected Library leaves dangling operators behind.
_library = torch.library.Library("fastbound", "FRAGMENT")
_library.define(
    f"mlp_forward(Tensor x, {_BLOCK}, {_SETTINGS})"
    " -> (Tensor y, Tensor G, Tensor U, Tensor S, Tensor S_down)"
)
_library.define(
    f"mlp_backward(Tensor dy, Tensor x, Tensor? G, Tensor? U, Tensor S, Tensor S_down, {_BLOCK},"
    # No list of tensors: torch.func.vmap takes none from an operator.
    f" {_SETTINGS}, bool need_dx) -> (Tensor dx, Tensor dA_gate, Tensor dB_gate,"
    " Tensor dA_up, Tensor dB_up, Tensor dA_down, Tensor dB_down)"
)


class Factors(NamedTuple):
    """One projection, made ready: weight [N, K] in the compute dtype, SA [R, K] and SB [N, R]."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    SA: Tensor | None
    SB: Tensor | None
    scaling: float
    omega: float


def block_plan(
    device: torch.device,
    M: int,
    N: int,
    K: int,
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
    form: str,
) -> Plan:
    """The plan of a block: that of a layer of twice its widest rank, as two stand side by side.

    ``form`` is its :func:`fastbound.dispatch.entries.block_form`.
    """
    R = padded_rank(max(ranks, default=1))
    return plan_for(device, M, N, K, 2 * R, dtype, backend, form)


class _Block:
    """The operands of one call, in the compute dtype, and the engine that the plan names."""

    def __init__(
        self,
        X: Tensor,
        tensors: tuple[Tensor | None, ...],
        scalings: list[float],
        omegas: list[float],
        activation: str,
        backend: str,
    ) -> None:
        gate, up, down = tensors[0:4], tensors[4:8], tensors[8:12]
        ranks = tuple(t[2].shape[0] for t in (gate, up, down) if t[2] is not None)
        self.R = padded_rank(max(ranks, default=1))
        weight = _given(gate[0])
        N, K = weight.shape
        form = block_form(activation, up[0] is not None)
        plan = block_plan(X.device, X.shape[0], N, K, ranks, X.dtype, backend, form)
        self.products = _products(plan)
        self.gate, self.up, self.down = (
            None if t[0] is None else self._ready(t, X.dtype, scalings[i], omegas[i])
            for i, t in enumerate((gate, up, down))
        )

    def _ready(
        self, tensors: tuple[Tensor | None, ...], dtype: torch.dtype, scaling: float, omega: float
    ) -> Factors:
        weight, bias, A, B = tensors
        SA = SB = None
        if A is not None and B is not None:
            SA, SB = self.products.factors(A, B, scaling, omega, dtype, self.R)
        return Factors(_given(weight).to(dtype), bias, A, B, SA, SB, scaling, omega)

    def first(self) -> list[Factors]:
        """gate and up, or a plain block's only first projection."""
        return [p for p in (self.gate, self.up) if p is not None]

    def stacked_SA(self) -> Tensor | None:
        """SA of the adapted ones of gate and up, one below the other: [WIDTH, K]."""
        adapted = [p.SA for p in self.first() if p.SA is not None]
        if not adapted:
            return None
        return adapted[0] if len(adapted) == 1 else torch.cat(adapted)

    def preactivations(self, X: Tensor, S: Tensor) -> list[Tensor]:
        """G, and U where there is one: x Wᵀ + S SBᵀ + b, each with its columns of S."""
        made, column = [], 0
        for p in self.first():
            part = None if p.SB is None else S[:, column : column + self.R]
            column += 0 if p.SB is None else self.R
            made.append(_gemm(self.products, X, p.weight, part, p.SB, p.bias))
        return made


def _forward(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors, scalings, omegas, activation, backend = _unpack(arguments)
    check_storage(x, *tensors)
    with scope(x):
        X = rows(x)
        block = _Block(X, tensors, scalings, omegas, activation, backend)
        products, down = block.products, _given_projection(block.down)
        SA = block.stacked_SA()
        S = X.new_empty(X.shape[0], 0) if SA is None else products.thin(X, SA.t())
        G, *rest = block.preactivations(X, S)
        U = rest[0] if rest else None
        H, S_down = products.activate(G, U, down.SA, activation)
        Y = _gemm(products, H, down.weight, S_down, down.SB, down.bias)
        empty = X.new_empty(0)
        return (
            rows_as_of(x, Y),
            G,
            empty if U is None else U,
            S,
            empty if S_down is None else S_down,
        )


def _backward(
    dy: Tensor,
    x: Tensor,
    G: Tensor | None,
    U: Tensor | None,
    S: Tensor,
    S_down: Tensor,
    *arguments: object,
) -> tuple[Tensor, ...]:
    *settings, need_dx = arguments
    tensors, scalings, omegas, activation, backend = _unpack(tuple(settings))
    check_storage(dy, x, G, U, S, S_down, *tensors)
    with scope(dy):
        X, DY = rows(x).to(dy.dtype), rows(dy)
        block = _Block(X, tensors, scalings, omegas, activation, backend)
        products, down = block.products, _given_projection(block.down)
        gate, up = _given_projection(block.gate), block.up
        if G is None:
            G, *rest = block.preactivations(X, S)
            U = rest[0] if rest else None
        DS_down = dB_down = None
        if down.B is not None:
            DS_down, dB_down = products.thin_and_factor_gradient(
                DY, _given(down.SB), S_down, down.B, down.omega, down.scaling
            )
        SA_down = None if down.SA is None else down.SA.t()
        DH = _gemm(products, DY, down.weight.t(), DS_down, SA_down, None)
        DG, DU, DS, dB_gate, dB_up, dA_down = products.activate_backward(
            DH, G, U, S, DS_down, gate, up, down, activation, block.R
        )
        del DH
        dA_gate, dA_up = products.stacked_factor_gradients(X, DS, gate, up, block.R)
        dx = dy.new_empty(0)
        if need_dx:
            SA = block.stacked_SA()
            SA_t = None if SA is None else SA.t()
            DX = _gemm(products, DG, gate.weight.t(), DS, SA_t, None)
            if up is not None:
                DX.addmm_(_given(DU), up.weight)
            dx = rows_as_of(dy, DX)
    gradients = (dA_gate, dB_gate, dA_up, dB_up, dA_down, dB_down)
    return dx, *(dy.new_empty(0) if g is None else g for g in gradients)


def _fake_forward(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors, *_ = _unpack(arguments)
    gate, up, down = tensors[0:4], tensors[4:8], tensors[8:12]
    M, N = x.numel() // x.shape[-1], _given(gate[0]).shape[0]
    ranks = [t[2].shape[0] for t in (gate, up, down) if t[2] is not None]
    R = padded_rank(max(ranks, default=1))
    width = R * sum(t[2] is not None for t in (gate, up))
    empty = x.new_empty(0)
    return (
        x.new_empty(*x.shape[:-1], _given(down[0]).shape[0]),
        x.new_empty(M, N),
        empty if up[0] is None else x.new_empty(M, N),
        x.new_empty(M, width),
        empty.new_empty(0) if down[2] is None else x.new_empty(M, R),
    )


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    G: Tensor | None,
    U: Tensor | None,
    S: Tensor,
    S_down: Tensor,
    *arguments: object,
) -> tuple[Tensor, ...]:
    *settings, need_dx = arguments
    tensors, *_ = _unpack(tuple(settings))
    factors = [tensors[i] for i in (2, 3, 6, 7, 10, 11)]
    dx = dy.new_empty(*dy.shape[:-1], x.shape[-1]) if need_dx else dy.new_empty(0)
    return dx, *(dy.new_empty(0) if f is None else torch.empty_like(f) for f in factors)


for _device in ("CPU", "CUDA"):
    _library.impl("mlp_forward", _forward, _device)
    _library.impl("mlp_backward", _backward, _device)
torch.library.register_fake("fastbound::mlp_forward", _fake_forward, lib=_library)
torch.library.register_fake("fastbound::mlp_backward", _fake_backward, lib=_library)

mlp_forward = direct(torch.ops.fastbound.mlp_forward.default, _forward)
mlp_backward = direct(torch.ops.fastbound.mlp_backward.default, _backward)

_torch_products = TorchMLPProducts()


def _products(plan: Plan) -> TorchMLPProducts | TritonMLPProducts:
    if plan.strategy == "torch":
        return _torch_products
    from fastbound.operator.triton_block_engine import TritonMLPProducts

    return TritonMLPProducts(plan)


def _gemm(
    products: TorchMLPProducts | TritonMLPProducts,
    X: Tensor,
    W: Tensor,
    S: Tensor | None,
    F: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """``X Wᵀ + S Fᵀ + bias``, without the low-rank term where the projection is not adapted."""
    if S is None or F is None:
        return linear(X, W, None if bias is None else bias.to(X.dtype))
    return products.lowrank_gemm(X, W, S, F, bias)


def _unpack(
    arguments: tuple[object, ...],
) -> tuple[tuple[Tensor | None, ...], list[float], list[float], str, str]:
    """The twelve tensors of the block, then scalings, omegas, activation and backend."""
    scalings, omegas, activation, backend = arguments[12:]
    return arguments[:12], scalings, omegas, activation, backend  # type: ignore[return-value]


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("fastbound::mlp: a weight or a saved tensor is missing")
    return tensor


def _given_projection(projection: Factors | None) -> Factors:
    if projection is None:
        raise RuntimeError("fastbound::mlp: a block needs its first and its last projection")
    return projection
