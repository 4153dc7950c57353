"""What a result was measured on and with: read, never changed."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastbound.dispatch.card import read_card
from fastbound.dispatch.device import describe
from fastbound.version import __version__, versions

ROOT = Path(__file__).resolve().parent.parent.parent
_QUERIED = (
    "driver_version",
    "compute_mode",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
_PACKAGES = ("torch", "triton", "numpy", "peft", "transformers")


@dataclass(frozen=True)
class Facts:
    """``memory`` and ``l2`` in bytes; ``readings`` of nvidia-smi as it gave them, at the start."""

    device: str
    architecture: str
    multiprocessors: int
    memory: int | None
    l2: int | None
    cuda: str | None
    python: str
    versions: dict[str, str]
    fastbound: str
    commit: str
    date: str  # UTC
    readings: dict[str, str]


def facts(device: torch.device) -> Facts:
    """Of the current process and ``device``."""
    described = describe(device)
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return Facts(
        device=properties.name if properties else platform.processor() or platform.machine(),
        architecture=described.architecture,
        multiprocessors=described.multiprocessors,
        memory=properties.total_memory if properties else None,
        l2=properties.L2_cache_size if properties else None,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        versions=versions(*_PACKAGES),
        fastbound=__version__,
        commit=commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        readings=readings(device),
    )


def readings(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi reads them now; empty without it."""
    return read_card(device, _QUERIED) if device.type == "cuda" else {}


def commit(root: Path = ROOT) -> str:
    """FASTBOUND_COMMIT, else git's short hash (``-dirty`` with changes), else the file COMMIT.

    A copy of the tree without git's folder has only the first and the last; "unknown" has none.
    """
    named = os.environ.get("FASTBOUND_COMMIT")
    if named:
        return named
    try:
        found = [
            subprocess.run(
                ["git", *command], cwd=root, capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for command in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        ]
    except (subprocess.SubprocessError, OSError):
        found = []
    if found and Path(found[0]).resolve() == root:
        return found[1] + ("-dirty" if found[2] else "")
    file = root / "COMMIT"
    return file.read_text().strip() if file.is_file() else "unknown"
