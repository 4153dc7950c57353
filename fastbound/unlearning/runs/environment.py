"""What a run was made on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from fastbound.version import versions


def environment() -> dict[str, Any]:
    """What the figures were taken on."""
    cuda = torch.cuda.is_available()
    return {
        **versions("fastbound", "torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
