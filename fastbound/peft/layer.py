"""BoundedLayer: PEFT's layer around a base layer, with the adapters beside it by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from fastbound.layers.adapter import BoundedAdapter, NamedAdapter
from fastbound.layers.base import (
    Adapted,
    features,
    hooked_everywhere,
    is_conv1d,
    is_linear,
    is_quantised,
    is_watched,
    keeps_no_output,
    tensor_obstacle,
)
from fastbound.layers.over_base import base_merge_obstacle, check_result
from fastbound.layers.settings import AdapterSettings
from fastbound.truth.formula import wide_dtype


class _Scalings(Mapping[str, float]):
    """s by adapter name, computed when it is read."""

    def __init__(self, adapters: Any) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> float:
        return float(self._adapters[name].scaling)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


BASE_ROWS = "__base__"  # PEFT's name for rows of a batch that use no adapter


class BoundedLayer(nn.Module, BaseTunerLayer, Adapted):
    """``base_layer(x)`` plus the active adapters' ``x ΔWᵀ``.

    With one active adapter on a plain ``nn.Linear`` or ``Conv1D`` this is one call of the operator,
    as in `FusedBoundedLinear`. In all other cases (several active adapters, a base that is
    quantised, offloaded or has hooks) the base layer runs and each adapter's term is added to its
    result; :meth:`obstacle` names the reason.

    A and B live in ``fastbound_ab.<adapter>``. They are fp32 whatever the base is, unless PEFT is
    told ``autocast_adapter_dtype=False``.
    """

    adapter_layer_names = ("fastbound_ab",)
    # For PEFT's `disable_input_dtype_casting`: x is never cast.
    cast_input_dtype_enabled = False
    # Inherited from BaseTunerLayer; repeated because nn.Module hides their types.
    active_adapters: list[str]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fastbound_ab = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.out_features, self.in_features = features(base_layer)

    def add_adapter(self, name: str, settings: AdapterSettings, *, zero: bool = True) -> None:
        """Add an adapter of that name; with ``zero=False`` B is random, too."""
        adapter = NamedAdapter(
            self.in_features, self.out_features, device=self.weight.device, **vars(settings)
        )
        if not zero:
            nn.init.kaiming_uniform_(adapter.B, a=math.sqrt(5))
        self.fastbound_ab[name] = adapter.train(self.training)
        self.set_adapter(self.active_adapters)

    @property
    def adapter(self) -> BoundedAdapter | None:
        """The active adapter, or None if there is none or more than one."""
        active = self.running()
        return active[0] if len(active) == 1 else None

    def running(self) -> list[BoundedAdapter]:
        """The adapters whose terms the forward adds, in the order in which they were activated."""
        if self.disable_adapters or self.merged:
            return []
        adapters: Any = self.fastbound_ab
        return [adapters[name] for name in self.active_adapters if name in adapters]

    def obstacle(self, gathered: bool = False) -> str | None:
        """Why the base layer runs by itself, or None if base and adapter run as one operator."""
        if self.disable_adapters:
            return "has its adapters disabled"
        if self.merged:
            return f"has {', '.join(map(repr, self.merged_adapters))} merged into its weight"
        active = self.running()
        if len(active) > 1:
            return f"has {len(active)} active adapters"
        return _base_obstacle(self.base_layer, gathered)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N]; ``adapter_names`` names each row's adapter, or `BASE_ROWS`."""
        names = kwargs.pop("adapter_names", None)
        if names is not None and not self.disable_adapters:
            return self._mixed(x, names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self.running()
        if (
            len(active) == 1
            and not (args or kwargs)
            and _base_obstacle(self.base_layer, True) is None
        ):
            weight = self.weight.t() if self.fan_in_fan_out else self.weight
            y: Tensor = active[0](x, weight, self.bias)
            return y
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if active:
            check_result(self.base_layer, x, result)
        own = keeps_no_output(self.base_layer)
        for adapter in active:
            result = adapter.add_to(result, x, give_up=own)
            own = True  # a sum that nobody else has seen
        return result

    def _mixed(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Run each row of the batch with the adapter named for it, as LoRA does."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                f"`unmerge_adapter` first. {', '.join(map(repr, self.merged_adapters))} would act "
                "on every row of the batch"
            )
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)}: give a name for each row; a layer whose input merges "
                "the rows of a batch, such as OPT's fc1, cannot be used with adapter_names"
            )
        result: Tensor = self.base_layer(x, *args, **kwargs)
        adapters: Any = self.fastbound_ab
        for name in dict.fromkeys(names):
            if name in adapters:  # not BASE_ROWS, nor one that other layers have
                rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
                result = result.index_copy(0, rows, adapters[name].add_to(result[rows], x[rows]))
        return result

    @property
    def scaling(self) -> Mapping[str, float]:
        """s of each adapter, by name; :meth:`set_scale` changes it."""
        return _Scalings(self.fastbound_ab)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the original ΔW by ``scale``; its bound then is |scale|·bound.

        As in LoRA, this does nothing if the layer has no such adapter, and the scale is not saved.
        Raises ValueError for a scale that is not finite and for an adapter that is merged.
        """
        adapters: Any = self.fastbound_ab
        if adapter not in adapters:
            return
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        if adapter in self.merged_adapters:
            raise ValueError(f"{adapter!r} is merged into the weight: call unmerge_adapter() first")
        adapters[adapter].scale = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by ``scale``, see :meth:`set_scale`."""
        self._rescale(lambda now: now * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by ``scale``; None sets it back to 1."""
        if scale == 0:
            raise ValueError("scale must not be 0; give None to set the scale back to 1")
        self._rescale(lambda now: 1.0 if scale is None else now / scale)

    def _rescale(self, change: Callable[[float], float]) -> None:
        adapters: Any = self.fastbound_ab
        for name in self.active_adapters:
            if name in adapters:
                self.set_scale(name, change(adapters[name].scale))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the adapters to the base weight, in fp32 and rounded once per adapter.

        Raises ValueError, before the weight is changed, if the sum is not finite. PEFT's
        ``safe_merge`` asks for this check, which is always made here.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.fastbound_ab:
                merged = self._moved_weight(name, 1)
                if not merged.isfinite().all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. {_not_finite(name, merged.dtype)}"
                    )
                self.base_layer.weight.data = merged
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged adapters' ΔW again: the base weight, up to one rounding for each."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.fastbound_ab:
                self.base_layer.weight.data = self._moved_weight(name, -1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the layout of the base weight."""
        delta: Tensor = self.fastbound_ab[adapter].delta_weight()  # type: ignore[operator]
        return delta.t() if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @torch.no_grad()
    def merge_obstacle(self) -> str | None:
        """Why the active adapters cannot be merged, with the remedy; None if they can."""
        obstacle = self.base_merge_obstacle()
        if obstacle is not None:
            return obstacle
        for name in check_adapters_to_merge(self):
            if name in self.fastbound_ab and not self._moved_weight(name, 1).isfinite().all():
                return f"W + ΔW is not finite. {_not_finite(name, self.weight.dtype)}"
        return None

    def base_merge_obstacle(self) -> str | None:
        """Why nothing can be merged into the base's weight, with the remedy; None if it can."""
        weight = self.weight
        if type(weight) is not nn.Parameter and is_quantised(self.base_layer) is None:
            return (
                f"its base holds the weight as {type(weight).__name__}: load the model as plain "
                "tensors, load the adapter into it, and merge there"
            )
        return base_merge_obstacle(self.base_layer)

    @torch.no_grad()
    def to_linear(self, merge: bool = True) -> nn.Module:
        """The base layer; with ``merge`` the active adapters are merged into it first."""
        if merge:
            self.merge()
        return self.base_layer

    def _moved_weight(self, name: str, sign: int) -> Tensor:
        obstacle = self.base_merge_obstacle()
        if obstacle is not None:
            raise TypeError(f"this layer cannot be merged: {obstacle}")
        weight, delta = self.weight, self.get_delta_weight(name)
        return (weight.to(wide_dtype(weight)) + sign * delta).to(weight.dtype)

    def __repr__(self) -> str:
        return "fastbound." + super().__repr__()


def _not_finite(name: str, dtype: torch.dtype) -> str:
    return (
        f"The adapter {name} seems to be broken, or too large for {dtype}: go back to one saved "
        "earlier, or load the model in float32"
    )


def _base_obstacle(base: Any, gathered: bool = False) -> str | None:
    """Why the operator cannot replace the base's call; cheap, because every forward asks."""
    if not is_linear(base):
        return f"wraps a {type(base).__name__}"
    if is_watched(base):
        return "has a base with hooks or a forward of its own, which must be called"
    if hooked_everywhere():
        return "has a base that must be called: hooks are set on all modules"
    return tensor_obstacle({"weight": base.weight, "bias": base.bias}, gathered)
