"""Plans measured on a GPU, one shape after the other, into a table that dispatch reads.

For each shape: candidates of a pass in the order of the time model, those that the compiler's
report speaks against dropped, the rest timed against one another with a cold cache; then whole
layers with the best tiles, fused against split against PyTorch. What is not faster by more than
:data:`MARGIN` changes nothing: the default tile stays, and split stays before fused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from fastbound.kernels.tiles import GemmTile
from fastbound.passes import Candidate
from fastbound.plan import Device, Tiles, default_tiles, filled_tiles
from fastbound.plan_tables import (
    Entry,
    PlanTable,
    fits,
    read_table,
    require_same_gpu,
    write_table,
)
from fastbound.shapes import Shape
from fastbound.tile_sweep import candidates
from fastbound.time_model import Ceilings, tile_seconds
from fastbound.torch_products import padded_rank

# A tile, and the passes that it serves: it is chosen for their sum.
KINDS: Mapping[str, tuple[str, ...]] = {
    "gemm": ("gemm forward",),
    "gemm_t": ("gemm dx",),
    "thin": ("thin",),
    "reduce": ("reduce dy", "reduce x"),
}
STEPS = len(KINDS) + 1  # of a shape: its tiles, and the strategies
MARGIN = 0.01
COMPILED, TIMED = 20, 10  # candidates of a kind, the default among them
TYPICAL_TOKENS = 8192


@dataclass(frozen=True)
class Point:
    """One shape at M rows (a power of two), with factors of ``rank``."""

    shape: Shape
    M: int
    rank: int

    def __str__(self) -> str:
        return f"{self.shape} at {self.M} tokens, rank {self.rank}"


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


@dataclass(frozen=True)
class Machine:
    """The GPU to tune for, as dispatch sees it, its name and ceilings; versions of the software."""

    device: Device
    name: str
    ceilings: Ceilings
    versions: Mapping[str, str]


def points(shapes: Sequence[Shape], tokens: Sequence[int], ranks: Sequence[int]) -> list[Point]:
    """What to measure, the most useful first: the first rank, and tokens nearest to 8192.

    Tokens enter as the power of two at or above them; shapes of the same sizes once.
    """
    distinct = list({(shape.N, shape.K): shape for shape in reversed(shapes)}.values())[::-1]
    rows = sorted(
        {1 << (M - 1).bit_length() for M in tokens},
        key=lambda M: abs(M.bit_length() - TYPICAL_TOKENS.bit_length()),
    )
    return [Point(shape, M, rank) for rank in ranks for M in rows for shape in distinct]


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

    Shapes that the table holds already are passed over. ``step`` is called :data:`STEPS` times for
    each shape, with what is done next. Out of memory leaves a shape out and goes on.
    """
    deadline = clock() + 60 * minutes
    name = str(dtype).removeprefix("torch.")
    held = {(e.N, e.K, e.M, e.R, e.dtype) for e in table.entries}
    failures: list[str] = []
    late: list[Point] = []
    for point in todo:
        shape, R = point.shape, padded_rank(point.rank)
        if (shape.N, shape.K, point.M, R, name) in held:
            for _ in range(STEPS):
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
) -> Entry | None:
    """None where the budget ended on the way."""
    shape, R = point.shape, padded_rank(point.rank)
    tiles = filled_tiles(machine.device, point.M, (shape.N, shape.K), R, dtype)
    for kind, names in KINDS.items():
        step(f"{point}: {kind}")
        chosen = shortlist(names, tiles, point, machine)
        found = bench.faults(names, point, chosen, deadline)
        kept = [c for c, fault in zip(chosen, found, strict=True) if c is chosen[0] or not fault]
        kept = kept[:TIMED]
        sums = dict.fromkeys(kept, 0.0)
        for name in names:
            timed = bench.sweep(name, point, kept)
            sums = {c: total + timed[c] for c, total in sums.items() if c in timed}
        tiles = replace(tiles, **{kind: _best(chosen[0], sums).tile})
        if clock() >= deadline:
            return None
    step(f"{point}: strategies")
    timings = bench.strategies(point, tiles)
    failures += [f"{point}: {strategy}: {why}" for strategy, why in timings.faults.items()]
    if not timings.samples:
        return None
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return Entry(
        N=shape.N,
        K=shape.K,
        M=point.M,
        R=R,
        dtype=str(dtype).removeprefix("torch."),
        strategy=best_strategy(timings.samples),
        gemm=tiles.gemm,
        gemm_t=tiles.gemm_t,
        thin=tiles.thin,
        reduce=tiles.reduce,
        origin=f"measured {today} on {machine.name}",
    )


def shortlist(
    names: Sequence[str], tiles: Tiles, point: Point, machine: Machine
) -> list[Candidate]:
    """The default, then the candidates that the time model finds fastest."""
    default, *others = candidates(names[0], tiles)
    architecture = machine.device.architecture
    takes_descriptors = default_tiles(
        architecture, point.M, padded_rank(point.rank), torch.bfloat16
    ).gemm.descriptors

    def possible(candidate: Candidate) -> bool:
        tile = candidate.tile
        if candidate.programs != 1.0:  # a plan has no word for another number
            return False
        return not isinstance(tile, GemmTile) or (
            fits(tile, architecture) and (takes_descriptors or not tile.descriptors)
        )

    def predicted(candidate: Candidate) -> float:
        return sum(
            tile_seconds(
                name,
                candidate.tile,
                point.shape,
                point.M,
                padded_rank(point.rank),
                machine.ceilings,
                machine.device.multiprocessors,
            )
            for name in names
        )

    return [default, *sorted(filter(possible, others), key=predicted)[: COMPILED - 1]]


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
