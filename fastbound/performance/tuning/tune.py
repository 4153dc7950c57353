"""Plans measured on a GPU, one shape after the other, into a table that dispatch reads.

For each layer or block: candidates of a pass in the order of the time model, those that the
compiler's report speaks against dropped, the rest timed against one another with a cold cache; then
whole layers with the best tiles, fused against split against PyTorch. What is not faster by more
than :data:`MARGIN` changes nothing: the default tile stays, and split stays before fused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from fastbound.dispatch.defaults import Tiles, padded_rank
from fastbound.dispatch.entries import BlockEntry, Entry
from fastbound.dispatch.tables import PlanTable, read_table, require_same_gpu, write_table
from fastbound.performance.passes import Candidate
from fastbound.performance.shapes import Block
from fastbound.performance.tuning.candidates import Machine, Point, shortlist

MARGIN = 0.01
TIMED = 10  # candidates of a kind, the default among them


@dataclass(frozen=True)
class Timings:
    """Seconds of every round by strategy, and what was wrong with the ones left out."""

    samples: Mapping[str, Sequence[float]]
    faults: Mapping[str, str] = field(default_factory=dict)


class Bench(Protocol):
    """What the tuner asks of a device; tests bring their own."""

    def faults(
        self, names: Sequence[str], point: Point, chosen: Sequence[Candidate], deadline: float
    ) -> list[str | None]:
        """What the compiler has against each candidate, in any of these passes; None: nothing."""
        ...

    def sweep(
        self, name: str, point: Point, chosen: Sequence[Candidate]
    ) -> Mapping[Candidate, float]:
        """Median seconds of a pass, for each candidate whose results are right."""
        ...

    def strategies(self, point: Point, tiles: Tiles) -> Timings:
        """Forward and backward of a whole layer, checked against fp64, by strategy."""
        ...


@dataclass(frozen=True)
class Tuned:
    """The table, what the budget did not reach, and what failed and why."""

    table: PlanTable
    not_reached: tuple[Point, ...]
    failures: tuple[str, ...]


def start_table(path: Path, machine: Machine, *, resume: bool) -> PlanTable:
    """An empty table, or with ``resume`` the one that lies at ``path``.

    Raises ValueError where a file is there that was not asked for, is damaged, or was measured on
    another GPU or with other versions.
    """
    if not path.exists():
        device = machine.device
        return PlanTable(
            device.architecture,
            machine.name,
            device.multiprocessors,
            path=path,
            versions=machine.versions,
        )
    if not resume:
        raise ValueError(f"{path} exists: --resume goes on with it, --output names another file")
    table = read_table(path)
    require_same_gpu(table, machine.device.architecture, machine.device.multiprocessors)
    if table.versions != machine.versions:
        raise ValueError(
            f"{path} was measured with {_listed(table.versions)}, and here are "
            f"{_listed(machine.versions)}: remove it and tune anew"
        )
    return table


def tune(
    todo: Sequence[Point],
    bench: Bench,
    machine: Machine,
    table: PlanTable,
    path: Path,
    *,
    minutes: float,
    dtype: torch.dtype = torch.bfloat16,
    step: Callable[[str], object] = lambda doing: None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Measure ``todo`` until the budget ends; the file is written after every shape.

    Points that the table holds already are passed over. ``step`` is called :attr:`Point.steps`
    times for each, with what is done next. Out of memory leaves a shape out and goes on.
    """
    deadline = clock() + 60 * minutes
    failures: list[str] = []
    late: list[Point] = []
    for point in todo:
        if _holds(table, point, dtype):
            for _ in range(point.steps):
                step(f"{point}: in the table already")
            continue
        if late or clock() >= deadline:
            late.append(point)
            continue
        try:
            entry = _tune_point(point, bench, machine, dtype, deadline, failures, step, clock)
        except torch.OutOfMemoryError:
            failures.append(f"{point}: out of memory, left out")
            continue
        if entry is None:
            late.append(point)
            continue
        if isinstance(entry, BlockEntry):
            table = replace(table, blocks=(*table.blocks, entry))
        else:
            table = replace(table, entries=(*table.entries, entry))
        write_table(path, table)
    return Tuned(table, tuple(late), tuple(failures))


def _tune_point(
    point: Point,
    bench: Bench,
    machine: Machine,
    dtype: torch.dtype,
    deadline: float,
    failures: list[str],
    step: Callable[[str], object],
    clock: Callable[[], float],
) -> Entry | BlockEntry | None:
    """None where the budget ended on the way."""
    tiles = point.default_tiles(machine.device, dtype)
    for kind, names in point.kinds.items():
        step(f"{point}: {kind}")
        chosen = shortlist(names, tiles, point, machine)
        found = bench.faults(names, point, chosen, deadline)
        kept = [c for c, fault in zip(chosen, found, strict=True) if not fault][:TIMED]
        if not kept:
            if clock() >= deadline:
                return None
            failures.append(f"{point}: {kind}: no tile compiles cleanly, {chosen[0]}: {found[0]}")
        sums = dict.fromkeys(kept, 0.0)
        for name in names if kept else ():
            timed = bench.sweep(name, point, kept)
            sums = {c: total + timed[c] for c, total in sums.items() if c in timed}
        tiles = replace(tiles, **{kind: _best(chosen[0], sums).tile})
        if clock() >= deadline:
            return None
    place = _place(point, dtype)
    origin = f"measured {datetime.now(timezone.utc):%Y-%m-%d} on {machine.name}"
    if isinstance(point.shape, Block):
        return BlockEntry(**place, activate=tiles.activate, gated=tiles.gated, origin=origin)
    step(f"{point}: strategies")
    timings = bench.strategies(point, tiles)
    failures += [f"{point}: {strategy}: {why}" for strategy, why in timings.faults.items()]
    if not timings.samples:
        return None
    return Entry(
        **place,
        strategy=best_strategy(timings.samples),
        gemm=tiles.gemm,
        gemm_t=tiles.gemm_t,
        thin=tiles.thin,
        reduce=tiles.reduce,
        origin=origin,
    )


def _place(point: Point, dtype: torch.dtype) -> dict[str, Any]:
    """What an entry is found by."""
    shape = point.shape
    own = {"form": shape.form} if isinstance(shape, Block) else {"K": shape.K}
    R, name = padded_rank(point.rank), str(dtype).removeprefix("torch.")
    return {"N": shape.N, "M": point.M, "R": R, "dtype": name, **own}


def _holds(table: PlanTable, point: Point, dtype: torch.dtype) -> bool:
    entries = table.blocks if isinstance(point.shape, Block) else table.entries
    return any(_place(point, dtype).items() <= vars(entry).items() for entry in entries)


def best_strategy(samples: Mapping[str, Sequence[float]]) -> str:
    """split, unless another is faster by more than the margin.

    Of two that are as fast split is the safer: it leaves the GEMM to cuBLAS, which chooses anew for
    the shapes beside the measured one. Compared round by round, as what disturbs a round disturbs
    both.
    """
    order = [name for name in ("split", "fused", "torch") if name in samples]
    best = order[0]
    for rival in order[1:]:
        ratios = [a / b for a, b in zip(samples[rival], samples[best], strict=True)]
        if median(ratios) < 1 - MARGIN:
            best = rival
    return best


def _best(default: Candidate, sums: Mapping[Candidate, float]) -> Candidate:
    fastest = min(sums, key=lambda candidate: sums[candidate], default=default)
    if default in sums and sums[fastest] >= (1 - MARGIN) * sums[default]:
        return default
    return fastest


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
