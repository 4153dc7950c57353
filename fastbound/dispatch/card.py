"""What a measurement depends on: this machine's card, its power limit, and the software."""

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
    """A device and its software; a measurement is valid only if all of them are the same.

    ``name`` includes the power limit, which affects the speed of a card. On a CPU,
    ``multiprocessors`` is the number of PyTorch's threads. ``versions`` has those of torch, triton
    and the driver, and a digest of the kernels' source.
    """

    architecture: str
    name: str
    multiprocessors: int
    versions: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """A short digest for the name of a file."""
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
    """The values that nvidia-smi reports for a CUDA device, by name; empty if it cannot be asked.

    ``names`` are nvidia-smi's own. The card is identified by its UUID, because nvidia-smi numbers
    all cards of the machine and CUDA only those in CUDA_VISIBLE_DEVICES.
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
    """A digest of every kernel's source, since a measurement of other kernels is useless."""
    found = hashlib.sha256()
    for path in sorted(Path(tiles.__file__).parent.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


@lru_cache(maxsize=1)
def _processor() -> str:
    """The CPU's name, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or "a CPU"
