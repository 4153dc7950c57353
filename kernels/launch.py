"""A launch as a value: run here, recorded, or compiled for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

_record: ContextVar[list[Launch] | None] = ContextVar("fastbound_record", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside, in order: collected, not run, so meta tensors will do."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


class Launch(NamedTuple):
    """A kernel with its grid, its run-time arguments in its own order, and its constants by name.

    ``warps`` and ``stages`` say how it is compiled; ``registers``, how many a thread may have on an
    NVIDIA GPU. Without that number the compiler may spill a few so that more programs fit.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None

    def run(self) -> None:
        """Launch on the current stream; nothing to do for an empty grid.

        Inside :func:`recorded` the launch joins the list instead.
        """
        if 0 in self.grid:
            return
        launches = _record.get()
        if launches is not None:
            launches.append(self)
            return
        # The default of floating-point fusion changes between Triton releases: said explicitly.
        self.kernel[self.grid](
            *self.arguments,
            **self.constants,
            num_warps=self.warps,
            num_stages=self.stages,
            enable_fp_fusion=True,
            **self.limits("hip" if torch.version.hip else "cuda"),
        )

    def limits(self, backend: str) -> dict[str, int]:
        """``registers`` as the compiler's option, which AMD's does not know."""
        if self.registers is None or backend != "cuda":
            return {}
        return {"maxnreg": self.registers}


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)  # triton.cdiv takes microseconds on the host
