"""One adapted linear layer, forward and forward+backward, against its floor and its rivals.

pytest benchmarks/ --benchmark-only [--smoke] [--tokens 1024,8192] [--benchmark-json out.json]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases import Case, cases
from benchmarks.competitors import COMPETITORS
from benchmarks.interleaved import recorded_time
from benchmarks.measure import Measurement
from benchmarks.report import Row
from benchmarks.suite import Suite, replay

SUITE = Suite(cases, COMPETITORS, cpu_rounds=11)


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
    replay(benchmark, case, measurement, direction, competitor_name, rows)
