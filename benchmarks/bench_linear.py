"""Time an adapted linear layer, forward and forward+backward, against its floor and its rivals.

pytest benchmarks/ --benchmark-only [--smoke] [--tokens 1024,8192] [--benchmark-json out.json]
"""

from __future__ import annotations

from benchmarks.rivals.cases import layer_cases
from benchmarks.rivals.competitors import LAYER_COMPETITORS
from benchmarks.rivals.replay import Suite, replayed

SUITE = Suite(layer_cases, LAYER_COMPETITORS, cpu_rounds=11)
test_linear = replayed
