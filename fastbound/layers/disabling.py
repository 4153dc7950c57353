"""Disabling adapters temporarily, only in the thread or asyncio task that asks for it."""

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
    """Within this context the layers' adapters do not run. Contexts can be nested."""
    chosen = frozenset(layers)
    token = _off.set(_off.get() | chosen)
    _count(chosen, 1)
    try:
        yield
    finally:
        _count(chosen, -1)
        _off.reset(token)


def disabled_here(layer: Any) -> bool:
    """Whether the adapter of a layer that some thread disabled is disabled in this call, too.

    It is so in threads that work on behalf of another one: autograd's, which rerun the forward of a
    checkpoint, and those of nn.DataParallel. It is also so in a compiled forward, which cannot tell
    which thread it runs in.
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
