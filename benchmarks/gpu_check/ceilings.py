"""The device's measured ceilings, with which every other figure is compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.report.facts import readings
from fastbound.dispatch.timing import at_most, interleaved, stopwatch_for

COPY_BYTES = 4 * 2**30  # the size of each of the two buffers
MATMUL_SIZE = 8192
ROUNDS = 20
LOAD_SECONDS = 1.0


@dataclass(frozen=True)
class Measured:
    """Measured ceilings.

    ``bandwidth`` is the bytes read and written per second by a copy, and ``flops`` the operations
    per second of a square matrix product. ``under_load`` has the clocks and other readings of the
    device while it is busy.
    """

    bandwidth: float
    flops: float
    copy_bytes: int
    matmul_size: int
    under_load: dict[str, str]

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least seconds for this much work."""
        return max(flops / self.flops, nbytes / self.bandwidth)


def measure_ceilings(device: torch.device, *, tiny: bool = False) -> Measured:
    """Measure by medians of interleaved rounds, on random bf16 data because zeros run faster."""
    copy_bytes = 2**20 if tiny else at_most(COPY_BYTES, device)
    size = 64 if tiny else MATMUL_SIZE
    source = torch.randn(copy_bytes // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    steps = {
        "copy": lambda turn: target.copy_(source),
        "matmul": lambda turn: torch.mm(a, b, out=c),
    }
    for step in steps.values():
        for turn in range(3):
            step(turn)
    rounds = 3 if tiny else ROUNDS
    samples = interleaved(steps, rounds=rounds, stopwatch=stopwatch_for(device))
    # Keeps the device busy while its clocks are read, by a program that takes a while to start.
    for _ in range(1 if tiny else math.ceil(LOAD_SECONDS / median(samples["matmul"]))):
        torch.mm(a, b, out=c)
    under_load = readings(device)
    return Measured(
        bandwidth=2 * copy_bytes / median(samples["copy"]),
        flops=2 * size**3 / median(samples["matmul"]),
        copy_bytes=copy_bytes,
        matmul_size=size,
        under_load=under_load,
    )
