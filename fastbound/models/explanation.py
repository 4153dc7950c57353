"""`explain`: which path each adapted layer and block takes, with which tiles, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from fastbound.dispatch.device import describe
from fastbound.dispatch.entries import block_form
from fastbound.dispatch.plan import Plan, PlanKey, plan_key
from fastbound.errors import counted
from fastbound.layers.adapter import bound_in_use
from fastbound.layers.base import Adapted, layout_of, weight_shape
from fastbound.layers.forms import activation_name
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.layers.mlp import FusedBoundedMLP
from fastbound.layers.over_base import BoundedOverBase
from fastbound.layers.readers import weight_reader
from fastbound.models.adapted import adapted_blocks, unfused_reason
from fastbound.operator.block_ops import block_key
from fastbound.operator.call import autocast_to, trained_weight
from fastbound.operator.engine import route_for
from fastbound.operator.partition import GATHER, gathered_modules, partition


@dataclass(frozen=True)
class LayerExplanation:
    """One layer: its name, shape [N, K], rank, compute dtype, device, plan and adapter form.

    ``backward`` is the plan of the gradients if it differs from ``plan``. ``block`` names the fused
    block that the layer runs in, whose plan it then has; None if the layer runs by itself.
    ``left_out`` says why the adapter does not always run: the module around the layer reads its
    weight instead of calling it. `inject` does not adapt such layers.

    ``bound`` is the largest magnitude that an entry of ΔW can have, and ``bound_in_use`` is
    RMS(ΔW) / bound, at most 1. Near 0 the bound has no effect yet, and the adapter behaves as LoRA.
    Both are None if no adapter is active; ``bound_in_use`` is also None if A and B are sharded or
    on the meta device.
    """

    layer: str
    shape: tuple[int, int]
    rank: int
    dtype: str
    device: str
    plan: Plan
    block: str | None = None
    left_out: str | None = None
    bound: float | None = None
    bound_in_use: float | None = None
    form: str = "factors"
    backward: Plan | None = None


@dataclass(frozen=True)
class BlockExplanation:
    """One module that holds adapted layers: whether it runs as one operator, and if not, why.

    ``form`` is what a fused block computes, and ``reason`` is why any other runs layer by layer;
    one of the two is None. ``whole`` says why a fused block runs as one operator, if that was a
    choice between measured alternatives.
    """

    block: str
    fused: bool
    form: str | None
    reason: str | None
    whole: str | None = None


@dataclass(frozen=True)
class Explanation:
    """The paths of a model's adapted layers at ``tokens`` rows per call; print it or read it."""

    tokens: int
    layers: tuple[LayerExplanation, ...]
    blocks: tuple[BlockExplanation, ...] = ()

    def __iter__(self) -> Iterator[LayerExplanation]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers and strings, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        fused = sum(row.block is not None for row in self.layers)
        lines = [f"{len(self.layers)} bounded layers at {self.tokens} tokens"]
        if fused:
            lines[0] += f", {fused} of them in {sum(b.fused for b in self.blocks)} fused blocks"
        lines += self._bound_line()
        for (form, reason, whole), names in _grouped(
            (b.block or "(this module)", (b.form, b.reason, b.whole)) for b in self.blocks
        ):
            lines.append(f"block {names}")
            lines.append(f"  layer by layer: {reason}" if form is None else f"  fused: {form}")
            lines += [] if whole is None else [f"  {whole}"]
        for (
            (shape, rank, form, dtype, device, plan, backward, in_block, left_out),
            names,
        ) in _grouped(
            (
                row.layer or "(this layer)",
                (
                    *(row.shape, row.rank, row.form, row.dtype, row.device),
                    *(row.plan, row.backward),
                    *(row.block is not None, row.left_out),
                ),
            )
            for row in self.layers
        ):
            lines.append(names)
            if left_out is not None:
                lines.append(f"  LEFT OUT: {left_out}")
            product = ", product form" if form == "product" else ""
            lines.append(f"  N {shape[0]}, K {shape[1]}, rank {rank}{product}, {dtype} on {device}")
            where = "in its block, " if in_block else ""
            lines.append(f"  {where}{plan.strategy}: {plan.reason}")
            if backward is not None:
                lines.append(f"  in backward, {backward.strategy}: {backward.reason}")
            shown = plan if backward is None else _more(plan, backward)
            lines += _tile_lines(shown, in_block, form == "product")
        return "\n".join(lines)

    def _bound_line(self) -> Iterator[str]:
        used = [(row.bound_in_use, row) for row in self.layers if row.bound_in_use is not None]
        if not used:
            return
        bounds = [row.bound for _, row in used if row.bound is not None]
        low, high = min(bounds), max(bounds)
        most, row = max(used, key=lambda each: each[0])
        said = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        mean = sum(share for share, _ in used) / len(used)
        where = f", highest in {row.layer} ({most:.0%})" if row.layer and most > 0 else ""
        yield f"bound {said} per entry of ΔW, {mean:.0%} in use (RMS of ΔW / bound){where}"


