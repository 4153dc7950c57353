"""What identifies this very machine to a measurement: the card, its limits, and the software."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fastbound.dispatch.device import describe
from fastbound.dispatch.tables import software
from fastbound.kernels import tiles


@dataclass(frozen=True)
class Card:
    """A device and what runs on it: a measurement holds where all of it is the same.

    ``name`` holds the power limit too, which decides how fast a card is. On a CPU
    ``multiprocessors`` are PyTorch's threads. ``versions``: torch, triton, the driver, and a digest
    of the kernels' source.
    """

    architecture: str
    name: str
    multiprocessors: int
    versions: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """Short, for a file's name."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


def card_of(device: torch.device) -> Card:
    """The :class:`Card` behind a torch device."""
    described = describe(device)
    versions = {**software(), "kernels": _kernels()}
    name, count = _processor(), torch.get_num_threads()
    if device.type == "cuda":
        read = _limits(device)
        name = torch.cuda.get_device_properties(device).name
        if "power.limit" in read:
            name += f", {read['power.limit']}"
        versions["driver"] = read.get("driver_version", "unknown")
        count = described.multiprocessors
    return Card(described.architecture, name, count, tuple(sorted(versions.items())))


def read_card(device: torch.device, names: tuple[str, ...]) -> dict[str, str]:
    """What nvidia-smi reads of a CUDA device, by its name of each value; empty where it cannot.

    The card is named by its UUID: nvidia-smi counts all cards of the machine, and CUDA those of
    CUDA_VISIBLE_DEVICES.
    """
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None or torch.version.hip is not None:
        return {}
    name = str(uuid) if str(uuid).startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    command = ["nvidia-smi", f"--id={name}", f"--query-gpu={','.join(names)}"]
    try:
        read = subprocess.run(
            [*command, "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError):
        return {}
    return dict(zip(names, (value.strip() for value in read.stdout.split(",")), strict=False))


@lru_cache(maxsize=64)
def _limits(device: torch.device) -> dict[str, str]:
    return read_card(device, ("power.limit", "driver_version"))


@lru_cache(maxsize=1)
def _kernels() -> str:
    """A digest of the source of every kernel: a measurement of other kernels is of no use."""
    found = hashlib.sha256()
    for path in sorted(Path(tiles.__file__).parent.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


@lru_cache(maxsize=1)
def _processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or "a CPU"
