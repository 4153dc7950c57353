"""TOFU's evaluation of a model, in the layout of its aggregated log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbound.unlearning.data.encoding import Encoded
from fastbound.unlearning.data.records import check_split
from fastbound.unlearning.evaluation import tofu
from fastbound.unlearning.evaluation.session import Session
from fastbound.unlearning.evaluation.templates import (
    encode_answer,
    encode_prompt,
    end_of_text,
    warn_of_empty_answers,
)
from fastbound.unlearning.metrics.conventions import OPEN_UNLEARNING
from fastbound.unlearning.metrics.logs import FORGET, REAL_AUTHORS, RETAIN, SECTIONS, WORLD_FACTS
from fastbound.unlearning.metrics.texts import rouge

GENERATED = 200  # open-unlearning: new tokens; TOFU: tokens with the prompt


@dataclass(frozen=True)
class Section:
    """One section's rows as tokens.

    Attributes:
        paraphrased: the answers themselves where the rows have no other wording.
        perturbed: wrong answers, all of a row after all of the row before.
    """

    rows: Sequence[tofu.TofuRow]
    answers: Sequence[Encoded]
    paraphrased: Sequence[Encoded] | None
    perturbed: Sequence[Encoded]
    prompts: Sequence[list[int]]

    @property
    def encoded(self) -> list[Encoded]:
        return [*self.answers, *(self.paraphrased or ()), *self.perturbed]


def prepare(
    split: str,
    data: str | Path | None,
    tokenizer: Any,
    *,
    family: str,
    convention: str,
    most_rows: int | None = None,
) -> dict[str, Section]:
    """Load and encode all four sections; the first row that cannot be used is named.

    Args:
        split: "forget01", "forget05" or "forget10".
        most_rows: the first so many of every section; TOFU's own code takes 300.
    """
    check_split("tofu --split", split, tuple(tofu.RETAIN_OF))
    splits = {
        RETAIN: "retain_perturbed",
        REAL_AUTHORS: "real_authors_perturbed",
        WORLD_FACTS: "world_facts_perturbed",
        FORGET: f"{split}_perturbed",
    }

    def encode(row: tofu.TofuRow, answer: str) -> Encoded:
        return encode_answer(
            row.question or "", answer, row.where, tokenizer, family=family, convention=convention
        )

    sections = {}
    for section, name in splits.items():
        rows = tofu.load(name, data)[:most_rows]
        reworded = [encode(row, row.paraphrased) for row in rows if row.paraphrased is not None]
        part = sections[section] = Section(
            rows,
            [encode(row, row.answer) for row in rows],
            reworded or None,
            [encode(row, wrong) for row in rows for wrong in row.perturbed],
            [
                encode_prompt(row.question or "", tokenizer, family=family, convention=convention)
                for row in rows
            ],
        )
        warn_of_empty_answers(name, part.encoded, end_of_text(tokenizer))
    return sections


def score(session: Session, sections: dict[str, Section], *, convention: str) -> dict[str, Any]:
    """TOFU's aggregated log: per row losses, tokens, ROUGE and text, with EM and ES added."""
    log = {}
    for section, part in sections.items():
        name = SECTIONS[section]
        answers = session.answers(f"{name} answers", part.answers)
        reworded = answers
        if part.paraphrased is not None:
            reworded = session.answers(f"{name} paraphrased", part.paraphrased)
        flat = iter(session.answers(f"{name} wrong", part.perturbed))
        wrong = [[next(flat) for _ in row.perturbed] for row in part.rows]
        most = [
            GENERATED if convention == OPEN_UNLEARNING else max(1, GENERATED - len(prompt))
            for prompt in part.prompts
        ]
        texts = session.texts(f"{name} texts", part.prompts, most)
        scores = [rouge(row.answer, text) for row, text in zip(part.rows, texts, strict=True)]
        log[section] = {
            "avg_gt_loss": [each["loss"] for each in answers],
            "num_token_gt": [each["tokens"] for each in answers],
            "average_perturb_loss": [[each["loss"] for each in row] for row in wrong],
            "num_token_perturb": [[each["tokens"] for each in row] for row in wrong],
            "avg_paraphrased_loss": [each["loss"] for each in reworded],
            "num_token_paraphrased": [each["tokens"] for each in reworded],
            "rouge1_recall": [each.rouge1_recall for each in scores],
            "rougeL_recall": [each.rougeL_recall for each in scores],
            "exact_memorisation": [each["exact_memorisation"] for each in answers],
            "extraction_strength": [each["extraction_strength"] for each in answers],
            "generated_text": [
                [row.question, text, row.answer] for row, text in zip(part.rows, texts, strict=True)
            ],
        }
    return log
