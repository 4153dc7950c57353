"""What an adapter is made with: the settings behind the public keywords, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

from fastbound.dispatch.plan import BACKENDS
from fastbound.errors import positive
from fastbound.layers.bounds import bound_of_weight, weight_bound
from fastbound.operator.dropout import check_dropout

ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP32_HOLDS = (1e-30, 1e30)  # with room to be multiplied by weights, activations and gradients
FAR_RANKS = (8, 256)  # a rank above both so many times min(N, K) and so many is out of proportion


def check_numbers(rank: int, alpha: float, bound: float) -> None:
    """Raise ValueError where s, omega or what gradients are multiplied by leaves fp32's range."""
    scaling, omega = bound / rank, math.sqrt(alpha / bound) if alpha / bound > 0 else 0.0
    for name, value in {
        "bound / rank": scaling,
        "omega = sqrt(alpha / bound)": omega,
        "omega * bound / rank": omega * scaling,
        "the slope alpha / rank": alpha / rank,
    }.items():
        if not FP32_HOLDS[0] <= value <= FP32_HOLDS[1]:
            raise ValueError(
                f"alpha {alpha:g} and bound {bound:g} at rank {rank} are out of proportion: {name} "
                f"is {value:g}, and fp32 computes with {FP32_HOLDS[0]:g} to {FP32_HOLDS[1]:g}"
            )


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Raise ValueError for a rank that no layer of these sizes has a use for."""
    times, least = FAR_RANKS
    smaller = min(in_features, out_features)
    if rank > max(times * smaller, least):
        raise ValueError(
            f"rank {rank} is out of proportion to a layer with {in_features} inputs and "
            f"{out_features} outputs, whose weight has rank {smaller} at most: choose a smaller one"
        )


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

    def __post_init__(self) -> None:
        bound = self.alpha if isinstance(self.bound, str) else self.bound
        check_numbers(self.rank, self.alpha, bound)

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
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise ValueError(f"rank must be an integer, got {rank!r}")
    rank = int(rank)
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    if rank >= 2**31:
        raise ValueError("rank must be below 2^31, and is far from what a layer has a use for")
    alpha = positive("alpha", rank if alpha is None else alpha)
    if not isinstance(bound, str):
        bound = positive("bound", alpha if bound is None else bound)
    if adapter_dtype not in ADAPTER_DTYPES:
        names = ", ".join(map(str, ADAPTER_DTYPES))
        raise ValueError(
            f"adapter_dtype must be a floating dtype, one of {names}; got {adapter_dtype!r}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    return AdapterSettings(rank, alpha, bound, check_dropout(dropout), adapter_dtype, backend)


def rank_stabilised(rank: int, alpha: float | None) -> float:
    """alpha·sqrt(r), which makes the slope alpha / sqrt(r), as LoRA's `use_rslora`; None is r."""
    return positive("alpha", rank if alpha is None else alpha) * math.sqrt(rank)
