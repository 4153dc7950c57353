"""A plan from the fields of its key."""

from __future__ import annotations

from typing import Any

from fastbound.dispatch.plan import Plan, PlanKey, plan
from fastbound.dispatch.tables import PlanTable


def planned(*key: Any, table: PlanTable | None = None, **more: Any) -> Plan:
    """The plan of a key, given field by field."""
    return plan(PlanKey(*key, **more), table)
