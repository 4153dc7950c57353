"""TOFU: questions about fictitious authors, and paraphrased and wrong answers to score against.

Maini et al. 2024, `locuslab/TOFU` on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.unlearning.data.records import check_split, records
from fastbound.unlearning.data.rows import Row, text_field

HUB = "locuslab/TOFU"
# Each forget split with the rows that stay.
RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
PLAIN = (
    "full",
    *RETAIN_OF,
    *RETAIN_OF.values(),
    "holdout01",
    "holdout05",
    "holdout10",
    "real_authors",
    "world_facts",
)
AUTHORS_PERTURBED = (*(f"{split}_perturbed" for split in RETAIN_OF), "retain_perturbed")
PUBLIC_PERTURBED = ("real_authors_perturbed", "world_facts_perturbed")
SPLITS = (*PLAIN, *AUTHORS_PERTURBED, *PUBLIC_PERTURBED)


@dataclass(frozen=True)
class TofuRow(Row):
    """A question and its answer; in a perturbed split also other wordings and wrong answers.

    Attributes:
        paraphrased: the right answer in other words; None where the split has none.
        perturbed: wrong answers of the same form.
    """

    paraphrased: str | None = None
    perturbed: tuple[str, ...] = ()


def load(split: str, data: str | Path | None = None) -> list[TofuRow]:
    """Rows of one of `SPLITS`.

    Args:
        data: folder with `{split}.jsonl` and the like; None takes the hub.

    Raises:
        InputError: an unknown split, a missing file, or a row whose fields are not the split's.
    """
    check_split("tofu", split, SPLITS)
    rows = [
        _row(record, split, where)
        for where, record in records("tofu", split, data, f"{HUB}:{split}:train")
    ]
    if split.endswith("_perturbed"):
        wrong = len(rows[0].perturbed)
        for row in rows:
            if len(row.perturbed) != wrong:
                raise InputError(
                    f"{row.where}: field 'perturbed_answer' has {len(row.perturbed)} answers, the "
                    f"first row {wrong}: give each row the same number"
                )
    return rows


def _row(record: Mapping[str, Any], split: str, where: str) -> TofuRow:
    question = text_field(record, "question", where)
    answer = text_field(record, "answer", where)
    if not split.endswith("_perturbed"):
        return TofuRow(question, answer, where)
    paraphrased = None
    if split in AUTHORS_PERTURBED:
        paraphrased = text_field(record, "paraphrased_answer", where)
    return TofuRow(question, answer, where, paraphrased, _wrong(record, where))


def _wrong(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    field = "perturbed_answer"
    if record.get(field) is None:
        raise InputError(f"{where}: field {field!r} is missing")
    wrong = record[field]
    if not isinstance(wrong, (list, tuple)) or not wrong:
        raise InputError(f"{where}: field {field!r} must be a list of texts, got {wrong!r}")
    for text in wrong:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: field {field!r} holds {text!r}: every one must be text")
    return tuple(wrong)
