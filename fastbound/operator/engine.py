"""Which engine makes a call's products, as the plan says: one key, one cache."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fastbound.dispatch.device import Device
from fastbound.dispatch.plan import Plan, PlanKey, plan_for, product_plan
from fastbound.operator.torch_engine import TorchEngine

if TYPE_CHECKING:
    from fastbound.operator.triton_engine import TritonEngine

Engine: TypeAlias = "TorchEngine | TritonEngine"


@lru_cache(maxsize=4096)
def engine_for(*key: Any) -> Engine:
    """The engine of a :class:`PlanKey`, given field by field, since making one takes a while.

    ``engine.plan`` is its plan, reason included.
    """
    return engine_of(plan_for(PlanKey(*key)))


@lru_cache(maxsize=256)
def product_engine_for(
    device: Device | torch.device, rank: int, dtype: torch.dtype, backend: str
) -> Engine:
    """The engine of the product form, whose plan depends on no sizes but the rank."""
    return engine_of(product_plan(device, rank, dtype, backend))


def engine_of(plan: Plan) -> Engine:
    """PyTorch's, or Triton's with the plan's tiles."""
    if plan.tiles is None:
        return TorchEngine(plan)
    from fastbound.operator.triton_engine import TritonEngine  # Triton is optional

    return TritonEngine(plan)
