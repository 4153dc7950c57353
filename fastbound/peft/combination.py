"""An exact weighted sum of bounded adapters as one adapter, with their factors concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbound.layers.adapter import NamedAdapter
from fastbound.truth.formula import wide_dtype


@dataclass(frozen=True)
class Combination:
    """ΔW = s·sin(B) sin(A), that is ω = 1 and alpha = bound = s·rank."""

    A: Tensor  # [R, K]
    B: Tensor  # [N, R]
    bound: float

    @property
    def rank(self) -> int:
        """R, the sum of the ranks."""
        return self.A.shape[0]


@torch.no_grad()
def combined(adapters: Sequence[NamedAdapter], weights: Sequence[float]) -> Combination:
    """Σ weight_i · s_i·sin(ω_i B_i) sin(ω_i A_i) as one s·sin(B) sin(A).

        s = max_i |weight_i|·s_i      c_i = |weight_i|·s_i / s <= 1

        A = [± ω_i A_i]  the sign of weight_i       B = [arcsin(c_i·sin(ω_i B_i))]

    The sines are computed in fp64. No entry of the sum exceeds Σ |weight_i|·bound_i. If the result
    is trained further, its bound is s·R instead: the same number if all |weight_i|·bound_i / r_i
    are equal, and a larger one otherwise.
    """
    scalings = [weight * adapter.scaling for adapter, weight in zip(adapters, weights, strict=True)]
    # If all weights are zero, the sum is zero for any s.
    s = max(map(abs, scalings)) or max(adapter.bound / adapter.rank for adapter in adapters)
    A, B = [], []
    for adapter, scaling in zip(adapters, scalings, strict=True):
        A.append((adapter.omega if scaling >= 0 else -adapter.omega) * adapter.A.double())
        B.append(torch.asin(abs(scaling) / s * torch.sin(adapter.omega * adapter.B.double())))
    kind = wide_dtype(adapters[0].A)
    rank = sum(adapter.rank for adapter in adapters)
    return Combination(torch.cat(A).to(kind), torch.cat(B, dim=1).to(kind), s * rank)
