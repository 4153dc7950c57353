"""A GPU that is not there, and a clock that says what a test wants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch

import fastbound
from fastbound.dispatch import first_use
from fastbound.dispatch.device import Device

# One block of 128 x 256 fills it, and interpreting takes no time; there few rows are few indeed.
SMALL_GPU = Device("sm_80", 1)
FEW_ROWS = 128


class Clock:
    """A bench on which each strategy takes as many ``times`` as is said here, within a thousandth.

    ``asked`` are the candidates of each measurement, those that were let go left out; ``hindrance``
    is what stands in the way of one.
    """

    def __init__(self, **times: float) -> None:
        self.times = times
        self.hindrance: str | None = None
        self.asked: list[tuple[str, ...]] = []

    def obstacle(self, device: torch.device, nbytes: int) -> str | None:
        return self.hindrance

    def seconds(
        self, steps: Mapping[str, object], device: torch.device
    ) -> Mapping[str, Sequence[float]]:
        self.asked.append(tuple(steps))
        return {n: [self.times.get(n, 1.0) * (1 + i / 7000) for i in range(7)] for n in steps}


@contextmanager
def measuring(folder: Path, clock: Clock, device: Device | None = None) -> Iterator[Clock]:
    """First calls measure on ``clock``, plan as on ``device``, and keep their choices there."""
    with ExitStack() as held:
        held.enter_context(mock.patch.object(first_use, "bench", clock))
        held.enter_context(mock.patch("fastbound.dispatch.tables.user_folder", lambda: folder))
        if device is not None:
            held.enter_context(mock.patch("fastbound.dispatch.plan.describe", lambda *_: device))
            for module in ("dispatch.plan", "operator.block_function"):
                held.enter_context(mock.patch(f"fastbound.{module}.LEAST_ROWS", FEW_ROWS))
        fastbound.set_planning("measured")
        try:
            yield clock
        finally:
            fastbound.set_planning("fixed")
