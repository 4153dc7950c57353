"""The run of one cell: unlearn with its adapter, and score what is left."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from fastbound.errors import NonFiniteError
from fastbound.layers.base import features
from fastbound.models.ranks import allocate_ranks
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import Encoded, collate
from fastbound.unlearning.data.sampling import Pairing, evenly
from fastbound.unlearning.lab.adapters import Adapted, adapt, targets
from fastbound.unlearning.lab.cell import Cell, CellConfig, Rows
from fastbound.unlearning.lab.names import Adapter, parse_adapter
from fastbound.unlearning.lab.scoring import score_model
from fastbound.unlearning.losses.objective import Answers, Objective
from fastbound.unlearning.metrics.answers import evaluate
from fastbound.unlearning.model import autocast, autocast_dtype, forward
from fastbound.unlearning.training.ending import Ending, forget_ceiling, forget_target
from fastbound.unlearning.training.fila import fila_importance
from fastbound.unlearning.training.result import Evaluation
from fastbound.unlearning.training.sides import mean_loss
from fastbound.unlearning.training.step import rate_share

CLAMP = 1.0  # of "lora-clamp": no entry of A and B beyond
CLIP = 1.0  # of "lora-clip": the norm of the whole gradient
DECAY = 0.1  # of "lora-decay": AdamW's weight decay of A and B
_NOT_FINITE = "not finite"


def run_cell(
    model: nn.Module, rows: Rows, cell: Cell, config: CellConfig, *, pad: int
) -> dict[str, Any]:
    """Unlearn with this adapter on `model`, in place, and score what is left.

    A run whose loss or gradient stops being finite ends at that step, which `stopped` holds, and
    its utility counts as 0. With `+stop`, `ended` says why the run ended (as in
    `UnlearnResult.stopped`, or "not finite"), `end_step` after which step, and `kept_step` which
    evaluation's factors were kept and scored.
    """
    start = time.perf_counter()
    adapter = parse_adapter(cell.adapter)
    layers = targets(model, adapter.modules)
    shapes = {name: features(layer) for name, layer in layers.items()}
    ranks: Mapping[str, int] = dict.fromkeys(shapes, cell.rank)
    if adapter.adaptive:
        ranks = _spread(model, shapes, rows, cell, pad)
    importance = None
    if adapter.starts_from_weight:
        dtype = autocast_dtype(config.dtype)
        importance = fila_importance(model, shapes, rows.forget, rows.retain, pad, dtype=dtype)
    adapted = adapt(
        model,
        adapter,
        ranks,
        alpha=config.slope * cell.rank,
        seed=cell.seed,
        importance=importance,
    )
    training = _Training(model, adapted, rows, cell, adapter, config, pad)
    training.go()
    scores = score_model(model, rows, config, pad=pad)
    if training.stopped is not None:
        scores["utility"] = 0.0
    history = training.history
    return {
        **asdict(cell),
        "ranks": dict(ranks),
        **scores,
        **_size(adapted),
        "largest_gradient_norm": max((line["gradient_norm"] for line in history), default=math.nan),
        "forget_target": training.target,
        "stopped": training.stopped,
        **training.end,
        "seconds": round(time.perf_counter() - start, 3),
        "history": history,
    }


class _Training:
    """The steps of a cell.

    Attributes:
        history: what was logged.
        target: the forget loss from which rows count as forgotten, nats per token.
        stopped: the step at which loss or gradient was not finite, or None.
        end: with `+stop`, how the run ended.
    """

    def __init__(
        self,
        model: nn.Module,
        adapted: Adapted,
        rows: Rows,
        cell: Cell,
        adapter: Adapter,
        config: CellConfig,
        pad: int,
    ) -> None:
        self.model, self.adapted, self.rows = model, adapted, rows
        self.kind, self.config, self.pad = adapter.kind, config, pad
        settings = UnlearnConfig(losses=adapter.losses)
        self.target = forget_target(settings, model)
        self.objective = Objective(
            adapter.losses, ceiling=forget_ceiling(settings, model) if adapter.capped else None
        )
        self.factors = [p for p in model.parameters() if p.requires_grad]
        decay = DECAY if adapter.kind == "lora-decay" else 0.0
        self.optimizer = torch.optim.AdamW(self.factors, lr=cell.lr, weight_decay=decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, partial(_share, config=config)
        )
        self.generator = torch.Generator().manual_seed(cell.seed)
        self.stop = None
        if adapter.stops:
            ending = Ending(settings, model, config.steps)
            self.stop = _Stop(ending, model, self.factors, rows, config, pad)
        self.history: list[dict[str, float]] = []
        self.stopped: int | None = None
        self.end: dict[str, Any] = {}

    def go(self) -> None:
        self.model.train()
        reason = None
        for step in range(1, self.config.steps + 1):
            try:
                losses = self._step()
                reason = self.stop and self.stop.reason(step)
            except NonFiniteError:
                self.stopped, reason = step, _NOT_FINITE
                break
            if reason or step in (1, self.config.steps) or step % self.config.log_every == 0:
                self.history.append({"step": step, **losses, **_size(self.adapted)})
            if reason:
                break
        if self.stop is not None:
            self.end = {"ended": reason, "end_step": step, "kept_step": self.stop.keep_best()}

    def _step(self) -> dict[str, float]:
        """Raises NonFiniteError, and leaves the factors as they are, where the step is not."""
        count = self.config.batch_size
        forget = _draw(self.rows.forget, count, self.generator)
        retain = _draw(self.rows.retain, count, self.generator)
        batch = collate([*forget, *retain], self.pad)
        with autocast("cpu", autocast_dtype(self.config.dtype)):
            logits = forward(self.model, batch.input_ids, batch.attention_mask)
            answers = Answers.of(logits, batch.labels)
            found = self.objective(answers, batch, (len(forget), len(retain)))
        self.optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        most = CLIP if self.kind == "lora-clip" else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.factors, most))
        if not (math.isfinite(norm) and math.isfinite(float(found.loss.detach()))):
            raise NonFiniteError(f"gradient norm {norm:g}")
        self.optimizer.step()
        self.schedule.step()
        self.objective.after_step(float(found.retain))
        if self.kind == "lora-clamp":
            with torch.no_grad():
                for factor in self.factors:
                    factor.clamp_(-CLAMP, CLAMP)
        return {
            "forget_loss": float(found.forget),
            "retain_loss": float(found.retain),
            "gradient_norm": norm,
        }


class _Stop:
    """`+stop`: evaluations once per epoch, which end the run and choose the factors to keep.

    The rule is that of `fastbound unlearn` with the same losses, its own target and slack.
    """

    def __init__(
        self,
        ending: Ending,
        model: nn.Module,
        factors: Sequence[nn.Parameter],
        rows: Rows,
        config: CellConfig,
        pad: int,
    ) -> None:
        self.ending, self.model, self.factors = ending, model, factors
        self.sides = [evenly(side, config.eval_rows) for side in (rows.forget, rows.retain)]
        self.config, self.pad = config, pad
        pairing = Pairing(len(rows.forget), len(rows.retain), batch_size=config.batch_size)
        self.every = pairing.steps(1)
        self.history: list[Evaluation] = []
        self._evaluate(0)

    def reason(self, step: int) -> str | None:
        """Why the run ends after `step`, or None. Raises NonFiniteError for a broken model."""
        if step % self.every == 0 or step == self.config.steps:
            self._evaluate(step)
        return self.ending.reason(self.history, step)

    @torch.no_grad()
    def keep_best(self) -> int:
        """Restore the factors of the best evaluation; returns its step."""
        for factor, value in zip(self.factors, self.best, strict=True):
            factor.copy_(value)
        return self.ending.best(self.history).step

    def _evaluate(self, step: int) -> None:
        dtype = autocast_dtype(self.config.dtype)
        scores = [evaluate(self.model, side, pad=self.pad, dtype=dtype) for side in self.sides]
        self.history.append(Evaluation(step, *scores))
        if self.ending.best(self.history) is self.history[-1]:
            self.best = [factor.detach().clone() for factor in self.factors]


def _spread(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], rows: Rows, cell: Cell, pad: int
) -> Mapping[str, int]:
    """As many parameters as even ranks take, spread over layers by the gradients of all rows."""
    forget, retain = (
        mean_loss(each, pad, batch_size=len(each)) for each in (rows.forget, rows.retain)
    )
    budget = cell.rank * sum(N + K for N, K in shapes.values())
    return allocate_ranks(model, shapes, forget, retain, budget=budget, seed=cell.seed).ranks


@torch.no_grad()
def _size(layers: Adapted) -> dict[str, float]:
    """The largest |ΔW| of any entry, the norm of all ΔW together, and how far the bound is in use.

    `bound_in_use` is the root mean square of ΔW over its bound, averaged over layers: at most 1,
    and 0 without a bound.
    """
    largest, squares, used = [], [], []
    for layer in layers.values():
        delta = layer.delta_weight()
        largest.append(float(delta.abs().max()))
        squares.append(float(delta.square().sum()))
        used.append(math.sqrt(squares[-1] / delta.numel()) / layer.bound)
    return {
        "largest_delta": max(largest),
        "delta_norm": math.sqrt(sum(squares)),
        "bound_in_use": statistics.fmean(used),
    }


def _share(step: int, *, config: CellConfig) -> float:
    if config.warmup is None:
        return 1.0
    return rate_share(step, steps=config.steps, warmup=config.warmup)


def _draw(rows: Sequence[Encoded], count: int, generator: torch.Generator) -> list[Encoded]:
    order = torch.randperm(len(rows), generator=generator)[:count].tolist()
    return [rows[i] for i in order]
