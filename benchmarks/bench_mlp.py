"""Time an adapted MLP block, forward and forward+backward, against its floor and its rivals.

pytest benchmarks/ --benchmark-only -k mlp [--smoke] [--tokens 1024,8192]
"""

from __future__ import annotations

from benchmarks.rivals.cases import block_cases
from benchmarks.rivals.competitors import BLOCK_COMPETITORS
from benchmarks.rivals.replay import Suite, replayed

SUITE = Suite(block_cases, BLOCK_COMPETITORS, cpu_rounds=5)
test_mlp = replayed
