"""What an adapter is made with: the settings behind the public keywords, checked once."""

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
SMALL_RANK = 128  # taken for a layer of any size


def check_numbers(alpha: float, bound: float) -> None:
    """Raise ValueError for numbers with which s, ω and their products may leave fp32's range."""
    for name, value in (("alpha", alpha), ("bound", bound)):
        if not LEAST <= value <= MOST:
            raise ValueError(
                f"{name} must lie between {LEAST:g} and {MOST:g}, where fp32 holds s and ω, got "
                f"{value:g}"
            )


def check_rank(rank: int, N: int, K: int, layer: str | None = None) -> None:
    """Raise InputError for a rank above `SMALL_RANK` and above both sides of its layer [N, K].

    A and B would each be larger than the weight, whose own rank is at most the smaller side.
    """
    most = max(N, K, SMALL_RANK)
    if rank > most:
        of = "" if layer is None else f" of {layer}"
        raise InputError(
            f"rank {rank}{of} is out of proportion: its weight is [N, K] = [{N}, {K}], and A and B "
            f"would each be larger; give a rank of at most {most}"
        )


@dataclass(frozen=True)
class AdapterSettings:
    """The keywords of :class:`fastbound.BoundedAdapter`, as :func:`adapter_settings` makes them.

    ``bound`` is a number, or a text such as "0.5*spectral" until :meth:`for_weight` has read the
    weight. ``omega`` is None wherever ``alpha`` is known; where it was given and the bound is still
    a text, alpha is not known before the bound is.
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
        """With alpha and bound as numbers: in units of this weight, where a text asks for that.

        Raises ValueError for a weight that cannot be read, see
        :func:`fastbound.layers.bounds.bound_of_weight`.
        """
        if isinstance(self.bound, str):
            return replace(self, bound=bound_of_weight(self.bound, weight))._with_numbers()
        return self

    def _with_numbers(self) -> AdapterSettings:
        """For a bound that is a number."""
        bound, alpha = float(self.bound), self.alpha
        if self.omega is not None:
            alpha = alpha_of(self.omega, self.rank, bound, self.form)
        check_numbers(alpha, bound)
        return replace(self, bound=bound, alpha=alpha, omega=None)


def alpha_of(omega: float, rank: int, bound: float, form: str) -> float:
    """The alpha that a frequency stands for: ω²·bound for factors, ω·r·bound for product."""
    return omega * rank * bound if form == "product" else omega**2 * bound


def scaling_and_omega(rank: int, alpha: float, bound: float, form: str) -> tuple[float, float]:
    """s and ω, with which ΔW has LoRA's slope alpha / r at zero and no entry beyond the bound.

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
    """The settings; a ValueError names a bad value.

    alpha None is rank, and bound None alpha. With omega given in alpha's place bound None is 1.
    """
    if isinstance(bound, str):
        weight_bound(bound)
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise ValueError(f"rank must be an integer, got {rank!r}")
    rank = int(rank)
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    if rank >= 2**31:
        raise ValueError("rank must be below 2^31, and is far from what a layer has a use for")
    if omega is not None:
        if alpha is not None:
            raise ValueError(
                f"alpha={alpha!r} and omega={omega!r} say one thing twice: give one of them"
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
    """alpha·sqrt(r), which makes the slope alpha / sqrt(r), as LoRA's `use_rslora`; None is r."""
    return positive("alpha", rank if alpha is None else alpha) * math.sqrt(rank)