def explain(model_or_layer: nn.Module, tokens: int = 4096) -> Explanation:
    """Explain for each adapted layer and its block which path runs, with which tiles, and why.

    Args:
        model_or_layer: a model, a block or one layer.
        tokens: rows of x in one call (batch size times sequence length).

    The compute dtype is autocast's if autocast is on when this is called, otherwise the weight's.
    x is assumed to be contiguous; an x whose address or strides TMA cannot handle is read through
    pointers. The state of a block is looked up at the time of the call, so that a hook added to one
    of its layers since injection shows. For an adapter over a base layer, which computes x Wᵀ
    itself, the plan is that of the low-rank term, "split" or "torch". The term is added to the
    base's output in place, or into a new tensor under torch.compile or if the base has hooks.

    Returns an :class:`Explanation`: print it, iterate over its layers, or call ``as_dict()``.

    Raises ValueError for tokens that are not an integer from 1 on, and for a model without bounded
    layers.
    """
    tokens = counted("tokens", tokens)
    held = adapted_blocks(model_or_layer)
    gathered = gathered_modules(model_or_layer)
    blocks = tuple(_explain_block(name, m, m in gathered, tokens) for name, m in held.items())
    inside = {
        layer: (row.block, *_fused_plans(module, tokens))
        for row, module in zip(blocks, held.values(), strict=True)
        if row.fused and isinstance(module, FusedBoundedMLP)
        for layer in module.adapted_layers().values()
    }
    alone = (None, None, None)
    layers = tuple(
        replace(
            _explain_layer(name, module, tokens, module in gathered, *inside.get(module, alone)),
            left_out=weight_reader(model_or_layer, name) if name else None,
        )
        for name, module in model_or_layer.named_modules()
        if isinstance(module, Adapted)
    )
    if not layers:
        raise ValueError(
            "no bounded adapter in this model: call fastbound.inject(model) or PEFT's "
            "get_peft_model(model, fastbound.BoundedConfig()) first"
        )
    return Explanation(tokens, layers, blocks)


def _explain_block(name: str, block: nn.Module, gathered: bool, tokens: int) -> BlockExplanation:
    reason = unfused_reason(name, block, gathered)
    if reason is not None or not isinstance(block, FusedBoundedMLP):
        return BlockExplanation(name, reason is None, None, reason)
    whole = None
    if block.recompute is None:
        plan = _block_plan(block, tokens, "whole")
        if plan.strategy == "layers":
            return BlockExplanation(name, False, None, plan.reason)
        whole = plan.reason if plan.candidates else None
    return BlockExplanation(name, True, str(block.fusion.form), None, whole)


def _fused_plans(block: FusedBoundedMLP, tokens: int) -> tuple[Plan, Plan]:
    return _block_plan(block, tokens, "forward"), _block_plan(block, tokens, "backward")


def _block_plan(block: FusedBoundedMLP, tokens: int, part: str) -> Plan:
    layers = list(block.adapted_layers().values())
    form = block.fusion.form
    first = block.get_submodule(form.up)
    weight: Any = first.weight
    N, K = weight_shape(first)
    if form.packed:
        N //= 2
    product = layers[0].adapter.form == "product"
    ranks = [layer.adapter.rank for layer in layers]
    dtype, backend = autocast_to(weight.dtype, weight.device), layers[0].adapter.backend
    activation = cast(str, activation_name(getattr(block, form.activation)))
    named = block_form(activation, form.gate is not None)
    how = (dtype or weight.dtype, backend, named, part, layout_of(first), product)
    return _explained(block_key(weight.device, tokens, N, K, ranks, *how))


