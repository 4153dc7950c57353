"""The machine and the versions that a run was made with."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from fastbound.version import versions


def environment() -> dict[str, Any]:
    """Versions, cores, threads and GPU behind the figures of a run."""
    cuda = torch.cuda.is_available()
    return {
        **versions("fastbound", "torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
