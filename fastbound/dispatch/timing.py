"""Timing in rounds: every competitor runs once per round, in an order drawn anew for each round.

If one competitor were timed after another, clocks, heat and other processes would decide; here any
drift affects all of them alike.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import quantiles

import torch

from fastbound.dispatch.device import free_bytes

FLUSH_BYTES = 2 * 2**30

Step = Callable[[int], object]
Stopwatch = Callable[[Callable[[], object]], float]


def interleaved(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    stopwatch: Stopwatch,
    seed: int = 0,
) -> dict[str, list[float]]:
    """The seconds of each step in each round: every step once per round, shuffled by `seed`.

    Each call gets a number that grows by one from call to call across all steps, so that steps
    which rotate their inputs by it never get the inputs of the previous call.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(seed).shuffle
    order, turn = list(steps), 0
    with _no_garbage_collection():
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(stopwatch(partial(steps[name], turn)))
                turn += 1
    return samples


def quartiles(seconds: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return quantiles(seconds, n=4, method="inclusive")


def stopwatch_for(device: torch.device) -> Stopwatch:
    """CUDA events on a GPU, else the performance counter; freeing results is not timed."""
    return _gpu_seconds if device.type == "cuda" else host_seconds


def host_seconds(step: Callable[[], object]) -> float:
    """Seconds until the call returns; freeing its result is not timed."""
    start = time.perf_counter()
    kept = step()
    end = time.perf_counter()
    del kept
    return end - start


def _gpu_seconds(step: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before()
    start.record()
    kept = step()
    end.record()
    end.synchronize()
    del kept
    return start.elapsed_time(end) * 1e-3


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def at_most(nbytes: int, device: torch.device) -> int:
    """``nbytes`` or an eighth of the free memory, whichever is less, as a multiple of 64 bytes."""
    free = free_bytes(device) if device.type == "cuda" else 8 * nbytes
    return min(nbytes, free // 8) // 64 * 64


def kernel_stopwatch(device: torch.device, nbytes: int = FLUSH_BYTES, reads: int = 1) -> Stopwatch:
    """A stopwatch for a step's kernels alone, run after reads of a buffer much larger than L2.

    The reads leave the cache cold and clean, and take longer than the step takes to launch. On a
    device without CUDA it is :func:`stopwatch_for`.
    """
    if device.type != "cuda":
        return stopwatch_for(device)
    flush = torch.ones(at_most(nbytes, device) // 4, device=device)

    def before() -> None:
        for _ in range(reads):
            flush.sum()

    return partial(_gpu_seconds, before=before)
