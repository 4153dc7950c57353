"""The operator's products in Triton with a plan's tiles; "split" leaves the GEMM to cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbound.dispatch.plan import Plan
from fastbound.kernels.dropout import keep_bits
from fastbound.kernels.factors import factors
from fastbound.kernels.lowrank_gemm import is_transposed, lowrank_gemm
from fastbound.kernels.reduce import reduce, thin_and_reduce
from fastbound.kernels.thin import thin
from fastbound.operator.dropout import ROUNDS, threshold
from fastbound.operator.torch_engine import TorchProducts


class TritonProducts:
    """The products of :class:`~fastbound.operator.torch_engine.TorchProducts`, one launcher each."""

    def __init__(self, plan: Plan) -> None:
        if plan.tiles is None:
            raise ValueError(f'a plan with strategy "{plan.strategy}" holds no tiles')
        self._thin, self._reduce = plan.tiles.thin, plan.tiles.reduce
        self._gemm, self._gemm_t = plan.tiles.gemm, plan.tiles.gemm_t
        self._fused = plan.strategy == "fused"
        self._multiprocessors = plan.multiprocessors
        self._torch = TorchProducts()

    def keep_bits(self, seed: Tensor, M: int, K: int, p: float) -> Tensor:
        return keep_bits(seed, M, K, threshold(p), ROUNDS)

    def factors(
        self, A: Tensor, B: Tensor, scaling: float, omega: float, dtype: torch.dtype, R: int
    ) -> tuple[Tensor, Tensor]:
        return factors(A, B, R, scaling, omega, dtype)

    def thin(self, T: Tensor, F: Tensor, keep: Tensor | None = None) -> Tensor:
        return thin(T, F, self._thin, self._multiprocessors, keep)

    def factor_gradient(
        self,
        T: Tensor,
        G: Tensor,
        P: Tensor,
        omega: float,
        scaling: float,
        keep: Tensor | None = None,
    ) -> Tensor:
        return reduce(T, G, P, omega, scaling, self._reduce, self._multiprocessors, keep)

    def thin_and_factor_gradient(
        self, T: Tensor, F: Tensor, G: Tensor, P: Tensor, omega: float, scaling: float
    ) -> tuple[Tensor, Tensor]:
        return thin_and_reduce(T, F, G, P, omega, scaling, self._reduce, self._multiprocessors)

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
        if self._fused:
            return lowrank_gemm(X, W, S, F, bias, tile, self._multiprocessors, keep)
        if keep is None:
            return self._torch.lowrank_gemm(X, W, S, F, bias)
        start = (X[:, :0], W[:, :0], S, F, bias, tile, self._multiprocessors, keep)
        return lowrank_gemm(*start).addmm_(X, W.t())
