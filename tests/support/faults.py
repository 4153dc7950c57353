"""A process that ends, or finds the disk full, at a chosen event of the disk below one folder.

Run as a program it takes commands, disturbs each at every one of its events, goes on with
`--resume` and compares what lies on the disk with what an undisturbed run has left.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from fastbound.cli import main
from fastbound.files import replace_files
from fastbound.unlearning import command
from fastbound.unlearning.evaluation import command as evaluation_command
from fastbound.unlearning.evaluation import tofu
from fastbound.unlearning.lab import command as lab_command
from fastbound.unlearning.lab import grid
from fastbound.unlearning.model import load_pretrained
from fastbound.unlearning.runs import report
from fastbound.unlearning.training import loop

KILL, FULL = "kill", "full"


class Faults:
    """Counts events below `folder`; from number `at` on it disturbs them."""

    def __init__(self, folder: Path, at: int | None, kind: str) -> None:
        self.folder, self.at, self.kind = str(folder), at, kind
        self.seen = 0

    def happens(self, path: Any, makes: bool, half: Callable[[], object] = lambda: None) -> None:
        """Before an event; `half` does a part of it, `makes` says that it takes room."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not os.fspath(path).startswith(self.folder):
            return
        self.seen += 1
        if self.at is None or self.seen < self.at:
            return
        if self.kind == KILL:
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        elif makes:
            half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self) -> None:
        """For the rest of this process."""
        honest = {name: getattr(os, name) for name in ("replace", "unlink", "truncate", "mkdir")}
        fsync, opened = os.fsync, io.open

        def before(name: str, makes: bool) -> Callable[..., Any]:
            def call(path: Any, *rest: Any, **named: Any) -> Any:
                self.happens(path, makes)
                return honest[name](path, *rest, **named)

            return call

        def synced(handle: int) -> None:
            self.happens(handle, True)
            fsync(handle)

        def opening(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return opened(path, mode, *rest, **named)
            self.happens(path, True)
            file = opened(path, mode, *rest, **named)
            if "b" in mode and "+" not in mode:
                return _Written(file, path, self)
            return file

        os.replace, os.unlink = before("replace", False), before("unlink", False)
        os.truncate, os.mkdir = before("truncate", False), before("mkdir", True)
        os.fsync, io.open = synced, opening  # type: ignore[assignment]


class _Written:
    """A file whose flush is an event: half of what was written is on the disk as it happens."""

    def __init__(self, file: Any, path: Any, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults
        self._waiting = b""

    def write(self, data: Any) -> int:
        self._waiting += bytes(data)
        return len(data)

    def flush(self) -> None:
        data, self._waiting = self._waiting, b""

        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        if data:
            self._faults.happens(self._path, True, half)
        self._file.write(data)
        self._file.flush()

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def steady() -> None:
    """Clocks stand and pictures are small: two runs leave the same bytes, quickly."""

    def draw(path: Path, *data: Any, **how: Any) -> None:
        replace_files({path: b"a picture"})

    time.perf_counter = lambda: 0.0
    loop.peak_memory = lambda device: (0, "resident set")  # type: ignore[attr-defined]
    report.draw = draw
    tofu.draw = draw
    lab_command.draw = lambda cells, output, *how: draw(output / "utility.png")
    grid._workers = _in_this_process  # type: ignore[assignment]
    torch.set_num_threads(1)


@contextmanager
def _in_this_process(count: int) -> Iterator[Any]:
    from concurrent.futures import Future

    class Pool:
        def submit(self, call: Any, *arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(call(*arguments))
            return future

    yield Pool()


def forked(arguments: list[str], faults: Faults, said: Path) -> tuple[int, int]:
    """Status of the command in a process of its own (-9: killed), and the events it had."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        random.seed(0)  # Python seeds it anew in each fork, and checkpoints hold its state
        try:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            faults.install()
            status = main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os.write(writing, str(faults.seen).encode())
            os._exit(status)
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(reading) as pipe:
        return status, int(pipe.read() or 0)


def files(folder: Path) -> dict[str, Any]:
    """Every file by its name below `folder`; cells come in any order."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            name = str(path.relative_to(folder))
            found[name] = sorted(data.splitlines()) if path.name == "cells.jsonl" else data
    return found


def disturb(arguments: list[str], folder: Path, kinds: list[str], every: int) -> dict[str, Any]:
    """The events of a command, and for each kind of fault what went wrong: nothing at best."""
    output, said = folder / "run", folder / "said"
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        # What this process has imported and loaded, each fork has as it was.
        main([*arguments, "--output", str(folder / "warm")])
        if "--model" in arguments:
            loaded = load_pretrained(arguments[arguments.index("--model") + 1])
            for module in (command, evaluation_command):
                module.load_pretrained = lambda *name, **settings: loaded
    told = [*arguments, "--output", str(output)]
    status, events = forked(told, Faults(output, None, KILL), said)
    if status != 0:
        return {"events": events, "wrong": [f"undisturbed: {status}: {said.read_text()}"]}
    whole = files(output)
    wrong: list[str] = []
    for kind in kinds:
        for at in range(1, events + 1, every):
            shutil.rmtree(output, ignore_errors=True)
            status, _ = forked(told, Faults(output, at, kind), said)
            text = said.read_text()
            if kind == FULL and (status not in (0, 1) or "Traceback" in text):
                wrong.append(f"{kind} at {at}: {status}: {text[-2000:]}")
            if kind == FULL and status == 1 and text.count("error:") != 1:
                wrong.append(f"{kind} at {at} says {text}")
            if kind == KILL and status != -signal.SIGKILL:
                wrong.append(f"{kind} at {at}: {status}: {text[-2000:]}")
            status, _ = forked([*told, "--resume"], Faults(output, None, kind), said)
            if status != 0:
                wrong.append(f"resumed after {kind} at {at}: {status}: {said.read_text()[-2000:]}")
                continue
            left = files(output)
            other = sorted(n for n in whole.keys() | left if whole.get(n) != left.get(n))
            if other:
                wrong.append(f"resumed after {kind} at {at}: other {', '.join(other)}")
    return {"events": events, "wrong": wrong}


if __name__ == "__main__":
    steady()
    commands = json.loads(sys.argv[1])
    kinds, every = sys.argv[3].split(","), int(sys.argv[4])
    print(json.dumps({n: disturb(c, Path(sys.argv[2]), kinds, every) for n, c in commands.items()}))
