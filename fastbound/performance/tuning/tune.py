"""Measure plans on a GPU, shape by shape, and write them to a table that dispatch reads.

For each layer or block, the time model ranks the candidates of a pass, those with faults in their
binaries are dropped, and the rest are timed against one another with a cold cache. Then whole
layers are timed with the best tiles: fused against split against PyTorch. Only a gain of more than
:data:`MARGIN` changes a default: otherwise the default tile stays, and split is preferred to fused.
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
TIMED = 10  # candidates per kind that are timed, including the default


@dataclass(frozen=True)
class Timings:
    """The seconds of every round by strategy, and the faults of those that were left out."""

    samples: Mapping[str, Sequence[float]]
    faults: Mapping[str, str] = field(default_factory=dict)


class Bench(Protocol):
    """What the tuner needs from a device; tests supply their own."""

    def faults(
        self, names: Sequence[str], point: Point, chosen: Sequence[Candidate], deadline: float
    ) -> list[str | None]:
        """Each candidate's fault in any of these passes, found by compiling, or None."""
        ...

    def sweep(
        self, name: str, point: Point, chosen: Sequence[Candidate]
    ) -> Mapping[Candidate, float]:
        """The median seconds of a pass, for each candidate whose results are correct."""
        ...

    def strategies(self, point: Point, tiles: Tiles) -> Timings:
        """The times of a whole layer's forward and backward, checked against fp64, by strategy."""
        ...


@dataclass(frozen=True)
class Tuned:
    """The table, the points that the budget did not reach, and the failures with their reasons."""

    table: PlanTable
    not_reached: tuple[Point, ...]
    failures: tuple[str, ...]


def start_table(path: Path, machine: Machine, *, resume: bool) -> PlanTable:
    """An empty table or, with ``resume``, the existing one at ``path``.

    Raises ValueError if the file exists without ``resume``, is damaged, or was measured on another
    GPU or with other software versions.
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
        raise ValueError(
            f"{path} already exists: continue it with --resume, or name another file with --output"
        )
    table = read_table(path)
    require_same_gpu(table, machine.device.architecture, machine.device.multiprocessors)
    if table.versions != machine.versions:
        raise ValueError(
            f"{path} was measured with {_listed(table.versions)}, but installed are "
            f"{_listed(machine.versions)}: remove it and tune again"
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
    """Measure the points ``todo`` for at most ``minutes``, and write the file after each of them.

    Points that are already in the table are skipped. ``step`` is called :attr:`Point.steps` times
    per point, with what is done next. A point that runs out of memory is left out.
    """
    deadline = clock() + 60 * minutes
    failures: list[str] = []
    late: list[Point] = []
    for point in todo:
        if _holds(table, point, dtype):
            for _ in range(point.steps):
                step(f"{point}: already in the table")
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
    """The entry of a point; None if the budget ended before it was complete or no strategy ran."""
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
    """The fields by which an entry is found."""
    shape = point.shape
    own = {"form": shape.form} if isinstance(shape, Block) else {"K": shape.K}
    R, name = padded_rank(point.rank), str(dtype).removeprefix("torch.")
    return {"N": shape.N, "M": point.M, "R": R, "dtype": name, **own}


def _holds(table: PlanTable, point: Point, dtype: torch.dtype) -> bool:
    entries = table.blocks if isinstance(point.shape, Block) else table.entries
    return any(_place(point, dtype).items() <= vars(entry).items() for entry in entries)


def best_strategy(samples: Mapping[str, Sequence[float]]) -> str:
    """Return split, unless another strategy is faster by more than the margin.

    If two are equally fast, split is safer: it leaves the GEMM to cuBLAS, which chooses anew for
    shapes near the measured one. They are compared round by round, since a disturbance affects all
    strategies of a round.
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
