"""BoundedAdapter: the trained factors A and B, their bound, and the operator over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastbound.errors import positive
from fastbound.layers.settings import (
    adapter_settings,
    check_numbers,
    check_rank,
    scaling_and_omega,
)
from fastbound.operator.function import bounded_addition, bounded_linear
from fastbound.operator.partition import whole
from fastbound.truth import formula
from fastbound.truth.formula import wide_dtype
from fastbound.truth.linear_algebra import without_autocast

_ENTRIES = 2**22  # entries of ΔW per step of a reduction over all of them


class BoundedAdapter(nn.Module):
    """Owns A [r, K] and B [N, r]; ``forward(x, weight, bias)`` runs the operator over them.

        y = x (W + ΔW)ᵀ + b

        factors    ΔW = s · sin(ωB) sin(ωA)    s = bound / r    ω = sqrt(alpha / bound)
        product    ΔW = s · sin(ω·B A)         s = bound        ω = alpha / (r · bound)

    In both forms ΔW ≈ (alpha / r)·BA near zero, which is LoRA's slope, and |ΔW_ij| <= bound
    always. A is initialised Kaiming-uniform and B to zero, so a new adapter changes nothing.
    ``omega`` may be given instead of alpha; then ``bound=None`` means 1. For example, omega=100
    with form="product" is ΔW = sin(100·B A), which corresponds to alpha = 100 r.

    With ``dropout`` p > 0 the low-rank term takes drop(x) in training, as in PEFT's LoRA: each
    element of x is zero with probability p and divided by 1 - p otherwise. The frozen term x Wᵀ
    takes x without dropout.

    The weight is passed in, not owned: A and B are read only in the forward of the module that owns
    them, as sharded training requires.

    Raises ValueError for a rank below 1 or far above the layer's size; an alpha, omega or bound
    that is not positive and finite, or with which s or ω would leave fp32's range; alpha together
    with omega; a dropout outside 0 <= p < 1; an ``adapter_dtype`` that is not a floating dtype; an
    unknown form or backend; and dropout or backend="fused" in the product form.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        *,
        alpha: float | None = None,
        bound: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        form: str = "factors",
        omega: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(bound, str):
            raise ValueError(
                f"bound must be a number, got {bound!r}; a bound in units of W needs a layer"
            )
        settings = adapter_settings(
            rank, alpha, bound, dropout, adapter_dtype, backend, form, omega
        )
        self.rank = rank = settings.rank
        check_rank(rank, out_features, in_features)
        self.alpha = settings.alpha
        self.bound = float(settings.bound)
        self.dropout = settings.dropout
        self.backend, self.form = backend, form
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=adapter_dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=adapter_dtype))
        self.reset_parameters()

    @property
    def weight(self) -> nn.Parameter:
        """A, under the name by which PEFT's `fsdp_auto_wrap_policy` recognises trained modules."""
        return self.A

    @property
    def scaling(self) -> float:
        """s: bound / rank in the form "factors", bound in the form "product"."""
        return self._numbers()[0]

    @property
    def omega(self) -> float:
        """ω: sqrt(alpha / bound) for "factors", alpha / (rank · bound) for "product"."""
        return self._numbers()[1]

    @property
    def largest(self) -> float:
        """The largest magnitude that an entry of ΔW can take."""
        return self.bound

    def _numbers(self) -> tuple[float, float]:
        return scaling_and_omega(self.rank, self.alpha, self.bound, self.form)

    def reset_parameters(self) -> None:
        """Draw A uniformly from ±1/sqrt(K), as nn.Linear and LoRA do, and set B to zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        result: Tensor | None = None,
        give_up: bool = False,
    ) -> Tensor:
        """x [..., K], weight [N, K], bias [N] -> [..., N].

        With ``result`` [..., N] instead of weight and bias, returns result + x ΔWᵀ; see
        :meth:`add_to`.
        """
        term: dict[str, Any] = {
            **self._term(),
            "backend": self.backend,
            "dropout": self.dropout if self.training else 0.0,
        }
        if result is not None:
            return bounded_addition(result, x, self.A, self.B, give_up=give_up, **term)
        if weight is None:
            raise ValueError(
                "the adapter needs a weight, or the result of a base layer to add its term to"
            )
        return bounded_linear(x, weight, self.A, self.B, bias, **term)

    def add_to(self, result: Tensor, x: Tensor, *, give_up: bool = True) -> Tensor:
        """result + x ΔWᵀ, for the ``result`` [..., N] that a base layer computed from x.

        The caller must not use ``result`` afterwards, because the sum may reuse its memory. With
        ``give_up=False`` it is left unchanged, for a base whose hooks may have kept it.
        """
        # Goes through __call__, because the hooks that gather sharded A and B run there.
        return cast(Tensor, self(x, result=result, give_up=give_up))

    def _term(self) -> dict[str, Any]:
        return {"scaling": self.scaling, "omega": self.omega, "form": self.form}

    def delta_weight(self) -> Tensor:
        """ΔW, [N, K], fp32 (fp64 for fp64 factors)."""
        return formula.delta_weight(self.A, self.B, **self._term())

    @torch.no_grad()
    def bound_in_use(self) -> float:
        """RMS(ΔW) / bound: 0 for a new adapter, 1 if every sine is ±1.

        It is computed from r x r products of the factors' sines; in the product form from ΔW
        itself, a few rows at a time. If the factors are sharded, all processes must call this.
        """
        A, B = (whole(f).to(wide_dtype(f)) for f in (self.A, self.B))
        entries = A.shape[1] * B.shape[0]
        with without_autocast(A.device):
            if self.form == "product":
                rows = max(1, _ENTRIES // A.shape[1])
                sines = (torch.sin(self.omega * (b @ A)) for b in B.split(rows))
                return math.sqrt(sum(float(sine.square().sum()) for sine in sines) / entries)
            A, B = torch.sin(self.omega * A), torch.sin(self.omega * B)
            squares = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0)
            return math.sqrt(float(squares) / entries) / self.rank

    def get_extra_state(self) -> Tensor:
        """(alpha, bound) as fp64, so that a state dict carries the bound that it was trained with.

        The product form adds a third number, 1, which tells the two forms apart.
        """
        numbers = [self.alpha, self.bound, *([1.0] if self.form == "product" else [])]
        return torch.tensor(numbers, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError for a state that :meth:`get_extra_state` cannot have returned."""
        self.alpha, self.bound = self._numbers_of(state)

    def _numbers_of(self, state: Any) -> tuple[float, float]:
        expected = self.get_extra_state().shape
        vector = isinstance(state, Tensor) and state.dim() == 1 and state.is_floating_point()
        if vector and {len(state), *expected} == {2, 3}:
            theirs = "product" if len(state) == 3 else "factors"
            raise ValueError(
                f'it has form="{self.form}", but the state has form="{theirs}": create the adapter '
                "with the form that it was trained with"
            )
        if not vector or state.shape != expected:
            raise ValueError(
                f"its extra state must be a tensor of two numbers, alpha and bound, got {state!r}"
            )
        alpha, bound, *_ = state.tolist()
        alpha, bound = positive("alpha", alpha), positive("bound", bound)
        check_numbers(alpha, bound)
        return alpha, bound

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = f"{prefix}_extra_state"
        if key in state_dict and type(self).set_extra_state is not nn.Module.set_extra_state:
            try:  # before any tensor of this adapter is loaded
                self._numbers_of(state_dict[key])
            except ValueError as error:
                raise type(error)(f"the adapter {prefix.rstrip('.')!r}: {error}") from None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        dropout = f"dropout={self.dropout:g}, " if self.dropout else ""
        return (
            f"form={self.form!r}, rank={self.rank}, alpha={self.alpha:g}, bound={self.bound:g}, "
            f"{dropout}"
            f"scaling={self.scaling:g}, omega={self.omega:g}, backend={self.backend!r}"
        )


