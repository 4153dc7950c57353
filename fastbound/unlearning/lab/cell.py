"""One cell of the map: one adapter at one rate, rank and seed, run and scored."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbound.models.ranks import allocate_ranks
from fastbound.unlearning.data.encoding import IGNORED, Encoded, collate
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.lab.adapters import (
    CLAMP,
    CLIP,
    DECAY,
    Adapted,
    adapt,
    parse_adapter,
    targets,
)
from fastbound.unlearning.losses import answer_tokens, gradient_difference
from fastbound.unlearning.metrics.utility import harmonic_mean
from fastbound.unlearning.model import autocast, autocast_dtype, forward
from fastbound.unlearning.training.rank_choice import mean_loss
from fastbound.unlearning.training.step import rate_share

WRONG = 2  # wrong answers per row in the truth ratio


@dataclass(frozen=True, order=True)
class Cell:
    """A cell's place in the grid; ordered by seed first, so that whole seeds finish first."""

    seed: int
    rank: int
    lr: float
    adapter: str

    @property
    def key(self) -> str:
        return f"{self.adapter}|lr={self.lr:g}|rank={self.rank}|seed={self.seed}"


@dataclass(frozen=True)
class CellConfig:
    """How every cell is run.

    Attributes:
        steps: steps of AdamW, without weight decay except for "lora-decay".
        warmup: share of the steps in which the rate rises; in the others it falls to 0, as in
            `fastbound unlearn`. None keeps the rate constant.
        batch_size: forget rows per step, with as many retain rows.
        slope: alpha / rank, the slope of every adapter at zero.
        dtype: "float32" or "bfloat16", for the weights and for autocast.
        eval_rows: score at most this many rows per side, spread evenly; None scores all.
        log_every: steps between two logged ones.
    """

    steps: int = 300
    warmup: float | None = None
    batch_size: int = 8
    slope: float = 2.0
    dtype: str = "float32"
    eval_rows: int | None = None
    log_every: int = 10


@dataclass(frozen=True)
class Rows:
    """The rows of a map as tokens.

    Attributes:
        wrong: for each row in `retain`, its question with `WRONG` answers of other rows.
        general: questions that were never in the rows, each with its right answer first and then
            wrong ones.
    """

    forget: Sequence[Encoded]
    retain: Sequence[Encoded]
    wrong: Sequence[Encoded]
    general: Sequence[Sequence[Encoded]] = ()


def with_wrong_answers(rows: Sequence[Encoded]) -> list[Encoded]:
    """Each row's question with the answers of the `WRONG` rows that follow it, row by row."""
    mixed = []
    for i, row in enumerate(rows):
        asked = [t for t, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]
        for k in range(1, WRONG + 1):
            answer = tuple(t for t in rows[(i + k) % len(rows)].labels if t != IGNORED)
            mixed.append(Encoded((*asked, *answer), (*[IGNORED] * len(asked), *answer), row.where))
    return mixed


def run_cell(
    model: nn.Module, rows: Rows, cell: Cell, config: CellConfig, *, pad: int
) -> dict[str, Any]:
    """Unlearn with this adapter on `model`, in place, and score what is left.

    A run whose loss or gradient stops being finite ends at that step, which `stopped` holds, and
    its utility counts as 0.
    """
    start = time.perf_counter()
    adapter = parse_adapter(cell.adapter)
    ranks = _ranks(model, rows, cell, pad) if adapter.adaptive else even_ranks(model, cell.rank)
    layers = adapt(model, adapter, ranks, alpha=config.slope * cell.rank, seed=cell.seed)
    factors = [p for p in model.parameters() if p.requires_grad]
    decay = DECAY if adapter.kind == "lora-decay" else 0.0
    optimizer = torch.optim.AdamW(factors, lr=cell.lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share, config=config))
    dtype = autocast_dtype(config.dtype)
    generator = torch.Generator().manual_seed(cell.seed)
    history: list[dict[str, float]] = []
    stopped: int | None = None
    model.train()
    for step in range(1, config.steps + 1):
        forget = _draw(rows.forget, config.batch_size, generator)
        retain = _draw(rows.retain, config.batch_size, generator)
        batch = collate([*forget, *retain], pad)
        with autocast("cpu", dtype):
            logits = forward(model, batch.input_ids, batch.attention_mask)
            loss = gradient_difference(logits, batch.labels, len(forget))
        optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        norm = float(
            torch.nn.utils.clip_grad_norm_(
                factors, CLIP if adapter.kind == "lora-clip" else math.inf
            )
        )
        if not (math.isfinite(norm) and math.isfinite(float(loss.loss.detach()))):
            stopped = step
            break
        optimizer.step()
        schedule.step()
        if adapter.kind == "lora-clamp":
            with torch.no_grad():
                for factor in factors:
                    factor.clamp_(-CLAMP, CLAMP)
        if step == 1 or step % config.log_every == 0 or step == config.steps:
            history.append(
                {
                    "step": step,
                    "forget_loss": float(loss.forget),
                    "retain_loss": float(loss.retain),
                    "gradient_norm": norm,
                    **_size(layers),
                }
            )
    scores = score_model(model, rows, config, pad=pad)
    if stopped is not None:
        scores["utility"] = 0.0
    return {
        **asdict(cell),
        "ranks": dict(ranks),
        **scores,
        **_size(layers),
        "largest_gradient_norm": max((line["gradient_norm"] for line in history), default=math.nan),
        "stopped": stopped,
        "seconds": round(time.perf_counter() - start, 3),
        "history": history,
    }


