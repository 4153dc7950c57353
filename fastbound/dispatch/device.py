"""What dispatch knows about a device: architecture, multiprocessors, shared memory per block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fastbound.truth.interpreter import interpreting

# The most bytes of shared memory that one block may request, for GPUs that need not be present; a
# GPU that is present is asked (`Device.shared`).
SHARED_LIMIT: Mapping[str, int] = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "sm_121": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
    "gfx1100": 65_536,
}
_LEAST = {"sm_": 101_376, "gfx": 65_536}  # the least of any other GPU that the kernels run on
_MATRIX_UNITS = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # AMD: MFMA or WMMA


class Device(NamedTuple):
    """A device; ``architecture`` is ``sm_90``, ``gfx942``, ``cpu``, ``interpreter`` or the like.

    ``shared`` is the most bytes of shared memory that one block may request, as the device reports
    it, or 0 if it was not asked.
    """

    architecture: str
    multiprocessors: int = 1
    shared: int = 0

    @property
    def shared_limit(self) -> int:
        """``shared``, or else the architecture's known limit, or else the vendor's lowest."""
        known = SHARED_LIMIT.get(self.architecture) or _LEAST.get(self.architecture[:3], 0)
        return self.shared or known

    @property
    def has_matrix_units(self) -> bool:
        """Whether bf16 products run on tensor cores (sm_80 and newer), MFMA or WMMA (AMD)."""
        if self.architecture.startswith("sm_"):
            return compute_capability(self.architecture) >= 80
        return self.architecture.startswith(_MATRIX_UNITS)

    @property
    def has_descriptors(self) -> bool:
        """Whether it can copy by tensor descriptors (TMA): Hopper and newer."""
        return compute_capability(self.architecture) >= 90

    @property
    def has_asynchronous_products(self) -> bool:
        """Whether tensor cores run asynchronously: Hopper and data-centre Blackwell."""
        return 90 <= compute_capability(self.architecture) < 120


def compute_capability(architecture: str) -> int:
    """90 for ``sm_90``, 120 for ``sm_120``; 0 for anything that is not an NVIDIA architecture."""
    number = architecture.removeprefix("sm_")
    return int(number) if architecture.startswith("sm_") and number.isdigit() else 0


_pretended: ContextVar[Device | None] = ContextVar("fastbound_device", default=None)


@contextmanager
def pretending(device: Device) -> Iterator[None]:
    """Plan calls over meta tensors as if on ``device``, which need not be present."""
    token = _pretended.set(device)
    try:
        yield
    finally:
        _pretended.reset(token)


def describe(device: torch.device) -> Device:
    """The :class:`Device` of a torch device; for meta, that of :func:`pretending`."""
    pretended = _pretended.get() if device.type == "meta" else None
    return _describe(device.type, device.index) if pretended is None else pretended


@lru_cache(maxsize=64)
def _describe(device_type: str, index: int | None) -> Device:
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(index if index is not None else "cuda")
        architecture = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip is not None:
            architecture = properties.gcnArchName.split(":")[0]
        return Device(architecture, properties.multi_processor_count, _shared(properties))
    if device_type == "cpu" and interpreting():
        return Device("interpreter", 4)
    return Device(device_type)


def free_bytes(device: torch.device) -> int:
    """What an allocation could get: the driver's free bytes and those PyTorch keeps unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _shared(properties: Any) -> int:
    """Bytes per block, including what NVIDIA's driver grants beyond 48 KiB on request (opt-in)."""
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    return max(int(getattr(properties, name, 0)) for name in names)
