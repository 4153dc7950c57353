"""What is attacked: models that are loaded anew for each use, and the rows they are asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import nn

from fastbound.errors import InputError, count_fields, did_you_mean, one_of, positive
from fastbound.unlearning.data.encoding import (
    Encoded,
    check_template,
    collate,
    encode_all,
    padding,
)
from fastbound.unlearning.data.limits import check_fits
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.evaluation.templates import CHAT, FAMILIES
from fastbound.unlearning.metrics.answers import Score, evaluate
from fastbound.unlearning.metrics.tokens import answer_scores
from fastbound.unlearning.model import evaluating, forward, merged

Load = Callable[[], nn.Module]
Records = Sequence[tuple[str, Mapping[str, Any]]]  # file and number of a row, and its fields
UNLEARNED, BEFORE, REFERENCE = "unlearned", "before", "reference"
ATTACKS = ("relearn", "quantize", "paraphrase")


@dataclass(frozen=True)
class AttackConfig:
    """Which attacks, and how hard; whatever is out of range raises `InputError` at once.

    Attributes:
        attacks: of "relearn", "quantize" and "paraphrase".
        steps: of relearning, AdamW at a constant rate, clipped to a gradient norm of 1.
        lr: that rate.
        share: of the forget rows that are relearned, at least one; the others are measured.
        weights: "all" trains every weight (16 bytes a weight in fp32), "lora" a LoRA of rank 16 on
            all linear layers.
        template: a family of `fastbound evaluate`, "chat", or text with {question} and {answer}.
        max_length: the most tokens of a row.
        batch_size: rows of a step, and of a pass of a measurement.
        rows: measure at most so many rows of a side, spread evenly; None: all.
        seed: of the rows that are relearned, their order and LoRA's start.
    """

    attacks: tuple[str, ...] = ATTACKS
    steps: int = 20
    lr: float = 1e-4
    share: float = 0.1
    weights: Literal["all", "lora"] = "all"
    template: str = "phi"
    max_length: int = 256
    batch_size: int = 16
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown or not self.attacks:
            got = repr(unknown[0]) if unknown else "none"
            near = did_you_mean(unknown[0], ATTACKS) if unknown else ""
            raise InputError(f"attack must be some of {', '.join(ATTACKS)}; got {got}{near}")
        object.__setattr__(self, "attacks", tuple(n for n in ATTACKS if n in self.attacks))
        count_fields(self, ("steps", "max_length", "batch_size"), optional=["rows"])
        positive("lr", self.lr)
        if not 0 < self.share < 1:
            raise InputError(f"share of the forget rows must lie between 0 and 1, got {self.share}")
        one_of("weights", self.weights, ("all", "lora"))
        check_template(self.text)

    @property
    def text(self) -> str:
        """The template as text, or "chat"."""
        if self.template == CHAT or self.template not in FAMILIES:
            return self.template
        family = FAMILIES[self.template]
        return f"{family.question_start}{{question}}{family.question_end}{family.answer}{{answer}}"


@dataclass(frozen=True)
class Subject:
    """The models under attack and the tokenizer that they share.

    Attributes:
        models: each loads a model anew, on its device: "unlearned"; "before"
            unlearning, which says how much there is to recover; and "reference", which never saw
            the forget rows, to compare with. Only the first is needed.
    """

    models: Mapping[str, Load]
    tokenizer: Any
    config: AttackConfig
    given: WeakSet[nn.Module] = field(default_factory=WeakSet, init=False, repr=False)

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """As `fastbound.unlearning.encode`. Raises InputError."""
        config = self.config
        return encode_all(rows, self.tokenizer, max_length=config.max_length, template=config.text)

    def load(self, name: str, rows: Sequence[Encoded]) -> nn.Module:
        """A model, anew and with its adapter merged, that takes these rows. Raises InputError."""
        model = self.models[name]()
        if model in self.given:
            raise InputError(
                f"the function that loads {name!r} returned a model that an attack has already "
                "had, and may have trained or rounded: let it load the model anew each time"
            )
        self.given.add(model)
        model = merged(model)
        check_fits(model, self.tokenizer, rows)
        return model

    def score(self, model: nn.Module, rows: Sequence[Encoded]) -> Score:
        """Loss and accuracy over all answer tokens. Raises NonFiniteError."""
        return evaluate(
            model,
            rows,
            pad=padding(self.tokenizer),
            batch_size=self.config.batch_size,
            device=next(model.parameters()).device,
        )

    @torch.no_grad()
    def losses(self, model: nn.Module, rows: Sequence[Encoded]) -> list[float]:
        """Mean loss of each row, nats a token."""
        device, size = next(model.parameters()).device, self.config.batch_size
        found: list[float] = []
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size], padding(self.tokenizer)).to(device)
            with evaluating(model):
                logits = forward(model, batch.input_ids, batch.attention_mask)
            found += [score.loss for score in answer_scores(logits, batch.labels)]
        return found


def recovered(now: Score, unlearned: Score, before: Score | None) -> float | None:
    """The share of what was forgotten that is back: 0 as unlearned, 1 as before unlearning.

    `(accuracy − accuracy unlearned) / (accuracy before − accuracy unlearned)` of answer tokens: the
    loss is no measure of it, since beyond ln V it measures damage. None where there is no model
    from before, or nothing was forgotten.
    """
    if before is None or before.accuracy <= unlearned.accuracy:
        return None
    return (now.accuracy - unlearned.accuracy) / (before.accuracy - unlearned.accuracy)


def as_dict(score: Score, share: float | None = None) -> dict[str, Any]:
    """A score as JSON holds it."""
    return {"loss": score.loss, "accuracy": score.accuracy, "exact": score.exact,
            "recovered": share}  # fmt: skip


def percent(share: float | None) -> str:
    """For a table."""
    return "-" if share is None else f"{share:.1%}"
