"""One adapted linear layer, forward and forward+backward, against its floor and its rivals.

pytest benchmarks/ --benchmark-only [--smoke] [--tokens 1024,8192] [--benchmark-json out.json]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.interleaved import play, playback, recorded_time
from benchmarks.measure import Measurement
from benchmarks.report import Row


@pytest.mark.benchmark(timer=recorded_time)
def test_linear(
    benchmark: Any,
    measured: Callable[[str, str], tuple[Case, Measurement]],
    rows: list[Row],
    case_name: str,
    direction: str,
    competitor_name: str,
) -> None:
    case, measurement = measured(case_name, competitor_name)
    if isinstance(measurement.failure, torch.OutOfMemoryError):
        pytest.skip(f"{competitor_name}: out of memory on {case_name}")
    if measurement.failure is not None:
        raise measurement.failure
    samples = measurement.samples[direction]
    benchmark.group = f"{case_name} {direction}"
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
