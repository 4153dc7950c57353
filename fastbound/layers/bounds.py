"""Bounds in units of a layer's own weight, such as "0.5*spectral" or "2*rms".

A ΔW whose entries stay within a bound has a Frobenius norm of at most bound · sqrt(NK). Therefore

    |ΔW_ij| <= c · σ₁(W) / sqrt(NK)     guarantees     ‖ΔW‖₂ <= ‖ΔW‖_F <= c · ‖W‖₂

for a layer of any size; "0.5*spectral" is c = 0.5. With "2*rms", which is 2 · RMS(W), the
guaranteed c grows with the layer, about as the square root of its smaller side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastbound.operator.partition import whole
from fastbound.truth.formula import wide_dtype
from fastbound.truth.linear_algebra import largest_singular

AUTO = "0.5*spectral"
UNITS = ("spectral", "rms")
# Settings of the subspace iteration: within 0.4 % of σ₁ for a weight of independent normal entries,
# which converges most slowly, and within 0.01 % for the weights of pretrained models.
_DIRECTIONS = 16
_ITERATIONS = 16


class WeightBound(NamedTuple):
    """A multiple of a unit: σ₁(W) / sqrt(NK) for "spectral", RMS(W) for "rms"."""

    factor: float
    unit: str


def weight_bound(bound: str) -> WeightBound:
    """Parse a text such as "0.5*spectral" or "auto". Raises ValueError for any other text."""
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

    Raises ValueError for a text that does not describe a bound, and for a weight that is all zero,
    not finite or on the meta device.
    """
    factor, unit = weight_bound(bound)
    if weight.is_meta:
        raise ValueError(
            f'bound="{bound}" needs the weight, which is on the meta device: load it first'
        )
    norm = torch.linalg.vector_norm(weight.detach(), dtype=wide_dtype(weight)).item()
    rms = norm / weight.numel() ** 0.5
    if not rms > 0 or rms == math.inf:
        raise ValueError(f'bound="{bound}" needs a finite, non-zero weight, got one of RMS {rms}')
    if unit == "rms":
        return factor * rms
    return factor * spectral_norm(weight) / weight.numel() ** 0.5


def spectral_norm(weight: Tensor) -> float:
    """σ₁(W), the largest singular value of W [N, K], at most 1 % too small; deterministic.

    A sharded weight is gathered first.
    """
    matrix = whole(weight.detach()).to(wide_dtype(weight))
    directions = min(_DIRECTIONS, *matrix.shape)
    return float(largest_singular(matrix, directions, iterations=_ITERATIONS)[1][0])
