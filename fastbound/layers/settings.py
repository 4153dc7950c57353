"""What an adapter is made with: the settings behind the public keywords, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastbound.dispatch.plan import BACKENDS
from fastbound.errors import positive
from fastbound.layers.bounds import bound_of_weight, weight_bound
from fastbound.operator.dropout import check_dropout

LEAST, MOST = 1e-12, 1e12  # of alpha and bound


@dataclass(frozen=True)
class AdapterSettings:
    """The keywords of :class:`fastbound.BoundedAdapter`, as :func:`adapter_settings` makes them.

    ``bound`` is a number, or a text such as "0.5*spectral" until :meth:`for_weight` has read the
    weight.
    """

    rank: int
    alpha: float
    bound: float | str
    dropout: float
    adapter_dtype: torch.dtype
    backend: str

    def for_weight(self, weight: Tensor) -> AdapterSettings:
        """With the bound as a number: in units of this weight, where a text asks for that.

        Raises ValueError for a weight that cannot be read, see
        :func:`fastbound.layers.bounds.bound_of_weight`.
        """
        if isinstance(self.bound, str):
            return replace(self, bound=bound_of_weight(self.bound, weight))
        return self


def adapter_settings(
    rank: int,
    alpha: float | None = None,
    bound: float | str | None = None,
    dropout: float = 0.0,
    adapter_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> AdapterSettings:
    """The settings; alpha None is rank, and bound None alpha. A ValueError names a bad value."""
    if isinstance(bound, str):
        weight_bound(bound)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"rank must be an integer, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    alpha = positive("alpha", rank if alpha is None else alpha)
    if not isinstance(bound, str):
        bound = positive("bound", alpha if bound is None else bound)
    for name, value in (("alpha", alpha), ("bound", bound)):
        if not isinstance(value, str) and not LEAST <= value <= MOST:
            raise ValueError(
                f"{name} must lie between {LEAST:g} and {MOST:g}, where fp32 holds s and ω, got "
                f"{value:g}"
            )
    if not adapter_dtype.is_floating_point:
        raise ValueError(f"adapter_dtype must be a floating dtype, got {adapter_dtype}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    return AdapterSettings(rank, alpha, bound, check_dropout(dropout), adapter_dtype, backend)


def rank_stabilised(rank: int, alpha: float | None) -> float:
    """alpha·sqrt(r), which makes the slope alpha / sqrt(r), as LoRA's `use_rslora`; None is r."""
    return positive("alpha", rank if alpha is None else alpha) * math.sqrt(rank)
