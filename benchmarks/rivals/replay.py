"""Pass interleaved measurements to pytest-benchmark, whose own loop times one function at a time.

The samples come from `dispatch.timing.interleaved`. pytest-benchmark gets `recorded_time` as its
timer and `playback` as its function, so its statistics, JSON and comparisons are of those samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.report.rows import BenchmarkRow
from benchmarks.rivals.cases import Case
from benchmarks.rivals.competitors import Competitor
from benchmarks.rivals.measuring import Measurement, described


@dataclass(frozen=True)
class Suite:
    """A benchmark's cases by device type, its competitors, and its default rounds on a CPU."""

    cases: Callable[..., list[Case]]
    competitors: Sequence[Competitor]
    cpu_rounds: int


class _Tape:
    """What pytest-benchmark's timer reads: 0 before a playback, and one sample after it."""

    reading = 0.0


def recorded_time() -> float:
    """The timer that pytest-benchmark gets: the seconds on the tape."""
    return _Tape.reading


def playback(seconds: float) -> None:
    """The function that pytest-benchmark gets: it advances `recorded_time` by `seconds`."""
    _Tape.reading += seconds


def play(samples: list[float]) -> Callable[[], tuple[tuple[float], dict[str, float]]]:
    """A `setup` for pytest-benchmark that rewinds the tape and returns the next sample."""
    remaining = iter(samples)

    def setup() -> tuple[tuple[float], dict[str, float]]:
        _Tape.reading = 0.0
        return (next(remaining),), {}

    return setup


@pytest.mark.benchmark(timer=recorded_time)
def replayed(
    benchmark: Any,
    measured: Callable[[str, str], tuple[Case, Measurement]],
    rows: list[BenchmarkRow],
    case_name: str,
    direction: str,
    competitor_name: str,
) -> None:
    """The test of a module with a SUITE: replay one competitor's samples, or raise its failure."""
    case, measurement = measured(case_name, competitor_name)
    if isinstance(measurement.failure, torch.OutOfMemoryError):
        pytest.skip(f"{competitor_name}: out of memory on {case}")
    if measurement.failure is not None:
        raise measurement.failure
    samples = measurement.samples[direction]
    benchmark.group = f"{case} {direction}"
    benchmark.extra_info.update(described(case, competitor_name, direction, measurement))
    benchmark.pedantic(playback, setup=play(samples), rounds=len(samples))
    if benchmark.enabled:
        rows.append(BenchmarkRow.of(benchmark.extra_info, benchmark.stats.stats.as_dict()))
