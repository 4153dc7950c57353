"""Which path each adapted layer takes, with which tiles, and why: nothing runs silently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastbound.linear import FusedBoundedLinear
from fastbound.plan import Plan, describe, plan_for


@dataclass(frozen=True)
class LayerExplanation:
    """One layer: its name, shape [N, K], rank, compute dtype, device, and its plan."""

    layer: str
    shape: tuple[int, int]
    rank: int
    dtype: str
    device: str
    plan: Plan


@dataclass(frozen=True)
class Explanation:
    """The paths of a model's adapted layers at ``tokens`` rows; printable, and data."""

    tokens: int
    layers: tuple[LayerExplanation, ...]

    def __iter__(self) -> Iterator[LayerExplanation]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], list[str]] = {}
        for row in self.layers:
            key = (row.shape, row.rank, row.dtype, row.device, row.plan)
            groups.setdefault(key, []).append(row.layer)
        lines = [f"{len(self.layers)} bounded layers at {self.tokens} tokens"]
        for (shape, rank, dtype, device, plan), names in groups.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{names[0] or '(this layer)'}{more}")
            lines.append(f"  N {shape[0]}, K {shape[1]}, rank {rank}, {dtype} on {device}")
            lines.append(f"  {plan.strategy}: {plan.reason}")
            if plan.tiles is not None:
                if plan.strategy == "fused":
                    lines.append(f"  gemm   {plan.tiles.gemm}")
                lines.append(f"  thin   {plan.tiles.thin}")
                lines.append(f"  reduce {plan.tiles.reduce}")
        return "\n".join(lines)


def explain(model_or_layer: nn.Module, tokens: int = 4096) -> Explanation:
    """For each FusedBoundedLinear: which path runs, with which tiles, and why.

    Args:
        model_or_layer: a model, or one layer.
        tokens: rows of x in one call (batch times sequence length).

    The compute dtype is autocast's where autocast is on at the call, else the weight's. x is taken
    to be contiguous; one whose address or strides TMA cannot take goes through pointers.

    Raises ValueError for tokens below 1 and for a model without bounded layers.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be >= 1, got {tokens}")
    layers = tuple(
        _explain_layer(name, module, tokens)
        for name, module in model_or_layer.named_modules()
        if isinstance(module, FusedBoundedLinear)
    )
    if not layers:
        raise ValueError("no FusedBoundedLinear in this model: call fastbound.inject(model) first")
    return Explanation(tokens, layers)


def _explain_layer(name: str, layer: FusedBoundedLinear, tokens: int) -> LayerExplanation:
    weight = layer.weight
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(weight.device.type)
    N, K = layer.out_features, layer.in_features
    backend = layer.adapter.backend
    plan = plan_for(weight.device, tokens, N, K, layer.rank, dtype, backend)
    device = describe(weight.device.type, weight.device.index).architecture
    return LayerExplanation(name, (N, K), layer.rank, str(dtype), device, plan)