@torch.no_grad()
def bound_in_use(adapters: Sequence[BoundedAdapter]) -> float:
    """RMS(ΔW) / bound of adapters that run together, whose ΔW and bounds add up."""
    if len(adapters) == 1:
        return adapters[0].bound_in_use()
    factors = [(whole(a.A), whole(a.B), a._term()) for a in adapters]
    (_, K), (N, _) = factors[0][0].shape, factors[0][1].shape
    squares = 0.0
    for start in range(0, N, rows := max(1, _ENTRIES // K)):
        part = slice(start, start + rows)
        delta = sum(formula.delta_weight(A, B[part], **term) for A, B, term in factors)
        squares += float(cast(Tensor, delta).square().sum())
    bound = sum(each.largest for each in adapters)
    return math.sqrt(squares / (N * K)) / bound if bound else 0.0


class NamedAdapter(BoundedAdapter):
    """One of a layer's named adapters, whose alpha and bound are kept in its config, as in PEFT.

    ``scale`` multiplies s, and with it ΔW and the bound: |ΔW_ij| <= |scale|·bound. It is not saved.
    """

    scale: float = 1.0
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    @property
    def largest(self) -> float:
        """|scale|·bound."""
        return abs(self.scale) * self.bound

    @property
    def scaling(self) -> float:
        """``scale`` times the s of the form."""
        return self.scale * self._numbers()[0]  # torch.compile cannot read a property of super()

    def extra_repr(self) -> str:
        scale = "" if self.scale == 1 else f", scale={self.scale:g}"
        return super().extra_repr() + scale
