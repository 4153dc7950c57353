"""A bound told in multiples of a layer's own weight: "2*rms" is 2 x RMS(W), "auto" is "4*rms"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbound.truth.formula import wide_dtype

AUTO = "4*rms"


def rms_factor(bound: str) -> float:
    """What RMS(W) is multiplied with. Raises ValueError for another text."""
    number, star, unit = (AUTO if bound == "auto" else bound).replace(" ", "").partition("*")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if (star, unit) != ("*", "rms") or not 0 < factor < math.inf:
        raise ValueError(
            f'bound must be a positive number, None, "auto" or a multiple as "2*rms", got {bound!r}'
        )
    return factor


def bound_of_weight(bound: str, weight: Tensor) -> float:
    """The bound as a number, for this weight.

    Raises ValueError for a text that is no bound, and a weight that is all zero, not finite or on
    meta.
    """
    factor = rms_factor(bound)
    if weight.is_meta:
        raise ValueError(
            f'bound="{bound}" reads the weight, which is on the meta device: load it first'
        )
    norm = torch.linalg.vector_norm(weight.detach(), dtype=wide_dtype(weight)).item()
    rms = norm / weight.numel() ** 0.5
    if not rms > 0 or rms == math.inf:
        raise ValueError(f'bound="{bound}" needs a finite, non-zero weight, whose RMS is {rms}')
    return factor * rms
