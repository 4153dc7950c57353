"""A kernel launch as a value, which can be run, recorded, or compiled for a GPU that is absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

_record: ContextVar[list[Launch] | None] = ContextVar("fastbound_record", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches made in this context, in order, without running them.

    Since nothing runs, the tensors may be on the meta device.
    """
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


class Launch(NamedTuple):
    """A kernel with its grid, its run-time arguments in the kernel's order, and its constants.

    ``warps`` and ``stages`` are compiler options. ``registers`` is the most registers that a thread
    may use on an NVIDIA GPU; without it the compiler may spill a few so that more programs fit.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None

    def run(self) -> None:
        """Launch on the current stream; an empty grid launches nothing.

        Inside :func:`recorded` the launch is appended to the list instead.
        """
        if 0 in self.grid:
            return
        launches = _record.get()
        if launches is not None:
            launches.append(self)
            return
        options = self.options("hip" if torch.version.hip else "cuda")
        self.kernel[self.grid](*self.arguments, **self.constants, **options)

    def options(self, backend: str) -> dict[str, int]:
        """What the compiler of Triton's ``backend`` is given; AMD's has no limit of registers."""
        # Explicit, because the default of floating-point fusion changes between Triton releases.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if self.registers is not None and backend == "cuda":
            options["maxnreg"] = self.registers
        return options


def cdiv(size: int, block: int) -> int:
    """The number of blocks that cover ``size``."""
    return -(-size // block)  # triton.cdiv takes microseconds on the host
