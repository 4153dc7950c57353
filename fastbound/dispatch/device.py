"""What is known of a device: its architecture, its size, and what one block may keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

import torch

from fastbound.truth.interpreter import interpreting

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes for one block


class Device(NamedTuple):
    """``architecture`` is ``sm_90``, ``gfx942``, ``cpu``, ``interpreter`` and the like."""

    architecture: str
    multiprocessors: int = 1


_pretended: ContextVar[Device | None] = ContextVar("fastbound_device", default=None)


@contextmanager
def pretending(device: Device) -> Iterator[None]:
    """Calls over meta tensors plan as on ``device``, which need not be there."""
    token = _pretended.set(device)
    try:
        yield
    finally:
        _pretended.reset(token)


def describe(device: torch.device) -> Device:
    """The :class:`Device` behind a torch device; that of :func:`pretending` behind meta."""
    pretended = _pretended.get() if device.type == "meta" else None
    return _describe(device.type, device.index) if pretended is None else pretended


@lru_cache(maxsize=64)
def _describe(device_type: str, index: int | None) -> Device:
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(index if index is not None else "cuda")
        architecture = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip is not None:
            architecture = properties.gcnArchName.split(":")[0]
        return Device(architecture, properties.multi_processor_count)
    if device_type == "cpu" and interpreting():
        return Device("interpreter", 4)
    return Device(device_type)
