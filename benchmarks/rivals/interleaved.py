"""The recorded durations of an interleaved measurement, handed to pytest-benchmark.

Its loop times one function at a time, so it gets what `performance.timing.interleaved` measured:
`recorded_time` is its timer and `playback` its function, and its statistics, JSON and comparisons
then work on exactly those samples.
"""

from __future__ import annotations

from collections.abc import Callable


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
