"""One adapted linear layer, forward and forward+backward, against its floor and its rivals.

pytest benchmarks/ --benchmark-only [--smoke] [--tokens 1024,8192] [--benchmark-json out.json]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.report.rows import Row
from benchmarks.rivals.cases import Case, cases
from benchmarks.rivals.interleaved import recorded_time
from benchmarks.rivals.layer import COMPETITORS
from benchmarks.rivals.measuring import Measurement
from benchmarks.rivals.suite import Suite, replay

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
