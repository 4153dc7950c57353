"""One linear layer for another: which can be replaced, and the replacing, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastbound.linear import FusedBoundedLinear, is_conv1d
from fastbound.partition import is_dtensor


def refusal(model: nn.Module, name: str) -> str | None:
    """Why the module of that name cannot be replaced, or None when it can."""
    layer = model.get_submodule(name)
    if not is_linear(layer):
        return f"is a {type(layer).__name__}: only exact nn.Linear and Conv1D are replaced"
    if hooked(layer):
        return "has forward or backward hooks, which a replacement would lose"
    if "forward" in vars(layer) or hasattr(layer, "_hf_hook"):
        return "has a forward of its own (accelerate's offloading?), which a replacement would lose"
    weight = layer.weight
    if type(weight) is not nn.Parameter:
        kind = type(weight).__name__
        return f"its weight is a {kind}, not a plain parameter: inject before sharding"
    if hasattr(weight, "ds_id"):
        return "its weight is partitioned by DeepSpeed ZeRO-3: inject before deepspeed.initialize"
    if weight.is_meta:
        return "its weight is on the meta device: load the model first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    for owner, module in model.named_modules():
        if module is not layer and any(p is weight for p in module.parameters(recurse=False)):
            return f"its weight is tied to {owner}, which a merge would untie"
    return None


def convert(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the named layers by `FusedBoundedLinear.from_linear(layer, **settings[name])`.

    Freezes all other parameters. All layers are made before the first is put in place; when one
    refuses its settings, the model is left as it was.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    made: dict[nn.Module, nn.Module] = {}
    try:
        for name, each in settings.items():
            layer = model.get_submodule(name)
            made[layer] = FusedBoundedLinear.from_linear(layer, **each)
    except BaseException:
        for parameter in trained:  # the layers made so far have frozen the weights they share
            parameter.requires_grad_(True)
        raise
    for parameter in trained:
        parameter.requires_grad_(False)
    swap(model, made)


def swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[module]` wherever `module` hangs in `model`, under every name it has."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[module])


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def is_watched(module: nn.Module) -> bool:
    """Whether something depends on this module being called: hooks, or accelerate's offloading."""
    return hooked(module) or "forward" in module.__dict__ or "_hf_hook" in module.__dict__


def tensor_obstacle(tensors: Mapping[str, Tensor | None], gathered: bool = False) -> str | None:
    """Why a layer's tensors cannot be read outside its own forward, or None.

    ``gathered``: DTensors are plain tensors by the time of a forward, as in a unit of FSDP2.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        ordinary = type(tensor) is nn.Parameter or type(tensor) is Tensor
        if not ordinary and not (gathered and is_dtensor(tensor)):
            return f"has a {type(tensor).__name__} for {name}, which the layer itself must handle"
        if hasattr(tensor, "ds_id"):
            return f"has its {name} partitioned by DeepSpeed ZeRO-3, which gathers it for the layer"
        if not tensor.is_floating_point():
            return f"has its {name} in {tensor.dtype}"
    return None


def hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)
