"""BoundedLayer: PEFT's layer around a base layer, with the adapters beside it by name."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    is_watched,
    keeps_no_output,
    tensor_obstacle,
)
from fastbound.layers.over_base import check_result
from fastbound.layers.settings import AdapterSettings


class BoundedLayer(nn.Module, BaseTunerLayer, Adapted):
    """``base_layer(x)`` plus the active adapters' ``s · (x sin(ωA)ᵀ) sin(ωB)ᵀ``.

    One active adapter over a plain ``nn.Linear`` or ``Conv1D`` is one call of the operator, the
    same as `FusedBoundedLinear` makes. Everything else, several adapters at once, a quantised base,
    one with hooks or offloading, lets the base layer run and adds each adapter to its result;
    :meth:`obstacle` names the reason.

    A and B live in ``fastbound_ab.<adapter>`` and are fp32 whatever the base is.
    """

    adapter_layer_names = ("fastbound_ab",)
    # Inherited from BaseTunerLayer, whose types nn.Module's hide.
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
        """A new adapter of that name; ``zero=False`` draws B, too."""
        adapter = NamedAdapter(
            self.in_features, self.out_features, device=self.weight.device, **vars(settings)
        )
        if not zero:
            nn.init.kaiming_uniform_(adapter.B, a=math.sqrt(5))
        self.fastbound_ab[name] = adapter.train(self.training)
        self.set_adapter(self.active_adapters)

    @property
    def adapter(self) -> BoundedAdapter | None:
        """The one adapter that is active, or None where there is none or more than one."""
        active = self.running()
        return active[0] if len(active) == 1 else None

    def running(self) -> list[BoundedAdapter]:
        """The adapters whose terms a forward adds, in the order they were activated."""
        if self.disable_adapters or self.merged:
            return []
        adapters: Any = self.fastbound_ab
        return [adapters[name] for name in self.active_adapters if name in adapters]

    def obstacle(self, gathered: bool = False) -> str | None:
        """Why the base layer runs by itself, or None where base and adapter are one operator."""
        if self.disable_adapters:
            return "has its adapters disabled"
        if self.merged:
            return f"has {', '.join(map(repr, self.merged_adapters))} merged into its weight"
        active = self.running()
        if len(active) > 1:
            return f"has {len(active)} active adapters"
        return _base_obstacle(self.base_layer, gathered)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N]."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: batches that mix adapters are for PEFT's LoRA alone")
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

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the adapters to the base weight, in fp32 and rounded once for each.

        ``safe_merge`` raises ValueError, before the weight is changed, where the sum is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.fastbound_ab:
                merged = self._moved_weight(name, 1)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(
                        "NaNs detected in the merged weights. "
                        f"The adapter {name} seems to be broken"
                    )
                self.base_layer.weight.data = merged
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged adapters' ΔW out again: the base weight, to one rounding for each."""
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

    def _moved_weight(self, name: str, sign: int) -> Tensor:
        weight, delta = self.weight, self.get_delta_weight(name)
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise TypeError(
                f"the base weight is a {type(weight).__name__} {weight.dtype}, into which nothing "
                "can be merged: load the model without quantisation first"
            )
        return (weight.to(delta.dtype) + sign * delta).to(weight.dtype)

    def __repr__(self) -> str:
        return "fastbound." + super().__repr__()


def _base_obstacle(base: Any, gathered: bool = False) -> str | None:
    """Why the operator cannot take the base's place: asked in every forward, so kept cheap."""
    if not is_linear(base):
        return f"wraps a {type(base).__name__}"
    if is_watched(base):
        return "has hooks or a forward of its own on its base, which must be called"
    if hooked_everywhere():
        return "has a base that must be called: hooks are set on all modules"
    return tensor_obstacle({"weight": base.weight, "bias": base.bias}, gathered)
