"""The learning rate that each layer's bound calls for."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fastbound.errors import positive
from fastbound.layers.adapter import BoundedAdapter

PHASE = 0.4  # radians per step
HIGHEST = 1e-2  # for bounds too wide to act: beyond it LoRA itself comes apart


def auto_rate(alpha: float, bound: float) -> float:
    """min(HIGHEST, PHASE · sqrt(bound / alpha)), to two digits, so that similar layers agree."""
    return min(HIGHEST, float(f"{PHASE * math.sqrt(bound / alpha):.2g}"))


def parameter_groups(model: nn.Module, others: float = 1e-3) -> list[dict[str, Any]]:
    """All trained parameters of `model` in groups for AdamW, each with the rate it calls for.

    AdamW moves an entry of A or B by about the learning rate in each step, and with it the phase
    ωA inside the sine by ω times that rate. If that is a small share of the sine's range, the
    adapter hardly learns in the time it has; if it is more than the range, the phase jumps over it
    and nothing is learned. So every layer gets the rate that moves its phases by the same 0.4
    radians per step,

        rate = min(0.01, 0.4 · sqrt(bound / alpha))        sqrt(bound / alpha) = 1 / ω for factors

    rounded to two digits. A tight bound thus gets a smaller rate than a wide one, and a wide one,
    which does not act, at most 0.01. docs/stability.md has the runs that the two numbers come from.

    Args:
        model: what `fastbound.inject` or PEFT's `get_peft_model` has adapted.
        others: learning rate of trained parameters that are no A or B, such as biases.

    Returns:
        Groups `{"params": [...], "lr": rate}`, the highest rate of A and B first; a scheduler
        multiplies all of them alike.

    Raises:
        ValueError: `model` holds no bounded adapter, or `others` is not positive and finite.
    """
    others = positive("others", others)
    groups: dict[float, list[nn.Parameter]] = {}
    factors = set()
    for adapter in model.modules():
        if isinstance(adapter, BoundedAdapter):
            trained = [p for p in (adapter.A, adapter.B) if p.requires_grad]
            groups.setdefault(auto_rate(adapter.alpha, adapter.bound), []).extend(trained)
            factors |= {adapter.A, adapter.B}
    if not factors:
        raise ValueError(
            f"the {type(model).__name__} holds no bounded adapter: call fastbound.inject first"
        )
    found = [{"params": groups[rate], "lr": rate} for rate in sorted(groups, reverse=True)]
    rest = [p for p in model.parameters() if p.requires_grad and p not in factors]
    return [each for each in found if each["params"]] + (
        [{"params": rest, "lr": others}] if rest else []
    )
