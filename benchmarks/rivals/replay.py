"""Interleaved measurements handed to pytest-benchmark, whose own loop times one function at a time.

It gets what `dispatch.timing.interleaved` measured: `recorded_time` is its timer and `playback`
its function, and its statistics, JSON and comparisons then work on exactly those samples.
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
    """`cases` of a device type; `cpu_rounds` by default on a CPU, where a round takes seconds."""

    cases: Callable[..., list[Case]]
    competitors: Sequence[Competitor]
    cpu_rounds: int


class _Tape:
    """The reading of pytest-benchmark's timer: 0 before a playback, one sample after it."""

    reading = 0.0


def recorded_time() -> float:
    """The timer handed to pytest-benchmark: seconds on the tape."""
    return _Tape.reading


def playback(seconds: float) -> None:
    """The function handed to pytest-benchmark: lets `recorded_time` advance by `seconds`."""
    _Tape.reading += seconds


def play(samples: list[float]) -> Callable[[], tuple[tuple[float], dict[str, float]]]:
    """A pytest-benchmark `setup` that rewinds the tape and yields the next sample as argument."""
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
    """The test of a module with a SUITE: one competitor's samples; its failure is raised here."""
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
