"""InjectionReport: what injecting or loading an adapter did to a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from fastbound.layers.over_base import BoundedOverBase
from fastbound.models.adapted import adapted_blocks, adapted_layers, unfused_reason
from fastbound.models.names import kind_of
from fastbound.models.ranks import RankAllocation
from fastbound.operator.partition import gathered_modules


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` or `load_adapter` did; print it or read its fields.

    Attributes:
        replaced: dotted names of the layers that are now `FusedBoundedLinear`. A layer that the
            model holds under several names is listed once, under the first.
        trainable_parameters: number of elements of all A and B, the only parameters that train.
        total_parameters: number of elements of all parameters, including A and B.
        skipped: name -> reason, for modules that `target_modules` matched but that could not be
            replaced.
        over_base: name -> reason, for replaced layers that still call the layer they replaced
            (`BoundedOverBase`), for example because it is quantised or has hooks.
        fused: dotted names of the MLP blocks that run as one operator, see `FusedBoundedMLP`.
        unfused: name -> reason, for every other module that holds replaced layers; their layers run
            one by one.
        ranks: rank of each replaced layer, by name.
        allocation: the result of `rank="auto"`, otherwise None.
    """

    replaced: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    over_base: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    unfused: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    allocation: RankAllocation | None = None

    def __str__(self) -> str:
        share = self.trainable_parameters / self.total_parameters
        over, apart = _reasons(self.over_base), _reasons(self.unfused)
        lines = [
            f"replaced {len(self.replaced)} layers",
            *(f"  {count} x {kind}" for kind, count in _kinds(self.replaced).items()),
            *(f"  still calling the base layer: {c} x {k}: {r}" for r, k, c in over),
            f"fused {len(self.fused)} MLP blocks",
            *(f"  {count} x {kind}" for kind, count in _kinds(self.fused).items()),
            *(f"  not fused: {c} x {k or 'the model itself'}: {r}" for r, k, c in apart),
            f"training {self.trainable_parameters:,} of {self.total_parameters:,} parameters"
            f" ({share:.2%})",
            *(f"skipped {name}: {reason}" for name, reason in self.skipped.items()),
            *([] if self.allocation is None else [str(self.allocation)]),
        ]
        return "\n".join(lines)


def injection_report(model: nn.Module, skipped: Mapping[str, str] | None = None) -> InjectionReport:
    """The report on an injected model, as it is now."""
    inside = gathered_modules(model)
    blocks = adapted_blocks(model)
    reasons = {name: unfused_reason(name, m, m in inside) for name, m in blocks.items()}
    layers = adapted_layers(model)
    return InjectionReport(
        replaced=tuple(layers),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
        skipped=dict(skipped or {}),
        over_base={n: m.reason for n, m in layers.items() if isinstance(m, BoundedOverBase)},
        fused=tuple(name for name, reason in reasons.items() if reason is None),
        unfused={name: reason for name, reason in reasons.items() if reason is not None},
        ranks={n: m.adapter.rank for n, m in layers.items() if m.adapter is not None},
    )


def _kinds(names: Iterable[str]) -> Counter[str]:
    """How many names there are of each kind."""
    return Counter(map(kind_of, names))


def _reasons(named: Mapping[str, str]) -> Iterable[tuple[str, str, int]]:
    """Each reason with each kind of name that has it, and the number of such names."""
    for reason in dict.fromkeys(named.values()):
        for kind, count in _kinds(n for n, r in named.items() if r == reason).items():
            yield reason, kind, count
