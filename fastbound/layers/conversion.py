"""One layer for another: which linear ones can be adapted, and the replacing, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fastbound.layers.base import (
    QUANTISED,
    foreign_pre_hooks,
    is_adaptable,
    offloaded,
    over_reason,
)
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.layers.over_base import BoundedOverBase
from fastbound.layers.readers import weight_reader
from fastbound.layers.settings import AdapterSettings


def refusal(model: nn.Module, name: str, *, loaded: bool = True) -> str | None:
    """Why the module of that name cannot be adapted, or None when it can.

    Args:
        loaded: False asks of a model without weights whether it could be adapted with them.
    """
    layer = model.get_submodule(name)
    if not is_adaptable(layer):
        kind = type(layer).__name__
        return f"is a {kind}: only nn.Linear, its subclasses and Conv1D are adapted"
    if foreign_pre_hooks(layer):
        return (
            "has forward pre-hooks, which may change x for it alone and not for the adapter: "
            "register them after injection"
        )
    if "forward" in vars(layer) and not offloaded(layer):
        return "has a forward of its own, which need not be that of a linear layer"
    for key, parameter in layer.named_parameters():
        held = type(parameter)
        if held is not nn.Parameter and not held.__module__.startswith(QUANTISED):
            return f"its {key} is a {held.__name__}, not a plain parameter: inject before sharding"
        if hasattr(parameter, "ds_id"):
            return (
                f"its {key} is partitioned by DeepSpeed ZeRO-3: inject before deepspeed.initialize"
            )
        if loaded and parameter.is_meta and not offloaded(layer):
            return f"its {key} is on the meta device: load the model first"
        if over_reason(layer) is None and not parameter.is_floating_point():
            return f"its {key} is {parameter.dtype}, not floating point"
    return tied(model, layer) or weight_reader(model, name)


def tied(model: nn.Module, layer: nn.Module) -> str | None:
    """Which module of the model shares a layer's weight, so that ΔW would go into both; or None."""
    own = {p for key, p in layer.named_parameters() if key != "bias"}
    inside = set(layer.modules())
    for owner, module in model.named_modules():
        if module not in inside and any(p in own for p in module.parameters(recurse=False)):
            return f"its weight is tied to {owner}, which a merge would untie"
    return None


def convert(model: nn.Module, settings: Mapping[str, AdapterSettings]) -> None:
    """Adapt the named layers: fused with their weight, or over the layer where it must be.

    Freezes all other parameters. All layers are made before the first is put in place; when one
    refuses its settings, or its place refuses it, the model is left as it was.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    made: dict[nn.Module, nn.Module] = {}
    try:
        for name, each in settings.items():
            layer = model.get_submodule(name)
            kind = FusedBoundedLinear if over_reason(layer) is None else BoundedOverBase
            try:
                made[layer] = kind.with_settings(layer, each)
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from error
        for parameter in trained:
            parameter.requires_grad_(False)
        swap(model, made)
    except BaseException:  # layers that were made have frozen the weights they share
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


def swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[module]` wherever `module` hangs in `model`, under every name it has, or nowhere."""
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module in new:
                parent, _, child = name.rpartition(".")
                owner = model.get_submodule(parent)
                if owner is not new[module]:  # which keeps what it stands for
                    setattr(owner, child, new[module])
                    done.append((owner, child, module))
    except BaseException:
        for owner, child, module in reversed(done):
            setattr(owner, child, module)
        raise
