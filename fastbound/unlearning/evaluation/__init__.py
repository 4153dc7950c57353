"""Benchmarks of unlearning: their rows, their templates, and their evaluation of a model.

Each is a module with the names of `benchmark.Benchmark`. Uses `metrics`, `runs` and below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastbound.errors import one_of
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.evaluation import muse, tdec, tofu
from fastbound.unlearning.evaluation.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {"tofu": tofu, "muse": muse, "tdec": tdec}

__all__ = ["BENCHMARKS", "benchmark_named", "load", "muse", "tdec", "tofu"]


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
    return benchmark_named(benchmark).load(split, data)


def benchmark_named(name: str) -> Benchmark:
    """One of `BENCHMARKS`; raises InputError for any other name."""
    one_of("benchmark", name, tuple(BENCHMARKS))
    return BENCHMARKS[name]
