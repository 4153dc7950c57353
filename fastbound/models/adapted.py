"""The adapted layers of a model, the blocks that hold them, and which blocks run fused."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fastbound.layers.base import Adapted
from fastbound.layers.conversion import swap
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.layers.mlp import FusedBoundedMLP, obstacle


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Name -> layer, like `injected_layers` but including PEFT's bounded layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def injected_layers(model: nn.Module) -> dict[str, FusedBoundedLinear]:
    """Name -> layer, for every `FusedBoundedLinear`; a shared layer once, by its first name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedBoundedLinear)}


def came_with_adapter(model: nn.Module) -> bool:
    """Whether transformers found PEFT adapters beside this model and loaded them with it."""
    return bool(getattr(model, "peft_config", None)) and not hasattr(model, "merge_and_unload")


def other_adapters(model: nn.Module) -> dict[str, Any]:
    """Name -> layer, for every layer with adapters of PEFT's other methods."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    inside = {
        part
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for part in module.modules()
    }
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, Adapted)
        and module not in inside
    }


def fuse(model: nn.Module) -> None:
    """Replace every block inside `model` that can be fused by a `FusedBoundedMLP`."""
    blocks = [m for m in adapted_blocks(model).values() if not isinstance(m, FusedBoundedMLP)]
    swap(model, {m: FusedBoundedMLP(m) for m in blocks if m is not model and obstacle(m) is None})


def adapted_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, for every module that has an adapted layer as a direct child."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(child, Adapted) for child in module.children())
    }


def unfused_reason(name: str, block: nn.Module, gathered: bool = False) -> str | None:
    """Why a module of `adapted_blocks` runs layer by layer, or None if it runs as one operator."""
    reason = obstacle(block, gathered)
    if reason is not None or isinstance(block, FusedBoundedMLP):
        return reason
    if not name:
        return "it cannot be replaced in place: use FusedBoundedMLP.from_mlp"
    return "was injected with fuse_mlp=False"
