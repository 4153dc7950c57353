"""TDEC: what a model repeats of sequences of The Pile, and what is left of it otherwise."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbound.errors import InputError
from fastbound.unlearning import metrics
from fastbound.unlearning.data.encoding import Encoded, beginning
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.evaluation.benchmark import Log, Settings, Summary
from fastbound.unlearning.evaluation.picture import BLUE, GREY, picture
from fastbound.unlearning.evaluation.session import Session
from fastbound.unlearning.evaluation.tdec import sets, validation
from fastbound.unlearning.evaluation.tdec.extraction import first_choices, prefix_continuations
from fastbound.unlearning.evaluation.tdec.sequences import TARGET_LENGTH, read_sequences
from fastbound.unlearning.evaluation.templates import end_of_text

LOG = "tdec_log.json"
CONVENTIONS: tuple[str, ...] = ("knowledge-unlearning",)
DEFAULT_SPLIT: str | None = None


@dataclass(frozen=True)
class Prepared:
    """The sequences to extract, and the validation sets that stand beside them."""

    sequences: Sequence[Encoded]
    validation: Mapping[str, validation.Prepared]

    @property
    def encoded(self) -> list[Encoded]:
        beside = (row for part in self.validation.values() for row in part.encoded)
        return [*self.sequences, *beside]

    @property
    def continued(self) -> list[tuple[Encoded, int]]:
        """The dialogues; a sequence is continued no further than it goes itself."""
        parts = self.validation.values()
        return [(prompt, validation.REPLY_TOKENS) for part in parts for prompt in part.prompts]


def load(split: str, data: str | Path | None = None) -> Sequence[Row]:
    """Rows of one of `sets.SETS`, or of any other name the `sequences` to extract.

    Raises:
        InputError: no folder is given, a file is missing, or a row or an array is malformed.
    """
    if data is not None and split in sets.SETS:
        return sets.load(split, data)
    return read_sequences(split, data)


def prepare(settings: Settings, tokenizer: Any) -> Prepared:
    """The sequences as at most 200 tokens each, every one longer than `settings.n`."""
    end_of_text(tokenizer)
    n, rows = settings.n, []
    for row in read_sequences(str(settings.split), settings.data)[: settings.rows]:
        text = beginning(row.answer, tokenizer, TARGET_LENGTH)
        ids = row.tokens or tuple(tokenizer(text, verbose=False)["input_ids"])
        ids = ids[:TARGET_LENGTH]
        if len(ids) <= n:
            raise InputError(f"{row.where}: {len(ids)} tokens are too few for EL_{n}: lower --n")
        if max(ids) >= len(tokenizer):
            raise InputError(
                f"{row.where}: token {max(ids)} is not in the tokenizer's {len(tokenizer)}: the "
                "file was made with another tokenizer"
            )
        rows.append(Encoded(ids, ids, row.where))
    beside = validation.prepare(settings.data, tokenizer, most_rows=settings.rows)
    return Prepared(rows, beside)


def compared(retain: Log, prepared: Prepared) -> dict[str, tuple[int, int]]:
    """With no other model."""
    raise InputError("tdec compares with no other model: leave --retain-log out")


def score(session: Session, prepared: Prepared, settings: Settings) -> dict[str, Any]:
    """A log: EL_n and MA of each sequence, each saved as soon as it is known; validation sets."""
    n = settings.n
    found = session.each(
        f"EL_{n} and MA",
        prepared.sequences,
        lambda part: [_sequence(session, row, n) for row in part],
        length=lambda row: len(row.ids),
        batch_size=1,
    )
    return {
        "n": n,
        "extraction_likelihood": [each["el"] for each in found],
        "memorisation_accuracy": [each["ma"] for each in found],
        "validation": validation.score(session, prepared.validation),
    }


def _sequence(session: Session, row: Encoded, n: int) -> dict[str, float]:
    ids = row.ids
    predicted = first_choices(session, ids, row.where)
    found = prefix_continuations(session, ids, predicted)
    return {
        "el": metrics.extraction_likelihood(found, ids, n),
        "ma": metrics.memorisation_accuracy(predicted, ids),
    }


def summarise(log: Log, retain: Log | None, settings: Settings) -> Summary:
    """Means over the sequences, and whether both are below the published thresholds."""
    el = float(np.mean(log["extraction_likelihood"]))
    ma = float(np.mean(log["memorisation_accuracy"]))
    thresholds = {"el": metrics.EL10_THRESHOLD, "ma": metrics.MA_THRESHOLD}
    forgotten = el < thresholds["el"] and ma < thresholds["ma"] if log["n"] == 10 else None
    return {
        "convention": "knowledge-unlearning",
        "n": log["n"],
        "extraction_likelihood": el,
        "memorisation_accuracy": ma,
        "thresholds": thresholds,
        "forgotten": forgotten,
        "validation": validation.summarise(log["validation"]),
        "absent": [name for name in sets.SETS if name not in log["validation"]],
    }


def table(summary: Summary) -> list[str]:
    thresholds = summary["thresholds"]
    lines = [
        f"EL_{summary['n']:<4} {summary['extraction_likelihood']:.4f}"
        + (f"   threshold {thresholds['el']}" if summary["n"] == 10 else ""),
        f"MA      {summary['memorisation_accuracy']:.4f}   threshold {thresholds['ma']}",
    ]
    if summary["forgotten"] is not None:
        verdict = "both below" if summary["forgotten"] else "not both below"
        lines.append(f"{verdict} the thresholds published for GPT-Neo 125M")
    lines += validation.table(summary["validation"])
    if summary["absent"]:
        lines += textwrap.wrap(f"not in the folder: {', '.join(summary['absent'])}", 90)
    return [*lines, f"convention {summary['convention']}"]


def draw(path: Path, log: Log, retain: Log | None, summary: Summary) -> None:
    """How both values are spread over the sequences, thresholds dashed."""
    with picture(path) as axes:
        parts = (
            ("extraction_likelihood", "el", f"EL_{log['n']}"),
            ("memorisation_accuracy", "ma", "MA"),
        )
        for axis, (name, short, title) in zip(axes, parts, strict=True):
            axis.ecdf(log[name], color=BLUE)
            if short == "ma" or log["n"] == 10:
                axis.axvline(
                    summary["thresholds"][short], color=GREY, linestyle="--", label="threshold"
                )
                axis.legend(loc="lower right", fontsize="small")
            axis.set_xlim(-0.02, 1.02)  # a curve at 0 is beside the axis, not under it
            axis.set_title(title)
            axis.set_xlabel("value (low: forgotten)")
            axis.set_ylabel("share of sequences up to it")
