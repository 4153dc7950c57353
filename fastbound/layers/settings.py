"""The settings of an adapter, made and checked once from the public keywords."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

from fastbound.dispatch.plan import BACKENDS
from fastbound.errors import InputError, positive
from fastbound.layers.bounds import bound_of_weight, weight_bound
from fastbound.operator.call import check_form
from fastbound.operator.dropout import check_dropout

ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEAST, MOST = 1e-12, 1e12  # of alpha and bound
SMALL_RANK = 128  # accepted for a layer of any size


def check_numbers(alpha: float, bound: float) -> None:
    """Raise ValueError if s, ω or their products may leave fp32's range with these numbers."""
    for name, value in (("alpha", alpha), ("bound", bound)):
        if not LEAST <= value <= MOST:
            raise ValueError(
                f"{name} must lie between {LEAST:g} and {MOST:g}, where fp32 holds s and ω, got "
                f"{value:g}"
            )


def check_rank(rank: int, N: int, K: int, layer: str | None = None) -> None:
    """Raise InputError if the rank is above `SMALL_RANK`, N and K of its layer's weight [N, K].

    A and B would each be larger than the weight, whose own rank is at most min(N, K).
    """
    most = max(N, K, SMALL_RANK)
    if rank > most:
        of = "" if layer is None else f" of {layer}"
        raise InputError(
            f"rank {rank}{of} is out of proportion: the weight is [N, K] = [{N}, {K}], and A and B "
            f"would each be larger; give a rank of at most {most}"
        )


@dataclass(frozen=True)
class AdapterSettings:
    """The keywords of :class:`fastbound.BoundedAdapter`, as :func:`adapter_settings` makes them.

    ``bound`` is a number, or a text such as "0.5*spectral" until :meth:`for_weight` has read the
    weight. ``omega`` is set only if it was given and the bound is still a text: alpha then depends
    on the bound. In every other case ``alpha`` holds and ``omega`` is None.
    """

    rank: int
    alpha: float
    bound: float | str
    dropout: float
    adapter_dtype: torch.dtype
    backend: str
    form: str = "factors"
    omega: float | None = None

    def for_weight(self, weight: Tensor) -> AdapterSettings:
        """The settings with alpha and bound as numbers; a bound given as a text reads the weight.

        Raises ValueError for a weight that cannot be used, see
        :func:`fastbound.layers.bounds.bound_of_weight`.
        """
        if isinstance(self.bound, str):
            return replace(self, bound=bound_of_weight(self.bound, weight))._with_numbers()
        return self

    def _with_numbers(self) -> AdapterSettings:
        """The settings with alpha as a number; the bound must be one already."""
        bound, alpha = float(self.bound), self.alpha
        if self.omega is not None:
            alpha = alpha_of(self.omega, self.rank, bound, self.form)
        check_numbers(alpha, bound)
        return replace(self, bound=bound, alpha=alpha, omega=None)


def alpha_of(omega: float, rank: int, bound: float, form: str) -> float:
    """The alpha that gives a frequency ω: ω²·bound for "factors", ω·r·bound for "product"."""
    return omega * rank * bound if form == "product" else omega**2 * bound


def scaling_and_omega(rank: int, alpha: float, bound: float, form: str) -> tuple[float, float]:
    """s and ω such that ΔW has LoRA's slope alpha / r at zero and no entry exceeds the bound.

    factors: s = bound / r, ω = sqrt(alpha / bound); product: s = bound, ω = alpha / (r·bound).
    """
    if form == "product":
        return bound, alpha / (rank * bound)
    return bound / rank, math.sqrt(alpha / bound)


def adapter_settings(
    rank: int,
    alpha: float | None = None,
    bound: float | str | None = None,
    dropout: float = 0.0,
    adapter_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    form: str = "factors",
    omega: float | None = None,
) -> AdapterSettings:
    """The checked settings. Raises ValueError, which names the bad value.

    ``alpha=None`` means rank, and ``bound=None`` means alpha, or 1 if omega is given instead.
    """
    if isinstance(bound, str):
        weight_bound(bound)
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise ValueError(f"rank must be an integer, got {rank!r}")
    rank = int(rank)
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    if rank >= 2**31:
        raise ValueError("rank must be below 2^31, and a useful rank is far smaller")
    if omega is not None:
        if alpha is not None:
            raise ValueError(
                f"alpha={alpha!r} and omega={omega!r} set the same thing twice: give one of them"
            )
        omega = positive("omega", omega)
        alpha, bound = float(rank), 1.0 if bound is None else bound
    alpha = positive("alpha", rank if alpha is None else alpha)
    if not isinstance(bound, str):
        bound = positive("bound", alpha if bound is None else bound)
    check_numbers(alpha, alpha if isinstance(bound, str) else bound)
    if adapter_dtype not in ADAPTER_DTYPES:
        names = ", ".join(map(str, ADAPTER_DTYPES))
        raise ValueError(
            f"adapter_dtype must be a floating dtype, one of {names}; got {adapter_dtype!r}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    dropout = check_dropout(dropout)
    check_form(form, backend, dropout)
    settings = AdapterSettings(rank, alpha, bound, dropout, adapter_dtype, backend, form, omega)
    return settings if isinstance(bound, str) else settings._with_numbers()


def rank_stabilised(rank: int, alpha: float | None) -> float:
    """alpha·sqrt(r), so that the slope is alpha / sqrt(r), as with LoRA's `use_rslora`.

    ``alpha=None`` means r.
    """
    return positive("alpha", rank if alpha is None else alpha) * math.sqrt(rank)
