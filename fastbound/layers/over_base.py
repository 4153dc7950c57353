"""BoundedOverBase: the adapter on top of a layer that has to compute x Wᵀ itself."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastbound.layers.base import (
    features,
    has_linear_forward,
    is_adaptable,
    is_conv1d,
    is_quantised,
    keeps_no_output,
    offloaded,
    over_reason,
    weight_hooks,
)
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.layers.settings import AdapterSettings


class BoundedOverBase(FusedBoundedLinear):
    """``y = base_layer(x) + x ΔWᵀ``: the adapter's term is added to the base layer's output.

    This is for a base whose weight the operator cannot read (quantised, offloaded) or whose call
    does more than x Wᵀ + b (a subclass, hooks, a weight recomputed in each call). ``base_layer`` is
    the original layer, frozen but otherwise unchanged: hooks on it see its own output, without the
    adapter's term.

    :meth:`from_linear` takes an ``nn.Linear``, one of its subclasses or a transformers ``Conv1D``.
    A bound in units of the weight ("2*rms", "0.5*spectral") reads the weight once, dequantising or
    loading it for that. Raises TypeError for any other class, and ValueError for settings out of
    range, for backend="fused", and for such a bound if the weight cannot be read.

    ``reason`` says why the base is called, as in ``fastbound.explain``: "base is Linear4bit".
    """

    base_layer: nn.Module
    reason: str

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("BoundedOverBase adapts an existing layer: use BoundedOverBase.from_linear")

    def _adopt(self, layer: nn.Module, settings: AdapterSettings) -> None:
        if not is_adaptable(layer):
            raise TypeError(
                f"expected an nn.Linear or transformers Conv1D, got {type(layer).__qualname__}"
            )
        if settings.backend == "fused":
            raise ValueError(
                f'backend="fused" cannot be used with a {type(layer).__name__}, which computes '
                'x Wᵀ itself: use "auto"'
            )
        self.reason = over_reason(layer) or "base is to be called"
        self.fan_in_fan_out = is_conv1d(layer)
        self.out_features, self.in_features = features(layer)
        self._make_adapter(for_weight(settings, layer), _device(layer))
        # Freeze last, so that a layer refused above is left as it was.
        layer.requires_grad_(False)
        self.base_layer = layer

    # For other code that asks a linear layer for its dtype or device; never read here.
    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The base's weight, in the form in which the base stores it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The base's bias."""
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of the base's output; the base gets all arguments.

        Raises RuntimeError if x requires a gradient and the base does not pass one on, and
        TypeError if the base returns something other than a tensor.
        """
        result = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return cast(Tensor, result)
        check_result(self.base_layer, x, result)
        # If the base may have kept its output, the term must not be added to it in place.
        return self.adapter.add_to(result, x, give_up=keeps_no_output(self.base_layer))

    @torch.no_grad()
    def to_linear(self, merge: bool = True) -> nn.Module:
        """The base layer, or with ``merge=True`` a copy of it with the weight W + ΔW.

        Raises ValueError, naming the remedy, if :meth:`merge_obstacle` returns a reason.
        """
        if not merge:
            return self.base_layer
        self._check_merge()
        merged = copy.copy(self.base_layer)
        merged._parameters = {**self.base_layer._parameters, "weight": self._merged_weight()}
        return merged.train(self.training)

    def merge_obstacle(self) -> str | None:
        """Why ΔW cannot be merged into the base's weight, with the remedy; None if it can."""
        return base_merge_obstacle(self.base_layer) or super().merge_obstacle()

    def extra_repr(self) -> str:
        return self.reason


def base_merge_obstacle(base: nn.Module) -> str | None:
    """Why nothing can be merged into the weight of a base layer, with the remedy, or None."""
    kind = type(base).__name__
    if offloaded(base):
        return (
            "its base is offloaded: load the model without offloading, load the adapter into "
            "it, and merge there"
        )
    if parametrize.is_parametrized(base):
        return (
            f"the weight of its base, a {kind}, is made by a parametrization: call "
            "torch.nn.utils.parametrize.remove_parametrizations(layer.base_layer, 'weight')"
        )
    made = weight_hooks(base)
    if made:
        return (
            f"the weight of its base is recomputed in each call by {type(made[0]).__name__}: "
            "remove that from layer.base_layer with torch.nn.utils first"
        )
    if base._forward_hooks:
        return (
            "forward hooks of its base see the base's output without ΔW, and may change it: "
            "remove them from layer.base_layer"
        )
    quantised = is_quantised(base)
    if quantised is not None:
        return (
            f"{quantised}, and a ΔW smaller than its steps would be rounded away: save the "
            "adapter, load it into the model in a floating dtype, and merge there"
        )
    if not has_linear_forward(base):
        return (
            f"its base is a {kind} with a forward of its own, which may not compute x Wᵀ: "
            "keep the adapter separate"
        )
    return None


def check_result(base: nn.Module, x: Tensor, result: Any) -> None:
    """Raise if a low-rank term of x cannot be added to the base's result for x.

    Raises TypeError if the result is not a tensor, and RuntimeError if x requires a gradient but
    the result is not connected to it (bitsandbytes' packed weights only warn, in backward).
    """
    kind = type(base).__name__
    if not isinstance(result, Tensor):
        raise TypeError(
            f"the base, a {kind}, returns a {type(result).__name__}, not a tensor, so that "
            "nothing can be added to it: leave the layer out of target_modules"
        )
    if not (x.requires_grad and torch.is_grad_enabled()):
        return
    state = getattr(base._parameters.get("weight"), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False) or (
        not result.requires_grad and type(base).__module__.startswith("bitsandbytes.")
    ):
        raise RuntimeError(
            f"the base, a {kind}, gives x no gradient. On the CPU bitsandbytes repacks the weight "
            "of a 4-bit layer for inference when it is first called in eval mode: load the model "
            "again and call model.train() before the first call"
        )
    if not result.requires_grad:
        raise RuntimeError(
            f"the base, a {kind}, gives x no gradient: its forward detaches x or runs under "
            "no_grad. Pass an x that requires no gradient, or leave the layer out of target_modules"
        )


def _device(layer: Any) -> torch.device:
    if offloaded(layer) and layer._hf_hook.execution_device is not None:
        return torch.device(layer._hf_hook.execution_device)
    return next(layer.parameters()).device


def for_weight(settings: AdapterSettings, layer: Any) -> AdapterSettings:
    """The settings with the bound as a number; dequantises or loads the weight to read it once."""
    bound = settings.bound
    if not isinstance(bound, str):
        return settings
    from accelerate.utils import align_module_device
    from peft.utils.integrations import dequantize_module_weight

    with torch.no_grad(), align_module_device(layer):
        weight: Tensor = layer.weight
        if not (weight.is_floating_point() and type(weight) is nn.Parameter):
            weight = dequantize_module_weight(layer)
        if not weight.is_floating_point():
            raise ValueError(
                f'bound="{bound}" cannot read the {weight.dtype} weight of a '
                f"{type(layer).__name__}: "
                "give the bound as a number"
            )
        return settings.for_weight(weight)
