"""Tensors that are partitioned over processes: how to recognise, gather and create them."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor, nn

GATHER = (
    "a kernel would see only this process's part of it. fastbound.shard(model) (FSDP2) and "
    "DeepSpeed's ZeRO stages 1 and 2 pass it whole; tensor parallelism and an ungathered ZeRO-3 do "
    "not"
)


def partition(tensor: Tensor) -> str | None:
    """What partitions a tensor over processes, so that a kernel would see only a part, or None."""
    if is_dtensor(tensor):
        return "is a DTensor"
    # A parameter that DeepSpeed has gathered has its elements; otherwise it has none.
    if tensor.numel() == 0 and hasattr(tensor, "ds_id"):
        return "is partitioned by DeepSpeed ZeRO-3"
    return None


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. If torch.distributed.tensor is not loaded, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered_modules(model: nn.Module) -> set[Any]:
    """The modules whose DTensors an FSDP2 unit gathers before they run."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return set()
    units = [m for m in model.modules() if isinstance(m, module.FSDPModule)]
    return {part for unit in units for part in unit.modules()}


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; for a DTensor this is a collective, which all processes must call."""
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value` partitioned like `target`, if `target` is a DTensor, or `value` itself."""
    if not is_dtensor(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    place: Any = target
    return distribute_tensor(value.to(target.device), place.device_mesh, place.placements)
