"""Gradient difference: one signed cross-entropy over forget and retain rows in one batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbound.unlearning.encoding import IGNORED


class AnswerTokens(NamedTuple):
    """Cross-entropy of each labelled token of a batch.

    Attributes:
        loss: fp32 (fp64 for fp64 logits) `[tokens]`.
        correct: bool `[tokens]`, whether the most likely token is the label.
        row: int64 `[tokens]`, the row of the batch each token stands in.
    """

    loss: Tensor
    correct: Tensor
    row: Tensor


class GradientDifference(NamedTuple):
    """`loss` to minimise, and the two mean cross-entropies in nats a token, detached."""

    loss: Tensor
    forget: Tensor
    retain: Tensor


def answer_tokens(logits: Tensor, labels: Tensor) -> AnswerTokens:
    """Cross-entropy of every labelled token given all tokens before it.

    Only the logits of labelled positions are gathered and taken to fp32.

    Args:
        logits: `[rows, length, vocabulary]`, any float dtype.
        labels: int64 `[rows, length]`, `IGNORED` where there is nothing to predict.
    """
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    chosen = logits[:, :-1][labelled]
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    loss = F.cross_entropy(chosen, targets[labelled], reduction="none")
    correct = chosen.detach().argmax(-1) == targets[labelled]
    return AnswerTokens(loss, correct, labelled.nonzero()[:, 0])


def gradient_difference(
    logits: Tensor,
    labels: Tensor,
    forget_rows: int,
    *,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
) -> GradientDifference:
    """`retain_weight · CE(retain) − forget_weight · CE(forget)` from one forward pass.

    The first `forget_rows` rows of the batch are to be forgotten, the rest retained. Each CE is the
    mean over its own labelled tokens, so the value and the gradient are those of two separate
    passes, while the weights are read once. Liu et al. 2022, "Continual learning and private
    unlearning", as coded in open-unlearning's GradDiff.

    Args:
        logits: `[rows, length, vocabulary]`.
        labels: int64 `[rows, length]`; both parts need at least one labelled token.
        forget_rows: how many rows lead the batch, `1 <= forget_rows < rows`.

    Raises:
        ValueError: `forget_rows` leaves one part of the batch empty.
    """
    if not 1 <= forget_rows < len(labels):
        raise ValueError(
            f"forget_rows must leave rows on both sides: 1 <= forget_rows < {len(labels)}, "
            f"got {forget_rows}"
        )
    tokens = answer_tokens(logits, labels)
    forgotten = tokens.row < forget_rows
    each = tokens.loss.detach()
    n_forget = forgotten.sum().to(each.dtype)
    n_retain = len(forgotten) - n_forget
    weight = torch.where(forgotten, -forget_weight / n_forget, retain_weight / n_retain)
    loss = (weight * tokens.loss).sum()
    forget = torch.where(forgotten, each, 0).sum() / n_forget
    retain = torch.where(forgotten, 0, each).sum() / n_retain
    return GradientDifference(loss, forget, retain)
