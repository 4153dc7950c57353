"""What of a model is adapted: its layers, the blocks that hold them, and which run fused."""

from __future__ import annotations

from torch import nn

from fastbound.layers.base import Adapted
from fastbound.layers.conversion import swap
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.layers.mlp import FusedBoundedMLP, obstacle


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Name -> layer, as `injected_layers`, PEFT's bounded layers included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def injected_layers(model: nn.Module) -> dict[str, FusedBoundedLinear]:
    """Name -> layer, for every `FusedBoundedLinear` of `model`; a shared one once, first name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedBoundedLinear)}


def fuse(model: nn.Module) -> None:
    """Put a `FusedBoundedMLP` in the place of every block that can be one, inside `model`."""
    blocks = [m for m in adapted_blocks(model).values() if not isinstance(m, FusedBoundedMLP)]
    swap(model, {m: FusedBoundedMLP(m) for m in blocks if m is not model and obstacle(m) is None})


def adapted_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, for every module that holds an adapted layer as a direct part."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(child, Adapted) for child in module.children())
    }


def unfused_reason(name: str, block: nn.Module, gathered: bool = False) -> str | None:
    """Why a module of `adapted_blocks` runs layer by layer, or None where it is one operator."""
    reason = obstacle(block, gathered)
    if reason is not None or isinstance(block, FusedBoundedMLP):
        return reason
    if not name:
        return "is the model itself, which is not replaced in place: use FusedBoundedMLP.from_mlp"
    return "was injected with fuse_mlp=False"
