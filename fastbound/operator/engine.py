"""Which engine makes a call's products, as the plan says: one key, one cache."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from fastbound.dispatch.plan import Plan, PlanKey, plan_for
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


def engine_of(plan: Plan) -> Engine:
    """PyTorch's, or Triton's with the plan's tiles."""
    if plan.tiles is None:
        return TorchEngine(plan)
    from fastbound.operator.triton_engine import TritonEngine  # Triton is optional

    return TritonEngine(plan)
