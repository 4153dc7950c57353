"""One cell of the map: its place in the grid, its settings, and the rows that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastbound.errors import count_fields, one_of, positive
from fastbound.unlearning.config import DTYPES
from fastbound.unlearning.data.encoding import IGNORED, Encoded

WRONG = 2  # wrong answers per row in the truth ratio


@dataclass(frozen=True, order=True)
class Cell:
    """A cell's place in the grid; ordered by seed first, so that whole seeds finish first."""

    seed: int
    rank: int
    lr: float
    adapter: str

    @property
    def key(self) -> str:
        return f"{self.adapter}|lr={self.lr:g}|rank={self.rank}|seed={self.seed}"


@dataclass(frozen=True)
class CellConfig:
    """How every cell is run.

    Attributes:
        steps: steps of AdamW, without weight decay except for "lora-decay"; with `+stop`
            the most.
        warmup: share of the steps in which the rate rises; in the others it falls to 0, as in
            `fastbound unlearn`. None keeps the rate constant.
        batch_size: forget rows per step, with as many retain rows.
        slope: alpha / rank, the slope of every adapter at zero.
        dtype: "float32" or "bfloat16", for the weights and for autocast.
        max_length: the most tokens of a row.
        eval_rows: score at most this many rows per side, spread evenly; None scores all.
        log_every: steps between two logged ones.
    """

    steps: int = 300
    warmup: float | None = None
    batch_size: int = 8
    slope: float = 2.0
    dtype: str = "float32"
    max_length: int = 256
    eval_rows: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        count_fields(
            self, ("steps", "batch_size", "max_length", "log_every"), optional=["eval_rows"]
        )
        positive("slope", self.slope)
        one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class Rows:
    """The rows of a map as tokens.

    Attributes:
        wrong: for each row in `retain`, its question with `WRONG` answers of other rows.
        general: questions that were never in the rows, each with its right answer first and then
            wrong ones.
    """

    forget: Sequence[Encoded]
    retain: Sequence[Encoded]
    wrong: Sequence[Encoded]
    general: Sequence[Sequence[Encoded]] = ()


def with_wrong_answers(rows: Sequence[Encoded]) -> list[Encoded]:
    """Each row's question with the answers of the `WRONG` rows that follow it, row by row."""
    mixed = []
    for i, row in enumerate(rows):
        asked = [t for t, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]
        for k in range(1, WRONG + 1):
            answer = tuple(t for t in rows[(i + k) % len(rows)].labels if t != IGNORED)
            mixed.append(Encoded((*asked, *answer), (*[IGNORED] * len(asked), *answer), row.where))
    return mixed
