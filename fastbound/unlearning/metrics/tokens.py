"""Per-row token values of labelled batches, from which the metrics of answers are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbound.unlearning.data.encoding import IGNORED
from fastbound.unlearning.losses import answer_tokens


@dataclass(frozen=True)
class AnswerScore:
    """The scores of one row's labelled tokens, in order, including the end of text.

    Attributes:
        log_probabilities: float64 `[tokens]`, given the true previous tokens.
        correct: bool `[tokens]`, whether the token is the model's first choice.
    """

    log_probabilities: Tensor
    correct: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats per token."""
        return -float(self.log_probabilities.mean())

    @property
    def probability(self) -> float:
        """e^-loss: the answer's probability, normalised by its length."""
        return float(torch.exp(self.log_probabilities.mean()))

    def without_end(self) -> AnswerScore:
        """The score without the end of text, the last labelled token, for EM, ES and Min-K %."""
        return AnswerScore(self.log_probabilities[:-1], self.correct[:-1])


def answer_scores(logits: Tensor, labels: Tensor) -> list[AnswerScore]:
    """Score every row: logits `[rows, length, vocabulary]`, labels `[rows, length]`."""
    tokens = answer_tokens(logits, labels)
    counts = torch.bincount(tokens.row, minlength=len(labels)).tolist()
    parts = zip(
        (-tokens.loss).double().cpu().split(counts), tokens.correct.cpu().split(counts), strict=True
    )
    return [AnswerScore(*part) for part in parts]


def vocabulary_log_probabilities(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """For each row the log-probabilities of the whole vocabulary at every labelled token.

    They are as large as the logits, so pass one row or a few at a time.
    """
    labelled = labels[:, 1:] != IGNORED
    return [
        F.log_softmax(row[at].float(), -1) for row, at in zip(logits[:, :-1], labelled, strict=True)
    ]
