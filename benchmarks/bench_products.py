"""Find the fastest form of each product on this CPU, with warm caches and nothing else running.

pytest benchmarks/bench_products.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.rivals.cases import DTYPES
from benchmarks.rivals.products import PRODUCTS, product_operands
from benchmarks.rivals.replay import play, playback, recorded_time
from fastbound.dispatch.timing import interleaved, stopwatch_for

SIZES = {True: (32, 64, 192, 16), False: (2048, 1024, 4096, 16)}  # by --smoke: M, K, N, R


@cache
def measured(product: str, dtype: str, smoke: bool, rounds: int) -> dict[str, list[float]]:
    """The seconds of every form of a product, interleaved, without two warm-up rounds."""
    operands = product_operands(*SIZES[smoke], DTYPES[dtype])
    steps = {
        name: lambda turn, form=form: form(*operands) for name, form in PRODUCTS[product].items()
    }
    stopwatch = stopwatch_for(torch.device("cpu"))
    samples = interleaved(steps, rounds=rounds + 2, stopwatch=stopwatch)
    return {name: seconds[2:] for name, seconds in samples.items()}


@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("product", "form"), [(product, form) for product, forms in PRODUCTS.items() for form in forms]
)
def test_product(
    benchmark: Any,
    pytestconfig: pytest.Config,
    device: torch.device,
    rounds: Callable[[int], int],
    dtype: str,
    product: str,
    form: str,
) -> None:
    if device.type != "cpu":
        pytest.skip("these forms are for CPUs: on a GPU the kernels take their place")
    samples = measured(product, dtype, pytestconfig.getoption("--smoke"), rounds(11))[form]
    benchmark.group = f"{product} {dtype}"
    benchmark.pedantic(playback, setup=play(samples), rounds=len(samples))
