"""A weighted sum of losses over one batch: rows to forget, then to retain, then "don't know"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastbound.unlearning import losses
from fastbound.unlearning.data import Row
from fastbound.unlearning.encoding import Batch
from fastbound.unlearning.errors import InputError
from fastbound.unlearning.losses import GradientDifference


@dataclass(frozen=True)
class Needs:
    """What a loss takes besides the logits: those of the unadapted model, or "don't know" rows."""

    reference: bool = False
    refusals: bool = False


LOSSES = {
    "gradient_ascent": Needs(),
    "retain": Needs(),
    "npo": Needs(reference=True),
    "simnpo": Needs(),
    "ihl": Needs(),
    "kl": Needs(reference=True),
    "idk": Needs(refusals=True),
    "dpo": Needs(reference=True, refusals=True),
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
    """The weights as floats. Raises InputError for a loss that is not known and a bad weight."""
    if not weights:
        raise InputError(f"losses is empty: name some of {', '.join(LOSSES)}")
    for name, weight in weights.items():
        if name not in LOSSES:
            raise InputError(f"unknown loss {name!r}: choose from {', '.join(LOSSES)}")
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight >= 0):
            raise InputError(f"the weight of {name} must be >= 0 and finite, got {weight!r}")
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
    :mod:`fastbound.unlearning.losses`, a mean over the rows or tokens of a batch.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self.needs_reference = any(LOSSES[name].reference for name in self.weights)
        self.needs_refusals = any(LOSSES[name].refusals for name in self.weights)

    def __call__(
        self,
        logits: Tensor,
        batch: Batch,
        rows: tuple[int, ...],
        *,
        reference: Tensor | None = None,
        shares: tuple[float, float] = (1.0, 1.0),
        part: float = 1.0,
    ) -> GradientDifference:
        """The loss of a batch.

        Args:
            logits: `[rows, length, vocabulary]`.
            batch: what they were made from.
            rows: how many are to forget, to retain and, where needed, refusals.
            reference: logits of the unadapted model, where a loss needs them.
            shares: factors of the cross-entropies of forget and retain, see `shares`.
            part: factor of all other losses, one over the batches of a step.
        """
        tokens = losses.answer_tokens(logits, batch.labels)
        weight = self.weights.get
        signed = (
            -weight("gradient_ascent", 0.0) * shares[0],
            weight("retain", 0.0) * shares[1],
            weight("idk", 0.0) * part,
        )
        difference = losses.weighted_cross_entropy(tokens, rows, signed[: len(rows)])
        total = difference.loss
        forget, retain = slice(0, rows[0]), slice(rows[0], rows[0] + rows[1])
        refused = slice(rows[0] + rows[1], None)
        nll, lengths = losses.row_likelihoods(tokens, len(batch.labels))
        before = nll
        if reference is not None:
            before, _ = losses.row_likelihoods(
                losses.answer_tokens(reference, batch.labels), len(batch.labels)
            )
        for name, factor in self.weights.items():
            if name == "npo":
                term = losses.npo(nll[forget], before[forget])
            elif name == "simnpo":
                term = losses.simnpo(nll[forget], lengths[forget])
            elif name == "dpo":
                term = losses.dpo(nll[refused], before[refused], nll[forget], before[forget])
            elif name == "ihl":
                term = losses.ihl(logits[forget], batch.labels[forget])
            elif name == "kl" and reference is not None:
                mask = batch.attention_mask[retain]
                term = losses.retain_kl(logits[retain], reference[retain], mask)
            else:  # the cross-entropies, above
                continue
            total = total + factor * part * term
        return difference._replace(loss=total)
