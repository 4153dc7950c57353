"""Time a layer whose adapter has the form "product" against its floor, the plain formula and PEFT.

pytest benchmarks/bench_product_form.py --benchmark-only

Its gradient needs dyᵀ x, so its floor is `trained`: the same layer with its whole weight trained.
"""

from __future__ import annotations

from benchmarks.rivals.cases import product_cases
from benchmarks.rivals.competitors import PRODUCT_COMPETITORS
from benchmarks.rivals.replay import Suite, replayed

SUITE = Suite(product_cases, PRODUCT_COMPETITORS, cpu_rounds=5)
test_product_form = replayed
