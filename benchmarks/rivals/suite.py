"""What every comparison shares: its cases and competitors, and how a result is benchmarked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch

from benchmarks.report.rows import Row
from benchmarks.rivals.cases import Case
from benchmarks.rivals.interleaved import play, playback
from benchmarks.rivals.layer import Competitor
from benchmarks.rivals.measuring import Measurement


@dataclass(frozen=True)
class Suite:
    """`cases` of a device type; `cpu_rounds` by default on a CPU, where a round takes seconds."""

    cases: Callable[..., list[Case]]
    competitors: Sequence[Competitor]
    cpu_rounds: int


def replay(
    benchmark: Any,
    case: Case,
    measurement: Measurement,
    direction: str,
    competitor_name: str,
    rows: list[Row],
) -> None:
    """Hand the samples of one competitor to pytest-benchmark; a failure is raised here."""
    if isinstance(measurement.failure, torch.OutOfMemoryError):
        pytest.skip(f"{competitor_name}: out of memory on {case}")
    if measurement.failure is not None:
        raise measurement.failure
    samples = measurement.samples[direction]
    benchmark.group = f"{case} {direction}"
    benchmark.extra_info.update(
        asdict(case.shape),
        M=case.M,
        rank=case.rank,
        dtype=case.dtype,
        direction=direction,
        competitor=competitor_name,
        path=measurement.path,
        saved_bytes=measurement.saved_bytes,
        peak_bytes=measurement.peak_bytes,
    )
    benchmark.pedantic(playback, setup=play(samples), rounds=len(samples))
    if benchmark.enabled:
        rows.append(Row.of(benchmark.extra_info, benchmark.stats.stats.as_dict()))
