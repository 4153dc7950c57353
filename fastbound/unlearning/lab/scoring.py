"""What a model still knows of the rows of a map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from fastbound.unlearning.data.encoding import Encoded, collate
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.lab.cell import WRONG, CellConfig, Rows
from fastbound.unlearning.losses import answer_tokens
from fastbound.unlearning.metrics.utility import harmonic_mean
from fastbound.unlearning.model import autocast, autocast_dtype, forward


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
