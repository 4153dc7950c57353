"""The operator's products in Triton with a plan's tiles; "split" leaves the GEMM to cuBLAS.

In fp16 SA, SB and the thin products are fp32. For each product they are narrowed to fp16, scaled by
powers of two so that nothing is out of range (``kernels/narrow.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbound.dispatch.defaults import padded_rank
from fastbound.dispatch.device import describe
from fastbound.dispatch.plan import Plan
from fastbound.kernels.dropout import keep_bits
from fastbound.kernels.factors import factors
from fastbound.kernels.gated import (
    activation_forward,
    backward_cut,
    launch_activation_backward,
)
from fastbound.kernels.lowrank_gemm import is_transposed, lowrank_gemm
from fastbound.kernels.narrow import narrowed, narrowed_pair
from fastbound.kernels.product import adapted_weight, contract
from fastbound.kernels.reduce import (
    factor_gradient,
    launch_finish,
    reduce,
    reduced_parts,
    thin_and_reduce,
)
from fastbound.kernels.thin import thin
from fastbound.kernels.tiles import GemmTile
from fastbound.operator.call import Factors
from fastbound.operator.dropout import ROUNDS, threshold
from fastbound.operator.torch_engine import TorchEngine
from fastbound.truth.formula import thin_dtype


class TritonEngine:
    """The products of :class:`~fastbound.operator.torch_engine.TorchEngine`, one launcher each."""

    def __init__(self, plan: Plan) -> None:
        if plan.tiles is None:
            raise ValueError(f'a plan with strategy "{plan.strategy}" has no tiles')
        self.plan = plan
        self._thin, self._reduce = plan.tiles.thin, plan.tiles.reduce
        self._gemm, self._gemm_t = plan.tiles.gemm, plan.tiles.gemm_t
        self._activate, self._gated = plan.tiles.activate, plan.tiles.gated
        self._fused = plan.strategy == "fused"
        self._multiprocessors = plan.multiprocessors
        self._torch = TorchEngine()

    def keep_bits(self, seed: Tensor, M: int, K: int, p: float) -> Tensor:
        return keep_bits(seed, M, K, threshold(p), ROUNDS)

    def factors(
        self, A: Tensor, B: Tensor, scaling: float, omega: float, dtype: torch.dtype, R: int
    ) -> tuple[Tensor, Tensor]:
        return factors(A, B, R, scaling, omega, thin_dtype(dtype))

    def thin(self, T: Tensor, F: Tensor, keep: Tensor | None = None) -> Tensor:
        if T.dtype is F.dtype:
            return thin(T, F, self._thin, self._multiprocessors, keep)
        F, f = narrowed(F)
        return thin(T, F, self._thin, self._multiprocessors, keep, f.dtype).mul_(f)

    def factor_gradient(
        self,
        T: Tensor,
        G: Tensor,
        P: Tensor,
        omega: float,
        scaling: float,
        keep: Tensor | None = None,
    ) -> Tensor:
        how = (omega, scaling, self._reduce, self._multiprocessors, keep)
        if T.dtype is G.dtype:
            return reduce(T, G, P, *how)
        G, g = narrowed(G)
        return _widened(reduce(T, G, P, *how, g.dtype), g, P)

    def thin_and_factor_gradient(
        self, T: Tensor, F: Tensor, G: Tensor, P: Tensor, omega: float, scaling: float
    ) -> tuple[Tensor, Tensor]:
        how = (omega, scaling, self._reduce, self._multiprocessors)
        if T.dtype is F.dtype:
            return thin_and_reduce(T, F, G, P, *how)
        (F, f), (G, g) = narrowed(F), narrowed(G)
        product, gradient = thin_and_reduce(T, F, G, P, *how, f.dtype)
        return product.mul_(f), _widened(gradient, g, P)

    def lowrank_product(
        self, S: Tensor, F: Tensor, dtype: torch.dtype, keep: Tensor | None = None
    ) -> Tensor:
        if S.dtype is not dtype:
            S, F = narrowed_pair(S, F)
        if keep is None:
            return self._torch.lowrank_product(S, F, dtype)
        return self._start(S, F, keep, self._gemm_t)

    def add_lowrank(self, Y: Tensor, S: Tensor, F: Tensor, in_place: bool = False) -> Tensor:
        if S.dtype is not Y.dtype:
            S, F = narrowed_pair(S, F)
        return self._torch.add_lowrank(Y, S, F, in_place)

    def _start(self, S: Tensor, F: Tensor, keep: Tensor, tile: GemmTile) -> Tensor:
        """S Fᵀ masked, from which the GEMM starts: :func:`lowrank_gemm` with K = 0."""
        return lowrank_gemm(S[:, :0], F[:, :0], S, F, None, tile, self._multiprocessors, keep)

    def lowrank_gemm(
        self,
        X: Tensor,
        W: Tensor,
        S: Tensor,
        F: Tensor,
        bias: Tensor | None,
        keep: Tensor | None = None,
    ) -> Tensor:
        tile = self._gemm_t if is_transposed(W) else self._gemm
        if S.dtype is not X.dtype:
            S, F = narrowed_pair(S, F)
        if self._fused:
            return lowrank_gemm(X, W, S, F, bias, tile, self._multiprocessors, keep)
        if keep is None:
            return self._torch.lowrank_gemm(X, W, S, F, bias)
        return self._start(S, F, keep, tile).addmm_(X, W.t())

    # For the product form.

    def adapted_weight(
        self,
        W: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        omega: float,
        dtype: torch.dtype,
    ) -> Tensor:
        return adapted_weight(W, A, B, scaling, omega, dtype)

    def weight_gradient(self, DY: Tensor, X: Tensor) -> Tensor:
        if DY.dtype is X.dtype is torch.float16 and DY.is_cuda:
            return torch.mm(DY.t(), X, out_dtype=torch.float32)
        return self._torch.weight_gradient(DY, X)

    def contract(
        self, G: Tensor, A: Tensor, B: Tensor, scaling: float, omega: float
    ) -> tuple[Tensor, Tensor]:
        precision = "tf32" if G.dtype is torch.bfloat16 else "tf32x3"
        if describe(G.device).architecture.startswith("gfx"):
            precision = "ieee"
        R = padded_rank(A.shape[0])
        return contract(G, A, B, R, scaling, omega, self._multiprocessors, precision)

    # For the parts of an MLP block that are not layers.

    def activate(
        self, G: Tensor, U: Tensor | None, SA: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor | None]:
        H = torch.empty_like(G)
        F = None if SA is None else SA.t()
        P = None if F is None else F.new_empty(G.shape[0], F.shape[1])
        F, f = _narrowed(F, G.dtype)
        activation_forward(G, U, F, H, P, activation, self._activate, self._multiprocessors)
        return H, P if P is None or f is None else P.mul_(f)

    def activate_backward(
        self,
        DH: Tensor,
        G: Tensor,
        U: Tensor | None,
        S: Tensor,
        DS_down: Tensor | None,
        gate: Factors,
        up: Factors | None,
        down: Factors,
        activation: str,
        R: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        M, N = G.shape
        tile = self._gated
        SB_gate, f_gate = _narrowed(gate.SB, G.dtype)
        SB_up, f_up = _narrowed(None if up is None else up.SB, G.dtype)
        width = R * ((gate.SB is not None) + (SB_up is not None))
        cut = backward_cut(M, N, width, tile, self._multiprocessors)

        def workspace(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=G.device)

        DG = torch.empty_like(G)
        DU = None if U is None else torch.empty_like(U)
        P = workspace(cut.columns if width else 0, M, width)
        QG, QU, QD = (
            workspace(0 if absent else cut.chunks, N, R)
            for absent in (SB_gate is None, SB_up is None, DS_down is None)
        )
        S_first, s = _narrowed(S if width else None, G.dtype)
        s_gate, s_up = (None, None) if s is None else (s[:R], s[-R:])
        DS_down, ds = _narrowed(DS_down, G.dtype)
        launch_activation_backward(
            DH, G, U, S_first, DS_down, SB_gate, SB_up, DG, DU, P, QG, QU, QD,
            activation, R, cut, tile,
        ).run()  # fmt: skip
        DS = None
        if width:
            DS = S.new_empty(M, width)
            launch_finish(P, DS).run()
            scales = [f for f in (f_gate, f_up) if f is not None]
            if scales:
                DS.mul_(torch.cat(scales))
        dB_gate = dB_up = dA_down = None
        if gate.B is not None:
            dB_gate = _gradient(QG, gate.B, gate.omega, gate.scaling, s_gate)
        if up is not None and up.B is not None:
            dB_up = _gradient(QU, up.B, up.omega, up.scaling, s_up)
        if down.A is not None:
            dA_down = _gradient(QD, down.A.t(), down.omega, 1.0, ds).t()
        return DG, DU, DS, dB_gate, dB_up, dA_down

    def stacked_factor_gradients(
        self, X: Tensor, DS: Tensor | None, gate: Factors, up: Factors | None, R: int
    ) -> tuple[Tensor | None, Tensor | None]:
        if DS is None:
            return None, None
        ds = None
        if DS.dtype is not X.dtype:
            DS, ds = narrowed(DS)
        Q = reduced_parts(X, None, DS, None, self._reduce, self._multiprocessors)
        gradients: list[Tensor | None] = []
        column = 0
        for p in (gate, up):
            if p is None or p.A is None:
                gradients.append(None)
                continue
            part = Q[:, :, column : column + R]
            scale = None if ds is None else ds[column : column + R]
            gradients.append(_gradient(part, p.A.t(), p.omega, 1.0, scale).t())
            column += R
        return gradients[0], gradients[1]


def _narrowed(P: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """P as an operand of ``dtype``, and its columns' scale if it had to be narrowed."""
    return (P, None) if P is None or P.dtype is dtype else narrowed(P)


def _widened(gradient: Tensor, scale: Tensor, P: Tensor) -> Tensor:
    """P's gradient [N, r] from that of narrowed columns and their scale."""
    return gradient.mul_(scale[: P.shape[1]]).to(P.dtype)


def _gradient(Q: Tensor, P: Tensor, omega: float, scaling: float, scale: Tensor | None) -> Tensor:
    """P's gradient from its partial sums, which are of narrowed columns if there is a ``scale``."""
    if scale is None:
        return factor_gradient(Q, P, omega, scaling)
    return _widened(factor_gradient(Q, P, omega, scaling, scale.dtype), scale, P)
