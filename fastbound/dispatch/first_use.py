"""The first call of a key measures its candidates, and the choice is kept on disk.

Every candidate runs on the real operands, its results are checked and thrown away, and it is timed
against the others round by round. A choice is valid only for this card and this software
(``card``). It is stored beside the tables in a file of its own, in their format.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastbound.dispatch import tables
from fastbound.dispatch.card import Card, card_of
from fastbound.dispatch.choices import CPU_MARGIN, MARGIN, Choice, Place, pick
from fastbound.dispatch.device import free_bytes
from fastbound.dispatch.tables import PlanTable, read_table, require_same_gpu, write_table
from fastbound.dispatch.timing import host_seconds, interleaved, kernel_stopwatch, quartiles
from fastbound.errors import InputError
from fastbound.files import writing

LEAST_ROWS = 512  # below, a call is too short for a choice to pay
WARM, TIMED = 2, 7
# On a CPU, where trials take the user's own time: the seconds after which no further round begins,
# and the fewest rounds.
CPU_SECONDS, CPU_ROUNDS = 1.0, 3
FLUSH_READS = 8
LOCK_SECONDS = 5.0
# Relative errors above which a result is wrong; the one for fp32 allows for TF32.
CORRECT = {
    torch.bfloat16: 2**-5,
    torch.float16: 2**-8,
    torch.float32: 2**-9,
    torch.float64: 2**-20,  # the sines of fp32 factors are fp32
}

Outputs = Sequence["Tensor | None"]


class Unmeasurable(Exception):
    """Why a key cannot be measured now, in the words that `explain` will use."""


@dataclass(frozen=True)
class Trial:
    """A call to try.

    ``run`` computes its results by a strategy. ``truth`` gives, by index, the fp64 values of
    ``rows`` for those results that have one row per row of x. The other results, sums over all
    rows, are compared with those of the strategy ``yardstick``. One run allocates ``nbytes``.
    """

    run: Callable[[str], Outputs]
    truth: Callable[[], Mapping[int, Tensor]]
    rows: Tensor
    yardstick: str
    device: torch.device
    dtype: torch.dtype
    nbytes: int


class Bench(Protocol):
    """What a measurement needs from a device; tests supply their own."""

    def obstacle(self, device: torch.device, nbytes: int) -> str | None:
        """Why nothing can be measured now, or None if nothing stands in the way."""
        ...

    def seconds(
        self, steps: Mapping[str, Callable[[int], object]], device: torch.device
    ) -> Mapping[str, Sequence[float]]:
        """The seconds of each step in each round."""
        ...


class DeviceBench:
    """The clock of the device itself."""

    def obstacle(self, device: torch.device, nbytes: int) -> str | None:
        if device.type != "cuda":
            return None
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph was being captured"
        needed = nbytes + self._flush(device)
        free = free_bytes(device)
        if free < needed:
            return f"{needed / 2**20:.0f} MiB were needed and {free / 2**20:.0f} MiB were free"
        return None

    def seconds(
        self, steps: Mapping[str, Callable[[int], object]], device: torch.device
    ) -> Mapping[str, Sequence[float]]:
        if device.type == "cpu":
            return self._cpu_seconds(steps)
        stopwatch = kernel_stopwatch(device, self._flush(device), FLUSH_READS)
        taken = interleaved(steps, rounds=WARM + TIMED, stopwatch=stopwatch)
        return {name: seconds[WARM:] for name, seconds in taken.items()}

    @staticmethod
    def _cpu_seconds(steps: Mapping[str, Callable[[int], object]]) -> Mapping[str, Sequence[float]]:
        """Without warm-up rounds: the check has warmed the steps up, and nothing runs ahead."""
        taken: dict[str, list[float]] = {name: [] for name in steps}
        start = time.monotonic()
        for turn in range(TIMED):
            if turn >= CPU_ROUNDS and time.monotonic() - start > CPU_SECONDS:
                break
            for name, seconds in interleaved(
                steps, rounds=1, stopwatch=host_seconds, seed=turn
            ).items():
                taken[name] += seconds
        return taken

    @staticmethod
    def _flush(device: torch.device) -> int:
        if device.type != "cuda":
            return 0
        return max(64 * 2**20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)


bench: Bench = DeviceBench()


def require_measurable(device: torch.device, nbytes: int = 0) -> None:
    """Raise Unmeasurable if something stands in the way of trials that allocate ``nbytes``."""
    obstacle = bench.obstacle(device, nbytes)
    if obstacle is not None:
        raise Unmeasurable(obstacle)


def measured(place: Place, trial: Trial, order: Sequence[str], on: str) -> Choice:
    """Measure the strategies of ``order``, the default first, at a place; ``on`` names the card.

    Raises Unmeasurable if no candidate can be compared with the truth, or if something stands in
    the way of measuring.
    """
    require_measurable(trial.device, 2 * trial.nbytes)
    try:
        errors, faults = _checked(trial, order)
        faults |= _disagreeing(errors, trial.dtype)
        kept = [name for name in order if name not in faults]
        if not kept:
            raise Unmeasurable("no candidate gave a correct result: " + _listed(faults))
        steps = {name: _step(trial, name) for name in kept}
        samples = bench.seconds(steps, trial.device)
    except torch.OutOfMemoryError:
        raise Unmeasurable("memory ran out") from None
    margin = CPU_MARGIN if trial.device.type == "cpu" else MARGIN
    seconds = {name: _three(taken) for name, taken in samples.items()}
    origin = f"measured {datetime.now(timezone.utc):%Y-%m-%d} on {on}"
    return Choice(place, pick(samples, order, margin), seconds, faults, origin)


def _checked(
    trial: Trial, order: Sequence[str]
) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """The error of every result of each candidate that ran, and the faults of the others."""
    expected = dict(trial.truth())
    if not all(bool(t.isfinite().all()) and bool(t.any()) for t in expected.values()):
        raise Unmeasurable("the operands were zero or not finite")
    by_rows = set(expected)
    errors: dict[str, dict[int, float]] = {}
    faults: dict[str, str] = {}
    for name in sorted(order, key=lambda name: name != trial.yardstick):  # the yardstick first
        try:
            results = dict(enumerate(trial.run(name)))
            made = {i: t for i, t in results.items() if t is not None and t.numel()}
            if name == trial.yardstick:
                sums = {i: t for i, t in made.items() if i not in by_rows}
                expected |= {i: t.to(torch.float64, copy=True) for i, t in sums.items()}
            errors[name] = {
                i: _error(t[trial.rows] if i in by_rows else t, expected[i])
                for i, t in made.items()
                if i in expected
            }
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            faults[name] = f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
            continue
        for result in made.values():  # the next candidate may be given this memory
            result.detach().fill_(float("nan"))
        del results, made
    return errors, faults


def _error(got: Tensor, expected: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    norm = float(expected.norm())
    return float((got.detach().double() - expected).norm()) / (norm or 1.0)


def _disagreeing(errors: Mapping[str, Mapping[int, float]], dtype: torch.dtype) -> dict[str, str]:
    """The candidates whose error is too large, with the reason.

    The limit is twice the least error of all, plus a rounding, and at most ``CORRECT``. Twice,
    because one candidate may round once where another rounds two times.
    """
    found: dict[str, str] = {}
    for i in sorted({i for own in errors.values() for i in own}):
        least = min((own[i] for own in errors.values() if own[i] == own[i]), default=0.0)
        most = CORRECT[dtype]
        rounding = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 16)
        allowed = min(2 * least + rounding, most) if least else most
        for name, own in errors.items():
            if not math.isfinite(own[i]):
                found.setdefault(name, f"result {i} is not finite")
            elif own[i] > allowed:
                found.setdefault(
                    name, f"result {i} is off by {own[i]:.2e}, more than {allowed:.2e}"
                )
    return found


def _step(trial: Trial, name: str) -> Callable[[int], object]:
    return lambda turn: trial.run(name)


def _three(seconds: Sequence[float]) -> tuple[float, float, float]:
    lower, middle, upper = quartiles(seconds)
    return lower, middle, upper


def _listed(faults: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in faults.items())


class Store:
    """The choices of one card in their file, which is read when it changes and written with a lock.

    If the file is damaged or belongs to another card, or the folder cannot be written to, one
    warning says so and the file is left alone: choices then last only as long as the process.
    """

    def __init__(self, path: Path | None, card: Card) -> None:
        self.path, self.card = path, card
        self._choices: dict[Place, Choice] = {}
        self._stamp: tuple[int, int] | None = None
        self._usable = path is not None

    def find(self, place: Place) -> Choice | None:
        """The choice of this process, or of the file, to which other processes write too."""
        if place not in self._choices:
            self._read()
        return self._choices.get(place)

    def keep(self, choice: Choice) -> None:
        """Add the choice to the file, beside those of other processes; for its place it wins."""
        self._choices[choice.place] = choice
        if not self._usable or self.path is None:
            return
        try:
            with _waiting(self.path.parent):
                self._read()
                if self._usable:
                    write_table(self.path, self._table())
                    self._stamp = _stamp(self.path)
        except InputError:
            if self.path.parent.exists() and not self.path.parent.is_dir():
                self._leave(f"measured choices are not saved: {self.path.parent} is a file")
            # Otherwise another process is still writing: the next choice will write this one too.
        except OSError as error:
            self._leave(f"measured choices are not saved: {error}")

    def _read(self) -> None:
        if not self._usable or self.path is None:
            return
        stamp = _stamp(self.path)
        if stamp is None or stamp == self._stamp:
            return
        try:
            table = read_table(self.path)
            require_same_gpu(table, self.card.architecture, self.card.multiprocessors)
            if (table.device, dict(table.versions)) != (self.card.name, dict(self.card.versions)):
                raise ValueError(f"{self.path} was measured on {table.device} with other software")
        except (OSError, ValueError) as error:
            self._leave(f"measured choices are neither read nor saved: {error}; remove that file")
            return
        self._stamp = stamp
        for choice in table.choices:
            self._choices.setdefault(choice.place, choice)

    def _table(self) -> PlanTable:
        card = self.card
        return PlanTable(
            card.architecture,
            card.name,
            card.multiprocessors,
            versions=dict(card.versions),
            choices=tuple(self._choices.values()),
        )

    def _leave(self, said: str) -> None:
        self._usable = False
        warnings.warn(said, stacklevel=2)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _waiting(folder: Path) -> Iterator[None]:
    """:func:`fastbound.files.writing`, after waiting for any other process that writes there."""
    deadline = time.monotonic() + LOCK_SECONDS
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(writing(folder))
                break
            except InputError:
                if not folder.is_dir() or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield


_stores: dict[Card, Store] = {}


def store_for(device: torch.device) -> Store:
    """The store of a device's choices; there is one per card and process."""
    card = card_of(device)
    if card not in _stores:
        folder = tables.user_folder()
        name = f"{card.architecture}-{card.digest}.json"
        _stores[card] = Store(None if folder is None else folder / "measured" / name, card)
    return _stores[card]


def forget() -> None:
    """Forget what this process has read and measured; files are kept."""
    _stores.clear()
    _warned.clear()


def let_go(device: object, place: Place, failed: str, why: str) -> None:
    """Warn once that a chosen strategy failed later, and correct the choice if it was measured."""
    _warn(f'"{failed}" is no longer used here: {why}', place)
    if not isinstance(device, torch.device):
        return
    store = store_for(device)
    choice = store.find(place)
    if choice is not None and "torch" in choice.seconds:
        seconds = {name: times for name, times in choice.seconds.items() if name != failed}
        faults = {**choice.faults, failed: why}
        store.keep(replace(choice, strategy="torch", seconds=seconds, faults=faults))


def warn_of(choice: Choice) -> None:
    """Warn of each candidate that does not run or gives wrong results."""
    for name, why in choice.faults.items():
        _warn(f'"{name}" is not used here: {why}', choice.place)


_warned: set[str] = set()


def _warn(said: str, place: Place) -> None:
    """Warn once per failure, whatever the place."""
    if said not in _warned:
        _warned.add(said)
        warnings.warn(f"{said} (first at {place})", stacklevel=3)
