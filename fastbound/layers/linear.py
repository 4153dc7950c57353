"""FusedBoundedLinear: a frozen linear layer with a bounded low-rank adapter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastbound.layers.adapter import BoundedAdapter
from fastbound.layers.base import Adapted, is_conv1d, is_linear, weight_shape
from fastbound.layers.disabling import disabled_here
from fastbound.layers.settings import AdapterSettings, adapter_settings
from fastbound.operator.partition import partition
from fastbound.truth.formula import wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


class FusedBoundedLinear(nn.Module, Adapted):
    """``y = x (W + ΔW)ᵀ + b`` with W and b frozen, and ΔW made of the trained factors A and B.

        factors    ΔW = s · sin(ωB) sin(ωA)    s = bound / rank    ω = sqrt(alpha / bound)
        product    ΔW = s · sin(ω·B A)         s = bound           ω = alpha / (rank · bound)

    Near zero the adapter behaves as LoRA with slope alpha / rank, and |ΔW_ij| <= bound whatever
    the optimiser does.

    Args:
        in_features, out_features: K and N.
        rank: r >= 1.
        alpha: None means ``rank``.
        bound: a positive number, or one of these: None means ``alpha``; "0.5*spectral" means
            0.5 σ₁(W) / sqrt(NK) of this layer's weight, so that ‖ΔW‖_F <= 0.5 ‖W‖₂; "2*rms" means
            twice the weight's root mean square; other multiples work alike; "auto", the default of
            :meth:`from_linear`, means "0.5*spectral". A new layer's default is None, since the
            weight that it draws is not the one it will have.
        dropout: probability of the dropout of x before A in training; see :class:`BoundedAdapter`.
        bias: whether the frozen layer has a bias.
        device, dtype: of the frozen weight and bias, as for ``nn.Linear``.
        adapter_dtype: of A and B, independent of ``dtype``.
        backend: see :func:`fastbound.bounded_linear`.
        form: "factors" or "product".
        omega: ω instead of alpha; ``bound=None`` then means 1.

    A new layer initialises its weight as ``nn.Linear`` does; :meth:`from_linear` adopts an existing
    layer. ``weight`` keeps the layout of that layer: [N, K], or [K, N] for a transformers
    ``Conv1D`` (then ``fan_in_fan_out`` is True).

    Raises TypeError and ValueError, which name the value, for settings as :class:`BoundedAdapter`
    does; a call raises as :func:`fastbound.bounded_linear` does.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    adapter: BoundedAdapter
    disablers: int = 0  # number of open fastbound.disable_adapter contexts, over all threads

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        *,
        alpha: float | None = None,
        bound: float | str | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        form: str = "factors",
        omega: float | None = None,
    ) -> None:
        settings = adapter_settings(
            rank, alpha, bound, dropout, adapter_dtype, backend, form, omega
        )
        layer = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        super().__init__()
        self._adopt(layer, settings)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        rank: int = 8,
        *,
        alpha: float | None = None,
        bound: float | str | None = "auto",
        dropout: float = 0.0,
        adapter_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        form: str = "factors",
        omega: float | None = None,
    ) -> Self:
        """Adopt an ``nn.Linear`` or transformers ``Conv1D``: share its parameters, frozen.

        :class:`BoundedOverBase` also takes subclasses of ``nn.Linear``, and calls them.

        Raises TypeError for any other class, because subclasses may compute something else, and
        ValueError for settings out of range or a weight that the operator cannot read.
        """
        settings = adapter_settings(
            rank, alpha, bound, dropout, adapter_dtype, backend, form, omega
        )
        return cls.with_settings(layer, settings)

    @classmethod
    def with_settings(cls, layer: nn.Module, settings: AdapterSettings) -> Self:
        """:meth:`from_linear`, with its keywords as one object."""
        adopted = cls.__new__(cls)
        nn.Module.__init__(adopted)
        adopted._adopt(layer, settings)
        return adopted.train(layer.training)

    def _adopt(self, layer: nn.Module, settings: AdapterSettings) -> None:
        if not is_linear(layer):
            raise TypeError(
                f"expected nn.Linear or transformers Conv1D, got {type(layer).__qualname__}; "
                "BoundedOverBase.from_linear adapts subclasses of nn.Linear"
            )
        weight, bias = layer.weight, layer.bias
        if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
            raise TypeError("weight and bias must be parameters of the layer")
        spread = partition(weight)
        if spread is not None:
            raise ValueError(f"weight {spread}: adapt the layer first, then shard it")
        if not weight.is_floating_point():
            raise TypeError(f"weight is {weight.dtype}: dequantise the layer to a floating dtype")
        self.fan_in_fan_out = is_conv1d(layer)
        self.out_features, self.in_features = weight_shape(layer)
        self._make_adapter(settings.for_weight(weight), weight.device)
        # Freeze last, so that a layer refused above is left as it was.
        weight.requires_grad_(False)
        if bias is not None:
            bias.requires_grad_(False)
        self.weight, self.bias = weight, bias

    def _make_adapter(self, settings: AdapterSettings, device: torch.device) -> None:
        self.adapter = BoundedAdapter(
            self.in_features, self.out_features, device=device, **vars(settings)
        )

    @property
    def rank(self) -> int:
        """r, the rank of ΔW."""
        return self.adapter.rank

    @property
    def alpha(self) -> float:
        """LoRA's alpha: alpha / rank is the slope of ΔW at zero."""
        return self.adapter.alpha

    @property
    def bound(self) -> float:
        """The largest magnitude that an entry of ΔW can take."""
        return self.adapter.bound

    @property
    def scaling(self) -> float:
        """s of the adapter's form."""
        return self.adapter.scaling

    @property
    def omega(self) -> float:
        """ω of the adapter's form."""
        return self.adapter.omega

    @property
    def form(self) -> str:
        """ "factors" or "product"."""
        return self.adapter.form

    def __getstate__(self) -> dict[str, Any]:
        """Without the open contexts of `disable_adapter`, which are not for a copy of the layer."""
        return {key: value for key, value in vars(self).items() if key != "disablers"}

    @property
    def enabled(self) -> bool:
        """Whether the adapter runs in this thread; see :func:`fastbound.disable_adapter`."""
        return not self.disablers or not disabled_here(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if not self.enabled:
            return nn.functional.linear(x, self._weight(), self.bias)
        return self.adapter(x, self._weight(), self.bias)

    def running(self) -> list[BoundedAdapter]:
        """The adapter, or an empty list if it is disabled."""
        return [self.adapter] if self.enabled else []

    def obstacle(self, gathered: bool = False) -> str | None:
        """Names a disabled adapter, or a subclass, which may compute something else."""
        kind = type(self)
        if not self.enabled:
            return "has its adapter disabled"
        return None if kind is FusedBoundedLinear else f"is a {kind.__name__}"

    def delta_weight(self) -> Tensor:
        """ΔW, [N, K], fp32 (fp64 for fp64 factors)."""
        return self.adapter.delta_weight()

    @torch.no_grad()
    def to_linear(self, merge: bool = True) -> nn.Module:
        """A plain layer of the original class.

        With ``merge=True`` it has a new weight W + ΔW, added in fp32 and rounded once. With
        ``merge=False`` it shares the frozen weight and drops the adapter. Raises ValueError if
        :meth:`merge_obstacle` returns a reason.
        """
        if merge:
            self._check_merge()
        layer = self._plain_layer()
        layer.register_parameter("weight", self._merged_weight() if merge else self.weight)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    @torch.no_grad()
    def merge_obstacle(self) -> str | None:
        """Why ΔW cannot be merged into the weight, with the remedy; None if it can.

        One such reason is a sum that is not finite: the largest fp16 number is 65504.
        """
        for name, factor in (("A", self.adapter.A), ("B", self.adapter.B)):
            if not factor.isfinite().all():
                return (
                    f"its adapter.{name} holds a NaN or an infinity: go back to an adapter saved "
                    "earlier"
                )
        weight = self.weight
        largest = torch.linalg.vector_norm(weight, math.inf).item() if weight.numel() else 0.0
        if not largest < math.inf:
            return "its weight itself holds a NaN or an infinity: load the base model again"
        # Usually the bound alone shows that every entry is finite.
        if largest + self.bound <= 0.999 * torch.finfo(weight.dtype).max:
            return None
        if self._merged_weight().isfinite().all():
            return None
        return (
            f"W + ΔW is not finite in {weight.dtype}, with |W| up to {largest:g} and |ΔW| up "
            f"to {self.bound:g}: merge it in a wider dtype, model.float() first"
        )

    def _check_merge(self) -> None:
        obstacle = self.merge_obstacle()
        if obstacle is not None:
            raise ValueError(f"cannot be merged: {obstacle}")

    def _merged_weight(self) -> nn.Parameter:
        """W + ΔW in W's layout and dtype, added in fp32 (fp64 if either is) and rounded once."""
        delta = self.delta_weight()
        stored = delta.t() if self.fan_in_fan_out else delta
        merged = (self.weight.to(wide_dtype(self.weight)) + stored).to(self.weight.dtype)
        return nn.Parameter(merged, requires_grad=False)

    def _plain_layer(self) -> nn.Module:
        if self.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                return Conv1D(self.out_features, self.in_features)
        return nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )

    def _weight(self) -> Tensor:
        """The weight as [N, K]; for a Conv1D a transposed view."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