def _explain_layer(
    name: str,
    layer: Adapted,
    tokens: int,
    gathered: bool,
    block: str | None,
    plan: Plan | None,
    backward: Plan | None,
) -> LayerExplanation:
    active = layer.running()
    # x never has a quantised weight's dtype: take the bias's dtype, or else the adapter's.
    tensors = (layer.weight, layer.bias, *(adapter.A for adapter in active))
    held = [t for t in tensors if t is not None and t.is_floating_point()]
    where = active[0].A.device if active else layer.weight.device
    dtype = held[0].dtype if held else torch.get_default_dtype()
    dtype = autocast_to(dtype, where) or dtype
    if plan is None:
        plan = _layer_plan(layer, where, tokens, dtype, gathered, "forward")
        backward = _layer_plan(layer, where, tokens, dtype, gathered, "backward")
    rank = max((adapter.rank for adapter in active), default=0)
    device = describe(where).architecture
    shape = (layer.out_features, layer.in_features)
    factors = [factor for adapter in active for factor in (adapter.A, adapter.B)]
    readable = not any(factor.is_meta or partition(factor) for factor in factors)
    used = bound_in_use(active) if active and readable else None
    return LayerExplanation(
        *(name, shape, rank, str(dtype), device, plan, block),
        bound=sum(each.largest for each in active) if active else None,  # PEFT adds them
        bound_in_use=used,
        form=active[0].form if active else "factors",
        backward=None if backward == plan else backward,
    )


def _layer_plan(
    layer: Adapted,
    device: torch.device,
    tokens: int,
    dtype: torch.dtype,
    gathered: bool,
    part: str,
) -> Plan:
    """The plan of a layer outside a block; "base" if its base layer runs without adapters."""
    active, obstacle = layer.running(), layer.obstacle(gathered)
    over_base = calls_base(layer, gathered)
    spread = None if gathered else partition(layer.weight)
    if spread is not None and isinstance(layer, FusedBoundedLinear) and not over_base:
        return Plan("refused", f"weight {spread}: {GATHER}")
    if not active:
        return Plan("base", obstacle or "has no active adapter")
    adapter = active[0]
    shape = (tokens, layer.out_features, layer.in_features, adapter.rank, dtype, adapter.backend)
    dropout = adapter.training and adapter.dropout > 0
    how: dict[str, Any] = {"part": part, "dropout": dropout, "product": adapter.form == "product"}
    if not over_base:
        trained = trained_weight(layer.weight)
        if trained is not None:
            return Plan("refused", trained)
        how["layout"] = layout_of(layer)
        return _explained(plan_key(device, *shape, **how))
    reason = f"it {obstacle}, so the base layer runs and each adapter's term is added"
    if isinstance(layer, BoundedOverBase):
        reason = layer.reason
    plan = _explained(plan_key(device, *shape, over_base=True, **how))
    return replace(plan, reason=f"{reason}; {plan.reason}")


def _explained(key: PlanKey) -> Plan:
    """The plan of a key; "refused" if its backend cannot run there."""
    try:
        return route_for(*key).explained()
    except ValueError as error:
        return Plan("refused", str(error))


def calls_base(layer: Adapted, gathered: bool = False) -> bool:
    """Whether a layer calls its base and adds the adapters' terms to the result."""
    if isinstance(layer, FusedBoundedLinear):
        return isinstance(layer, BoundedOverBase)
    return layer.obstacle(gathered) is not None


def _more(plan: Plan, backward: Plan) -> Plan:
    """The plan whose tiles are printed: fused before split before PyTorch, which has none."""

    def order(each: Plan) -> tuple[bool, bool]:
        return each.strategy == "fused", each.tiles is not None

    return max((plan, backward), key=order)


def _tile_lines(plan: Plan, in_block: bool, product: bool) -> Iterator[str]:
    if plan.tiles is None:
        return
    thin = () if product else ("thin", "reduce")
    names = [*thin, *(("activate", "gated") if in_block else ())]
    if plan.strategy == "fused":
        same = plan.tiles.gemm_t == plan.tiles.gemm
        names = [*(("gemm",) if same else ("gemm", "gemm_t")), *names]
    width = max(map(len, names), default=0)
    for name in names:
        yield f"  {name:<{width}} {getattr(plan.tiles, name)}"


def _grouped(rows: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Each key once, with the first of its names and the number of others."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, key in rows:
        groups.setdefault(key, []).append(name)
    for key, names in groups.items():
        yield key, names[0] + (f" and {len(names) - 1} more like it" if len(names) > 1 else "")
