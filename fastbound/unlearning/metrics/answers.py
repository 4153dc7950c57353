"""How well a model still answers: loss, token accuracy and whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastbound.errors import NonFiniteError
from fastbound.unlearning.data.encoding import Encoded, collate
from fastbound.unlearning.losses.cross_entropy import WHOLE, CrossEntropy
from fastbound.unlearning.model import autocast, evaluating


@dataclass(frozen=True)
class Score:
    """A score over all answer tokens of the evaluated rows, including the end of text.

    Attributes:
        loss: mean cross-entropy, in nats per token.
        accuracy: share of tokens that are the model's first choice, given the true previous tokens.
        exact: share of rows with every token right, which greedy decoding reproduces verbatim.
        rows: number of rows.
    """

    loss: float
    accuracy: float
    exact: float
    rows: int


def evaluate(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    pad: int,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    cross_entropy: CrossEntropy = WHOLE,
) -> Score:
    """Score `model` on `rows`, batching rows of similar length.

    Args:
        pad: token to pad with.
        dtype: dtype of autocast; None computes in the model's own dtype.
        cross_entropy: how the losses are computed: from whole logits by default, or as
            `choose_cross_entropy` chose for this model.

    Raises:
        NonFiniteError: the loss of a row is not finite; the message names the row.
    """
    return score(
        totals(
            model,
            rows,
            pad=pad,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            cross_entropy=cross_entropy,
        )
    )


def totals(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    pad: int,
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype | None,
    cross_entropy: CrossEntropy = WHOLE,
) -> list[float]:
    """Sums that can be added across processes: loss, right tokens, tokens, exact rows, rows.

    Raises NonFiniteError for a row whose loss is not finite.
    """
    rows = sorted(rows, key=lambda row: len(row.ids))
    sums = [0.0] * 5
    with evaluating(model), autocast(device, dtype):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = collate(part, pad).to(device)
            tokens = cross_entropy.answers(model, batch).tokens
            if not torch.isfinite(tokens.loss).all():
                first = int(tokens.row[~torch.isfinite(tokens.loss)][0])
                raise NonFiniteError(
                    f"{part[first].where}: the loss is not finite; the model is broken, has been "
                    "trained too far (try a lower lr, clip or bound), or overflows in its dtype "
                    "(try float32)"
                )
            broken = tokens.row[~tokens.correct].unique().numel()
            sums[0] += float(tokens.loss.sum())
            sums[1] += float(tokens.correct.sum())
            sums[2] += tokens.loss.numel()
            sums[3] += len(part) - broken
            sums[4] += len(part)
    return sums


def score(sums: Sequence[float]) -> Score:
    """The score from the sums of `totals`."""
    loss, right, tokens, whole, rows = sums
    return Score(loss / tokens, right / tokens, whole / rows, int(rows))
