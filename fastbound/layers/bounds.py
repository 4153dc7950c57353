"""A bound told in units of a layer's own weight: "0.5*spectral" by its largest singular value.

A ΔW of rank r whose entries stay within a bound has a Frobenius norm of up to bound · sqrt(NK). So

    |ΔW_ij| <= c · σ₁(W) / sqrt(NK)     guarantees     ‖ΔW‖₂ <= ‖ΔW‖_F <= c · ‖W‖₂

for a layer of any size: "0.5*spectral" is c = 0.5. In "2*rms", 2 x RMS(W), the same guarantee grows
with the layer, by about the square root of its smaller side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastbound.operator.partition import whole
from fastbound.truth.formula import wide_dtype

AUTO = "0.5*spectral"
UNITS = ("spectral", "rms")
# Subspace iteration: within 0.4 % of σ₁ for a weight of independent normal entries, the slowest to
# converge, and within 0.01 % for those of pretrained models.
_DIRECTIONS = 16
_ITERATIONS = 16


class WeightBound(NamedTuple):
    """So many units of the weight: σ₁(W) / sqrt(NK) for "spectral", RMS(W) for "rms"."""

    factor: float
    unit: str


def weight_bound(bound: str) -> WeightBound:
    """What a text such as "0.5*spectral" or "auto" says. Raises ValueError for another text."""
    number, star, unit = (AUTO if bound == "auto" else bound).replace(" ", "").partition("*")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not star or unit not in UNITS or not 0 < factor < math.inf:
        raise ValueError(
            'bound must be a positive number, None, "auto" or a positive multiple such as '
            f'"0.5*spectral" or "2*rms", got {bound!r}'
        )
    return WeightBound(factor, unit)


def bound_of_weight(bound: str, weight: Tensor) -> float:
    """The bound as a number, for this weight.

    Raises ValueError for a text that is no bound, and a weight that is all zero, not finite or on
    meta.
    """
    factor, unit = weight_bound(bound)
    if weight.is_meta:
        raise ValueError(
            f'bound="{bound}" reads the weight, which is on the meta device: load it first'
        )
    norm = torch.linalg.vector_norm(weight.detach(), dtype=wide_dtype(weight)).item()
    rms = norm / weight.numel() ** 0.5
    if not rms > 0 or rms == math.inf:
        raise ValueError(f'bound="{bound}" needs a finite, non-zero weight, whose RMS is {rms}')
    if unit == "rms":
        return factor * rms
    return factor * spectral_norm(weight) / weight.numel() ** 0.5


@torch.no_grad()
def spectral_norm(weight: Tensor) -> float:
    """σ₁(W), the largest singular value of [N, K], from below and within 1 %; the same every time.

    Subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) by `torch.svd_lowrank`; a
    sharded weight is gathered for it.
    """
    matrix = whole(weight.detach()).to(wide_dtype(weight))
    directions = min(_DIRECTIONS, *matrix.shape)
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        _, values, _ = torch.svd_lowrank(matrix, q=directions, niter=_ITERATIONS)
    return float(values[0])
