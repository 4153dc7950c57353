"""The parts of an MLP block, and why they cannot run as one operator."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbound.layers.adapter import BoundedAdapter, NamedAdapter
from fastbound.layers.base import Adapted, is_linear, is_watched, tensor_obstacle, weight_shape
from fastbound.layers.forms import Form, activation_name
from fastbound.layers.over_base import BoundedOverBase
from fastbound.truth.formula import ACTIVATIONS


def adapted_parts(block: nn.Module, form: Form) -> dict[str, Adapted]:
    """The adapted projections by name, first to last."""
    layers: dict[str, Any] = {name: block._modules[name] for name in form.projections}
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, Adapted) and layer.adapter is not None
    }


def parts_obstacle(
    block: nn.Module, form: Form, plain: bool = False, gathered: bool = False
) -> str | None:
    """Why these parts cannot run as one operator, or None; cheap, as every forward asks.

    ``plain`` skips what adapting is going to change: whether weights are frozen, and the adapters.
    """
    layers: dict[str, Any] = {name: block._modules[name] for name in form.projections}
    for name, layer in layers.items():
        reason = _layer_obstacle(layer, plain, gathered)
        if reason is not None:
            return f"its {name} {reason}"
    activation = getattr(block, form.activation, None)
    if activation_name(activation) is None:
        return (
            f"its {form.activation} is {_described(activation)}: "
            f"the supported activations are {', '.join(ACTIVATIONS)}"
        )
    if isinstance(activation, nn.Module) and is_watched(activation):
        return f"its {form.activation} has hooks or a forward of its own"
    first = layers[form.up].weight
    for name, layer in layers.items():
        weight = layer.weight
        if weight.dtype is not first.dtype or weight.device != first.device:
            return (
                f"its {name} is {weight.dtype} on {weight.device} "
                f"and its {form.up} {first.dtype} on {first.device}"
            )
    reason = _sizes_obstacle(layers, form)
    if reason is not None or plain:
        return reason
    adapters = [layer.adapter for layer in adapted_parts(block, form).values()]
    if not adapters:
        return "none of its projections is adapted"
    if len({adapter.backend for adapter in adapters}) > 1:
        return "its projections ask for different backends"
    if len({adapter.form for adapter in adapters}) > 1:
        return "its projections have adapters of different forms"
    return None


def _layer_obstacle(layer: Any, plain: bool, gathered: bool) -> str | None:
    if isinstance(layer, BoundedOverBase):
        return f"is adapted over its base: {layer.reason}"
    if isinstance(layer, Adapted):
        reason = layer.obstacle(gathered)
        if reason is not None:
            return reason
        adapter, tensors = layer.adapter, {"weight": layer.weight, "bias": layer.bias}
        if adapter is not None:
            if type(adapter) not in (BoundedAdapter, NamedAdapter):
                return f"has a {type(adapter).__name__} as its adapter"
            if is_watched(adapter):
                return "has an adapter with hooks or a forward of its own"
            tensors = {"A": adapter.A, "B": adapter.B, **tensors}
    elif layer is not None and is_linear(layer):
        tensors = {"weight": layer.weight, "bias": layer.bias}
    else:
        return f"is a {type(layer).__name__}"
    if is_watched(layer):
        return "has hooks or a forward of its own, so that it must be called"
    reason = tensor_obstacle(tensors, gathered)
    if reason is not None:
        return reason
    for name in ("weight", "bias"):
        if tensors[name] is not None and tensors[name].requires_grad and not plain:
            return f"trains its {name}, for which the operator computes no gradient"
    return None


def _sizes_obstacle(layers: dict[str, Any], form: Form) -> str | None:
    (made, width), (_, taken) = (weight_shape(layers[name]) for name in (form.up, form.down))
    if form.packed:
        if made != 2 * taken:
            return f"its {form.up} has {made} outputs, but {form.down} needs it to have {2 * taken}"
        return None
    if form.gate is not None and weight_shape(layers[form.gate]) != (made, width):
        N, K = weight_shape(layers[form.gate])
        return f"its {form.gate} [K {K}, N {N}] and {form.up} [K {width}, N {made}] differ in size"
    if made != taken:
        return f"its {form.up} has {made} outputs, but {form.down} takes {taken} inputs"
    return None


def _described(activation: object) -> str:
    name = getattr(activation, "__qualname__", None) or type(activation).__qualname__
    return f"{getattr(activation, '__module__', type(activation).__module__)}.{name}"
