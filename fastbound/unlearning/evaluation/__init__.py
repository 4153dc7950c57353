"""Benchmarks of unlearning: their rows, their templates, and their evaluation of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastbound.errors import InputError
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.evaluation import muse, tdec, tofu

BENCHMARKS = {"tofu": tofu, "muse": muse, "tdec": tdec}

__all__ = ["BENCHMARKS", "load", "muse", "tdec", "tofu"]


def load(benchmark: str, split: str, data: str | Path | None = None) -> Sequence[Row]:
    """The rows of one split, from the hub or from a folder with the same columns.

    Args:
        benchmark: "tofu", "muse" or "tdec".
        split: as the benchmark's `load` names them.
        data: folder with a file per split; None takes the hub.

    Raises:
        InputError: benchmark or split is unknown (the known ones are listed), a file is missing or
            a row does not have the fields of the benchmark.
    """
    if benchmark not in BENCHMARKS:
        raise InputError(f"benchmark must be one of {', '.join(BENCHMARKS)}; got {benchmark!r}")
    rows: Sequence[Row] = BENCHMARKS[benchmark].load(split, data)
    return rows
