"""Adapters that are disabled for a while, in the thread or asyncio task that asked for it alone."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_lock = threading.Lock()
_off: ContextVar[frozenset[Any]] = ContextVar("fastbound_disabled", default=frozenset())


@contextmanager
def disabled(layers: Iterable[Any]) -> Iterator[None]:
    """Inside it the layers' adapters do not run; nests."""
    chosen = frozenset(layers)
    token = _off.set(_off.get() | chosen)
    _count(chosen, 1)
    try:
        yield
    finally:
        _count(chosen, -1)
        _off.reset(token)


def disabled_here(layer: Any) -> bool:
    """Whether a layer that someone disabled is disabled for this call.

    Threads that work for another one are counted to it: autograd's, which run the forward of a
    checkpoint again, and those of nn.DataParallel. So is a compiled forward, which cannot ask.
    """
    if torch.compiler.is_compiling() or "_is_replica" in layer.__dict__:
        return True
    # PyTorch's own threads were not started from Python.
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    return foreign or layer in _off.get()


def _count(layers: frozenset[Any], step: int) -> None:
    with _lock:
        for layer in layers:
            layer.disablers += step
