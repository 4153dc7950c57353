"""The measurement: every competitor once per round, in an order drawn anew each round.

Timing one competitor after another lets clocks, heat and neighbours decide; here whatever drifts
drifts for all. pytest-benchmark's loop times one function at a time, so it is handed the recorded
durations: `recorded_time` is its timer and `playback` its function, and its statistics, JSON and
comparisons then work on exactly the samples taken here.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

Step = Callable[[int], object]
Stopwatch = Callable[[Callable[[], object]], float]


def interleaved(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    stopwatch: Stopwatch,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of each step in each round: every step once per round, shuffled by `seed`.

    A step is called with a number that grows by one from call to call, whoever is called, so that
    steps which rotate their inputs by it never meet the inputs of the call before.
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


def stopwatch_for(device: torch.device) -> Stopwatch:
    """CUDA events on a GPU, else the performance counter; results are freed off the clock."""
    return _gpu_seconds if device.type == "cuda" else _host_seconds


def _host_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = step()
    end = time.perf_counter()
    del kept
    return end - start


def _gpu_seconds(step: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
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
