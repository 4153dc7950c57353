"""Which rows a step uses: a pure function of seed and step, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")


@dataclass(eq=False)
class Pairing:
    """Forget rows in a new order each epoch, each paired with a retain row.

    Both sides are endless streams of shuffled passes: every row is used once before any is used
    again. An epoch is one pass over the forget rows; retain rows continue through passes of their
    own.

    Attributes:
        forget, retain: number of rows of each side.
        batch_size: pairs per batch of one process.
        accumulation: batches per step in each process.
        processes: number of processes that take batches in parallel.
        seed: of both shuffles.
    """

    forget: int
    retain: int
    _: KW_ONLY
    batch_size: int
    accumulation: int = 1
    processes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        # A cache per object: a step asks for few passes, in order.
        self._order = lru_cache(maxsize=4)(self._shuffled)

    @property
    def pairs_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    def steps(self, epochs: float) -> int:
        """Number of steps that use every forget row `epochs` times, rounded up."""
        steps = epochs * self.forget / self.pairs_per_step
        return max(1, math.ceil(steps - 1e-9))  # epochs may be a rounded quotient

    def batch(self, step: int, part: int, process: int = 0) -> tuple[list[int], list[int]]:
        """Indices of the forget rows and of the retain rows of one batch.

        Args:
            step: from 0.
            part: which batch of the step, 0 to `accumulation` - 1.
            process: rank of the process that uses it.
        """
        first = ((step * self.accumulation + part) * self.processes + process) * self.batch_size
        places = range(first, first + self.batch_size)
        return (
            [self._at(place, self.forget, side=0) for place in places],
            [self._at(place, self.retain, side=1) for place in places],
        )

    def _at(self, place: int, rows: int, side: int) -> int:
        round_, index = divmod(place, rows)
        return self._order(rows, side, round_)[index]

    def _shuffled(self, rows: int, side: int, round_: int) -> list[int]:
        # Each pass of each side has its own seed, independent of what was drawn before.
        generator = torch.Generator().manual_seed((2 * self.seed + side) * 1_000_003 + round_)
        return torch.randperm(rows, generator=generator).tolist()


def evenly(rows: Sequence[Item], most: int | None) -> Sequence[Item]:
    """At most `most` of `rows`, evenly spaced; None means all."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]
