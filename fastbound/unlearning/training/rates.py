"""The learning rate of each layer: the one that was given, or the one that its bound calls for.

AdamW moves an entry of A or B by about the rate in each step, and so the phase ωA inside the sine
by ω times the rate. Too small a share of the sine's range per step learns nothing in time; more
than the range jumps over it. `lr="auto"` gives every layer the same step in phase,

    rate = min(HIGHEST, PHASE · sqrt(bound / alpha))      sqrt(bound / alpha) = 1 / ω for factors

and plain LoRA, which has no range, `LORA`. docs/stability.md has the map these numbers come from.
"""

from __future__ import annotations

import math
from typing import Any

import fastbound
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.training.adapters import Adapter

PHASE = 0.4  # radians per step
HIGHEST = 1e-2  # where the bound is too wide to act: a rate that a step of ΔW itself bears
LORA = 3e-3


def auto_rate(alpha: float, bound: float) -> float:
    """The rate of a bounded layer, to two digits, so that similar layers share a group."""
    return min(HIGHEST, float(f"{PHASE * math.sqrt(bound / alpha):.2g}"))


def parameter_groups(adapter: Adapter, config: UnlearnConfig) -> list[dict[str, Any]]:
    """What AdamW takes: all A and B in groups of one rate each, the highest rate first."""
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    if config.lr != "auto":
        return [{"params": trained, "lr": config.lr}]
    if config.adapter == "lora":
        return [{"params": trained, "lr": LORA}]
    groups: dict[float, list[Any]] = {}
    for layer in adapter.model.modules():
        if isinstance(layer, fastbound.BoundedAdapter):
            factors = [p for p in layer.parameters(recurse=False) if p.requires_grad]
            groups.setdefault(auto_rate(layer.alpha, layer.bound), []).extend(factors)
    return [{"params": groups[rate], "lr": rate} for rate in sorted(groups, reverse=True)]
