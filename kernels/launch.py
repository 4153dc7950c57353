"""A launch as a value: run here, or compiled for a GPU that is not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its run-time arguments by name, its constants and compile options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Launch on the current stream; nothing to do for an empty grid."""
        if 0 in self.grid:
            return
        # The default of floating-point fusion changes between Triton releases: said explicitly.
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            num_warps=self.warps,
            num_stages=self.stages,
            enable_fp_fusion=True,
        )


def strides(prefix: str, tensor: torch.Tensor, axes: str) -> dict[str, int]:
    """``stride_<prefix><axis>`` for each axis of the tensor, as kernel arguments."""
    return dict(zip(_stride_names(prefix, axes), tensor.stride(), strict=True))


@lru_cache(maxsize=64)
def _stride_names(prefix: str, axes: str) -> tuple[str, ...]:
    return tuple(f"stride_{prefix}{axis}" for axis in axes)


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)  # triton.cdiv takes microseconds on the host
