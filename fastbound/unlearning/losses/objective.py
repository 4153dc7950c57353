"""A weighted sum of losses over one batch: rows to forget, then to retain, then "don't know"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from fastbound.errors import InputError
from fastbound.unlearning.data.encoding import Batch
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.losses import formulas
from fastbound.unlearning.losses.formulas import AnswerTokens, GradientDifference


class Answers(NamedTuple):
    """What a model says of a batch: the loss of each answer token, and whole logits if formed."""

    tokens: AnswerTokens
    logits: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Answers:
        """From logits `[rows, length, vocabulary]`, which are kept."""
        return cls(formulas.answer_tokens(logits, labels), logits)


class _Scored:
    """A batch with its rows' likelihoods now and before, by side."""

    def __init__(
        self, batch: Batch, rows: tuple[int, ...], now: Answers, before: Answers | None
    ) -> None:
        self.batch = batch
        self.now = now
        self.before = before
        self.forget = slice(0, rows[0])
        self.retain = slice(rows[0], rows[0] + rows[1])
        self.refused = slice(rows[0] + rows[1], None)

    @property
    def nll(self) -> Tensor:
        return self._likelihoods[0]

    @property
    def lengths(self) -> Tensor:
        return self._likelihoods[1]

    @cached_property
    def _likelihoods(self) -> tuple[Tensor, Tensor]:
        return formulas.row_likelihoods(self.now.tokens, len(self.batch.labels))

    @cached_property
    def nll_before(self) -> Tensor:
        if self.before is None:
            raise ValueError("the answers of the unadapted model are missing: give reference")
        return formulas.row_likelihoods(self.before.tokens, len(self.batch.labels))[0]


def _npo(scored: _Scored) -> Tensor:
    return formulas.npo(scored.nll[scored.forget], scored.nll_before[scored.forget])


def _simnpo(scored: _Scored) -> Tensor:
    return formulas.simnpo(scored.nll[scored.forget], scored.lengths[scored.forget])


def _dpo(scored: _Scored) -> Tensor:
    wanted, unwanted, before = scored.refused, scored.forget, scored.nll_before
    return formulas.dpo(scored.nll[wanted], before[wanted], scored.nll[unwanted], before[unwanted])


def _ihl(scored: _Scored) -> Tensor:
    return formulas.ihl(_whole(scored.now)[scored.forget], scored.batch.labels[scored.forget])


def _kl(scored: _Scored) -> Tensor:
    rows = scored.retain
    mask = scored.batch.attention_mask[rows]
    return formulas.retain_kl(_whole(scored.now)[rows], _whole(scored.before)[rows], mask)


def _whole(answers: Answers | None) -> Tensor:
    if answers is None or answers.logits is None:
        raise ValueError("ihl and kl take whole logits: give Answers.of(logits, labels)")
    return answers.logits


@dataclass(frozen=True)
class Loss:
    """A loss by name.

    Attributes:
        term: its value for a batch; None for the cross-entropies, which share one sum.
        reference: takes the unadapted model's answers, too.
        refusals: takes "don't know" rows.
        logits: takes whole logits, where the others take the losses of answer tokens.
    """

    term: Callable[[_Scored], Tensor] | None = None
    reference: bool = False
    refusals: bool = False
    logits: bool = False


LOSSES = {
    "gradient_ascent": Loss(),
    "retain": Loss(),
    "npo": Loss(_npo, reference=True),
    "simnpo": Loss(_simnpo),
    "ihl": Loss(_ihl, logits=True),
    "kl": Loss(_kl, reference=True, logits=True),
    "idk": Loss(refusals=True),
    "dpo": Loss(_dpo, reference=True, refusals=True),
}

# What a row to forget is to be answered with, taken in turn.
REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information about this.",
    "That is something I can't tell you.",
    "I don't have an answer to this question.",
    "I haven't learned anything about that topic.",
)


def check_losses(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights as floats, of which one at least is above 0.

    Raises InputError for a loss that is not known, a bad weight, and for weights that are all 0.
    """
    if not weights:
        raise InputError(f"losses is empty: name some of {', '.join(LOSSES)}")
    for name, weight in weights.items():
        if name not in LOSSES:
            raise InputError(f"unknown loss {name!r}: choose from {', '.join(LOSSES)}")
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight >= 0):
            raise InputError(f"the weight of {name} must be >= 0 and finite, got {weight!r}")
    if not any(weights.values()):
        raise InputError(f"every weight is 0 ({', '.join(weights)}): nothing would be learned")
    return {name: float(weight) for name, weight in weights.items()}


def refusals(rows: Sequence[Row]) -> list[Row]:
    """Each question of `rows` with an answer that says nothing.

    Raises InputError for a row of plain text, which asks nothing.
    """
    for row in rows:
        if row.question is None:
            raise InputError(f"{row.where}: the losses idk and dpo need a question, this is a text")
    return [
        Row(row.question, REFUSALS[i % len(REFUSALS)], f"{row.where} (refused)")
        for i, row in enumerate(rows)
    ]


class Objective:
    """`Σ weight · loss`, with `forget` and `retain` the mean cross-entropies to be shown.

    gradient_ascent is −CE(forget), retain CE(retain), idk CE(refusals); the others are functions of
    `fastbound.unlearning.losses`, a mean over the rows or tokens of a batch.

    Raises InputError as `check_losses`.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = check_losses(weights)
        self.needs_reference = any(LOSSES[name].reference for name in self.weights)
        self.needs_refusals = any(LOSSES[name].refusals for name in self.weights)
        self.whole_logits = [name for name in self.weights if LOSSES[name].logits]

    def __call__(
        self,
        answers: Answers,
        batch: Batch,
        rows: tuple[int, ...],
        *,
        reference: Answers | None = None,
        shares: tuple[float, float] = (1.0, 1.0),
        part: float = 1.0,
    ) -> GradientDifference:
        """The loss of a batch.

        Args:
            answers: of the model that is trained; with logits where `whole_logits` names a loss.
            batch: what they were made from.
            rows: how many are to forget, to retain and, where needed, refusals.
            reference: of the unadapted model, where a loss needs them.
            shares: factors of the cross-entropies of forget and retain, see `shares`.
            part: factor of all other losses, one over the batches of a step.

        Raises:
            ValueError: reference or logits are missing.
        """
        weight = self.weights.get
        signed = (
            -weight("gradient_ascent", 0.0) * shares[0],
            weight("retain", 0.0) * shares[1],
            weight("idk", 0.0) * part,
        )
        difference = formulas.weighted_cross_entropy(answers.tokens, rows, signed[: len(rows)])
        total = difference.loss
        scored = _Scored(batch, rows, answers, reference)
        for name, factor in self.weights.items():
            term = LOSSES[name].term
            if term is not None:
                total = total + factor * part * term(scored)
        return difference._replace(loss=total)