def even_ranks(model: nn.Module, rank: int) -> dict[str, int]:
    """The same rank for every layer."""
    return dict.fromkeys(targets(model), rank)


def _ranks(model: nn.Module, rows: Rows, cell: Cell, pad: int) -> Mapping[str, int]:
    """As many parameters as `even_ranks` takes, spread over layers by the gradients of all rows."""
    shapes = {name: layer.weight.shape for name, layer in targets(model).items()}
    forget, retain = (
        mean_loss(each, pad, batch_size=len(each)) for each in (rows.forget, rows.retain)
    )
    return allocate_ranks(
        model,
        {name: (N, K) for name, (N, K) in shapes.items()},
        forget,
        retain,
        budget=cell.rank * sum(N + K for N, K in shapes.values()),
        seed=cell.seed,
    ).ranks


def score_model(model: nn.Module, rows: Rows, config: CellConfig, *, pad: int) -> dict[str, float]:
    """The utility on the retain rows with its parts, and the loss on both sides.

    - probability: mean over rows of exp(-mean loss of the answer's tokens)
    - accuracy: mean over rows of the share of answer tokens that are the first choice, given the
      true tokens before them
    - truth_ratio: mean over rows of max(0, 1 - R), R = exp(-mean loss of the wrong answers, each a
      mean over its tokens) / exp(-mean loss of the right one); the wrong answers are those of the
      next rows in the file, most of them about the same person
    - utility: the harmonic mean of these three, 0 if one of them is 0
    - general: mean over the general questions of p / (p + the sum of p of the wrong answers), with
      p = exp(-mean loss) of an answer; left out if there are no such questions

    The losses are means over rows of the mean over tokens, in nats per token.
    """
    score = partial(_score_rows, model, pad=pad, dtype=autocast_dtype(config.dtype))
    chosen: Sequence[int] = evenly(range(len(rows.retain)), config.eval_rows)
    forget, forget_right = score(evenly(rows.forget, config.eval_rows))
    retain, right = score([rows.retain[i] for i in chosen])
    wrong, _ = score([rows.wrong[i * WRONG + k] for i in chosen for k in range(WRONG)])
    ratio = (retain - wrong.view(-1, WRONG).mean(1)).exp()
    parts = {
        "probability": float((-retain).exp().mean()),
        "accuracy": float(right.mean()),
        "truth_ratio": float((1 - ratio).clamp(min=0).mean()),
    }
    return {
        "forget_loss": float(forget.mean()),
        "forget_accuracy": float(forget_right.mean()),
        "retain_loss": float(retain.mean()),
        **parts,
        "utility": utility_of(list(parts.values())),
        **_general(score(list(chain(*rows.general)))[0], rows.general),
    }


def _general(losses: Tensor, questions: Sequence[Sequence[Encoded]]) -> dict[str, float]:
    if not questions:
        return {}
    likely = (-losses).exp().split([len(answers) for answers in questions])
    return {"general": float(torch.stack([p[0] / p.sum() for p in likely]).mean())}


def utility_of(parts: Sequence[float]) -> float:
    """Their harmonic mean; 0 if one of them is 0 or not a number."""
    return harmonic_mean(np.nan_to_num(parts))


@torch.no_grad()
def _score_rows(
    model: nn.Module, rows: Sequence[Encoded], *, pad: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Each row's mean loss and share of right tokens, in fp64 and in the order of `rows`."""
    model.eval()
    loss, right = (torch.zeros(len(rows), dtype=torch.float64) for _ in range(2))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for first in range(0, len(order), 32):
        part = order[first : first + 32]
        batch = collate([rows[i] for i in part], pad)
        with autocast("cpu", dtype):
            logits = forward(model, batch.input_ids, batch.attention_mask)
        tokens = answer_tokens(logits, batch.labels)
        counts = torch.bincount(tokens.row, minlength=len(part)).double()
        for total, each in ((loss, tokens.loss), (right, tokens.correct)):
            sums = torch.zeros(len(part), dtype=torch.float64)
            total[part] = sums.index_add_(0, tokens.row, each.double()) / counts
    return loss, right


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
