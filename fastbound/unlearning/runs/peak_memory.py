"""The most memory that a run has held: on the device if it is CUDA, else in the process."""

from __future__ import annotations

import resource
import sys

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start counting again, on CUDA; the peak of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Bytes, and what they measure: "device memory" or "resident set"."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "device memory"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set"
