"""The losses of unlearning, each a function of one batch's logits or of its rows' likelihoods."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbound.unlearning.data.encoding import IGNORED


class AnswerTokens(NamedTuple):
    """Cross-entropy of each labelled token of a batch.

    Attributes:
        loss: fp32 (fp64 for fp64 logits) `[tokens]`, in nats.
        correct: bool `[tokens]`, whether the most likely token is the label.
        row: int64 `[tokens]`, the row of the batch that contains the token.
    """

    loss: Tensor
    correct: Tensor
    row: Tensor


class GradientDifference(NamedTuple):
    """The `loss` to minimise, and the two mean cross-entropies in nats per token, detached."""

    loss: Tensor
    forget: Tensor
    retain: Tensor


def answer_tokens(logits: Tensor, labels: Tensor) -> AnswerTokens:
    """Cross-entropy of every labelled token given all previous tokens.

    Only the logits of labelled positions are gathered and converted to fp32.

    Args:
        logits: `[rows, length, vocabulary]`, any float dtype.
        labels: int64 `[rows, length]`, `IGNORED` where there is nothing to predict.
    """
    chosen, targets, row = answer_positions(logits, labels)
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    loss = F.cross_entropy(chosen, targets, reduction="none")
    return AnswerTokens(loss, chosen.detach().argmax(-1) == targets, row)


def answer_positions(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The `states` `[rows, length, width]` that predict a label, those labels, and their rows."""
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    return states[:, :-1][labelled], targets[labelled], labelled.nonzero()[:, 0]


def gradient_difference(
    logits: Tensor,
    labels: Tensor,
    forget_rows: int,
    *,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
    ceiling: float | None = None,
) -> GradientDifference:
    """`retain_weight · CE(retain) − forget_weight · CE(forget)` from one forward pass.

    The first `forget_rows` rows of the batch are to be forgotten, the rest retained. Each CE is the
    mean over its own labelled tokens, so that the value and the gradient are those of two separate
    passes, but the weights are read only once. Liu et al. 2022, "Continual learning and private
    unlearning", as coded in open-unlearning's GradDiff.

    Args:
        logits: `[rows, length, vocabulary]`.
        labels: int64 `[rows, length]`; both parts need at least one labelled token.
        forget_rows: number of rows to forget, `1 <= forget_rows < rows`.
        ceiling: CE(forget) is the mean of min(loss, ceiling) over tokens, in nats, so that a token
            beyond it is not pushed any further; None pushes without end.

    Raises:
        ValueError: `forget_rows` leaves one part of the batch empty.
    """
    if not 1 <= forget_rows < len(labels):
        raise ValueError(
            f"forget_rows must leave rows on both sides: 1 <= forget_rows < {len(labels)}, "
            f"got {forget_rows}"
        )
    return weighted_cross_entropy(
        answer_tokens(logits, labels),
        (forget_rows, len(labels) - forget_rows),
        (-forget_weight, retain_weight),
        ceiling,
    )


def weighted_cross_entropy(
    tokens: AnswerTokens,
    rows: tuple[int, ...],
    weights: tuple[float, ...],
    ceiling: float | None = None,
) -> GradientDifference:
    """`Σ_g weights[g] · CE(rows of group g)`, each CE the mean over its group's labelled tokens.

    The groups follow one another in the batch: forget, then retain, then any others. No forget
    token counts for more than `ceiling` in the sum; the two means are of the losses as they are.
    """
    loss, each = tokens.loss, tokens.loss.detach()
    if ceiling is not None:
        loss = torch.where(tokens.row < rows[0], loss.clamp(max=ceiling), loss)
    weight = torch.zeros_like(each)
    means = []
    start = 0
    for count, share in zip(rows, weights, strict=True):
        inside = (tokens.row >= start) & (tokens.row < start + count)
        number = inside.sum().to(each.dtype)
        weight = torch.where(inside, share / number, weight)
        means.append(torch.where(inside, each, 0).sum() / number)
        start += count
    return GradientDifference((weight * loss).sum(), means[0], means[1])


def row_likelihoods(tokens: AnswerTokens, rows: int) -> tuple[Tensor, Tensor]:
    """For each row the sum of its token losses, −log p(answer | question), and their number."""
    zero = tokens.loss.new_zeros(rows)
    return (
        zero.index_add(0, tokens.row, tokens.loss),
        zero.index_add(0, tokens.row, torch.ones_like(tokens.loss)),
    )


def npo(nll: Tensor, reference: Tensor, *, beta: float = 0.1) -> Tensor:
    """Negative preference: `mean(−2/β · log σ(β · (nll − reference)))`.

    Zhang et al. 2024, "Negative preference optimization". It approaches 0 as a row is forgotten, so
    that it stops by itself; for β → 0 it becomes gradient ascent plus a constant.

    Args:
        nll: −log p of each row to forget, summed over its answer, `[rows]`.
        reference: the same for the model before unlearning.
    """
    return -F.logsigmoid(beta * (nll - reference)).mean() * 2 / beta


def simnpo(nll: Tensor, lengths: Tensor, *, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """NPO without a reference: `mean(−2/β · log σ(β · (nll / lengths − δ)))`.

    Fan et al. 2024, "Simplicity prevails". `lengths` counts the answer tokens of each row.
    """
    return -F.logsigmoid(beta * (nll / lengths - delta)).mean() * 2 / beta


def flooding(nll: Tensor, lengths: Tensor, *, level: float = 2.5) -> Tensor:
    """A loss of `level` for each row, from below or above: `mean(|nll / lengths − level|)`.

    Ishida et al. 2020, "Do we need zero training loss after achieving zero training error?", with
    the level in each row's own loss: that of a model which has never seen the row, in nats per
    token. A row beyond it is pulled back, so that the ascent does not overshoot.

    Args:
        nll: −log p of each row to forget, summed over its answer, `[rows]`.
        lengths: the number of answer tokens of each row, `[rows]`.
    """
    return (nll / lengths - level).abs().mean()


def dpo(
    wanted: Tensor,
    wanted_reference: Tensor,
    unwanted: Tensor,
    unwanted_reference: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Preference of "I don't know" over the answer: `mean(−2/β · log σ(β · margin))`.

    margin = (unwanted − unwanted_reference) − (wanted − wanted_reference), where each is −log p,
    summed over a row's answer, `[rows]`. Rafailov et al. 2023, with the factor 2 of
    open-unlearning.
    """
    margin = (unwanted - unwanted_reference) - (wanted - wanted_reference)
    return -F.logsigmoid(beta * margin).mean() * 2 / beta


def wga(nll: Tensor, *, beta: float = 1.0) -> Tensor:
    """Weighted gradient ascent: `−mean(p^β · nll)` over tokens, p = e^−nll held fixed.

    Wang et al. 2025, "Rethinking LLM unlearning objectives: a gradient perspective and go beyond",
    arXiv 2502.19301, as coded in open-unlearning. A token that is already forgotten has no weight;
    β = 0 is gradient ascent.

    Args:
        nll: cross-entropy of each token to forget, `[tokens]`.
    """
    return satimp(nll, beta1=beta, beta2=0.0)


def satimp(nll: Tensor, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """`−mean(p^β1 · (1 − p)^β2 · nll)` over tokens, p = e^−nll held fixed.

    Yang et al. 2025, "Exploring criteria of loss reweighting to enhance LLM unlearning", arXiv
    2505.11953: saturation (how well the token is still known) times importance.

    Args:
        nll: cross-entropy of each token to forget, `[tokens]`.
    """
    p = torch.exp(-nll.detach())
    return -(p**beta1 * (1 - p) ** beta2 * nll).mean()
