"""Work done item by item in other processes, which may die, hang or lose their device safely."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

_UP = "up"
_SPAWN = get_context("spawn")  # a forked child cannot use CUDA


@dataclass(frozen=True)
class Broken:
    """An item without a result: an exception, the death of the process, or the time limit."""

    message: str


@dataclass
class _Worker:
    process: Any
    connection: Connection
    index: int = -1
    up: bool = False
    started: float = 0.0  # when the item was started; counts once the process is up


def isolated(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int,
    deadline: float,
    limit: float,
    retire: Callable[[Any], bool] = lambda result: False,
) -> Iterator[tuple[int, Any]]:
    """Yield (index, ``function(item)`` or :class:`Broken`) in the order in which items finish.

    Items not finished by ``deadline`` (on the monotonic clock) are not yielded. Each item may take
    ``limit`` seconds. A worker is replaced if ``retire`` is true of its result. ``function``, items
    and results must be picklable.
    """
    todo = deque(range(len(items)))
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while (todo or busy) and time.monotonic() < deadline:
            while todo and (idle or len(busy) < workers):
                worker = idle.pop() if idle else _start(function)
                worker.index, worker.started = todo.popleft(), time.monotonic()
                busy.append(worker)
                worker.connection.send(items[worker.index])
            ready = wait([worker.connection for worker in busy], timeout=0.5)
            for worker in list(busy):
                if worker.connection in ready:
                    result = _received(worker)
                    if not worker.up and result == _UP:
                        worker.up, worker.started = True, time.monotonic()
                        continue
                    keep = not isinstance(result, Broken) and not retire(result)
                elif worker.up and time.monotonic() - worker.started > limit:
                    result, keep = Broken(f"no result after {limit:.0f} s"), False
                else:
                    continue
                busy.remove(worker)
                if keep:
                    idle.append(worker)
                else:
                    _stop(worker)
                yield worker.index, result
    finally:
        for worker in (*idle, *busy):
            _stop(worker)


def _start(function: Callable[[Any], Any]) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()  # so that our end sees EOF when the process dies
    return _Worker(process, ours)


def stop_group(leader: int) -> None:
    """Kill what is left of the process group of a process that leads one, itself included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    os.setsid()  # its own children go with it, see `_stop`
    connection.send(_UP)  # by now everything is imported: unpickling `function` imported its module
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            result = function(item)
        except Exception as error:
            result = Broken(f"{type(error).__name__}: {error}")
        connection.send(result)


def _received(worker: _Worker) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join(5)
        return Broken(f"the process died with exit code {worker.process.exitcode}")


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.terminate()
    worker.process.join(5)
    if worker.up:
        stop_group(worker.process.pid)
    elif worker.process.is_alive():
        worker.process.kill()
