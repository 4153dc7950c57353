"""Compile every tile on the tuner's list, for GPUs that need not be present.

    python -m benchmarks.static.candidate_report [--target sm_90 ...] [--tokens 8192 ...]
                                          [--passes thin ...]

The list is that of `fastbound tune`, in the order of the time model, with the default first. The
tuner drops the tiles that have a fault before it times any. The exit status is 1 if the default of
a pass has a fault, or if no other tile of the pass is free of faults.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from benchmarks.report.rows import markdown_table
from fastbound.performance.compilation import TARGETS
from fastbound.performance.inspection import Compiled
from fastbound.performance.passes import PASSES
from fastbound.performance.prediction import DATASHEET, RANK
from fastbound.performance.shapes import Block, Shape, block_of, linear_shapes
from fastbound.performance.tuning.candidates import Machine, Point, shortlist
from fastbound.performance.tuning.sweep import CompileTask, judged

# Llama-3-8B's gate or up, its block, and a plain block.
PLACES: tuple[Shape | Block, ...] = (
    linear_shapes("llama-3-8b")[0],
    block_of("llama-3-8b"),
    block_of("phi-1.5"),
)
PASS_NAMES = tuple(PASSES)
CARDS = {
    "sm_80": "a100-80gb",
    "sm_86": "3090",
    "sm_89": "4090",
    "sm_90": "h100",
    "sm_100": "b200",
    "sm_120": "5090",
    "gfx90a": "mi250",
    "gfx942": "mi300x",
    "gfx1100": "7900",
}


class Row(NamedTuple):
    """A candidate of a pass, its binary and its fault."""

    target: str
    M: int
    name: str
    candidate: str
    is_default: bool
    compiled: Compiled | None
    fault: str | None


def tasks(
    target: str, M: int, rank: int = RANK, passes: Sequence[str] = PASS_NAMES
) -> list[CompileTask]:
    """Every candidate of the passes of :data:`PLACES`; the default of each pass comes first."""
    device = TARGETS[target].device
    machine = Machine(device, CARDS[target], DATASHEET[CARDS[target]], {})
    found: list[CompileTask] = []
    for shape in PLACES:
        point = Point(shape, M, rank)
        tiles = point.default_tiles(device, torch.bfloat16)
        found += [
            (name, candidate, shape, M, rank, torch.bfloat16, target)
            for names in point.kinds.values()
            for name in names
            if name in passes
            for candidate in shortlist(names, tiles, point, machine)
        ]
    return found


def report(
    targets: Sequence[str], tokens: Sequence[int], passes: Sequence[str] = PASS_NAMES
) -> list[Row]:
    """Compile all candidates, on every core."""
    todo = [task for target in targets for M in tokens for task in tasks(target, M, RANK, passes)]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = list(pool.map(judged, todo))
    rows = []
    seen: set[tuple[str, int, str]] = set()
    for task, (compiled, fault) in zip(todo, found, strict=True):
        name, candidate, shape, M, _, _, where = task
        target = str(where)
        if isinstance(shape, Block):
            name += f", {shape.form}"
        key = (target, M, name)
        rows.append(Row(target, M, name, str(candidate), key not in seen, compiled, fault))
        seen.add(key)
    return rows


def as_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        cells = ["-"] * 4
        if row.compiled is not None:
            c = row.compiled
            counts = ", ".join(f"{n} {k}" for k, n in c.instructions.items() if n)
            cells = [str(c.registers), str(c.spills), str(c.shared), counts]
        tile = row.candidate + (" (default)" if row.is_default else "")
        lines.append([row.target, str(row.M), row.name, tile, *cells, row.fault or ""])
    head = ["target", "M", "pass", "tile", "registers", "spills", "shared", "instructions", "fault"]
    return markdown_table(head, lines)


def without_choice(rows: Sequence[Row]) -> list[str]:
    """The passes whose default has a fault, or without another tile that is free of faults."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.target, row.M, row.name), []).append(row)
    return [
        f"{target}, M={M}, {name}"
        for (target, M, name), members in groups.items()
        if members[0].fault or all(row.fault for row in members[1:])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.candidate_report",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--passes", nargs="+", choices=PASS_NAMES, default=list(PASS_NAMES))
    options: Any = parser.parse_args(arguments)
    rows = report(options.target, options.tokens, options.passes)
    print(as_table(rows))
    faulty = sum(row.fault is not None for row in rows)
    print(f"{len(rows)} candidates, {faulty} dropped, {len(rows) - faulty} without faults")
    bad = without_choice(rows)
    for place in bad:
        print(f"no choice: {place}")
    return 1 if bad else 0


if __name__ == "__main__":
    # Interpreted kernels cannot be compiled, and triton reads the variable when it is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
