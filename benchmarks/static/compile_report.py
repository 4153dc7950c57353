"""Registers, shared memory and instructions of every kernel, for GPUs that need not be present.

    python -m benchmarks.compile_report [--target sm_90 ...] [--rank 16 ...] [--json FILE]

Compiles every launch that a layer and an MLP block make (see `performance.recorder`) with the tiles
that dispatch chooses. The exit status is 1 if a kernel spills, needs more shared memory than the
card has or lacks the instructions it is written for, or if a GEMM on Hopper waits in its steady
loop for its own loads or products. The file is written after every target, dtype and rank, and a
binary that it holds from the same kernels and the same Triton is not compiled again, so that a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from fastbound.kernels.launch import Launch

from benchmarks.static.earlier import Row, binaries, digest, read_rows, write_rows
from fastbound.dispatch.defaults import tile_family
from fastbound.dispatch.plan import WITHOUT_PRODUCT, most_block_rank
from fastbound.performance.compilation import TARGETS, binary_of, compile_launch, faults
from fastbound.performance.inspection import Compiled, count, kernel_name
from fastbound.performance.recorder import Directions, block_calls, layer_calls
from fastbound.truth.formula import ACTIVATIONS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Llama-3-8B's gate projection at the thin product's three row tiles, with results of more than
# 2 GiB (on AMD other instructions), with a number of rows that is not a multiple of any block, and
# a shape whose rows TMA cannot load.
SHAPES = {
    "131072 tokens": (131_072, 14336, 4096),
    "8192 tokens": (8192, 14336, 4096),
    "2048 tokens": (2048, 14336, 4096),
    "512 tokens": (512, 14336, 4096),
    "8191 tokens": (8191, 14336, 4096),
    "odd": (8191, 14333, 4093),
}
# fp32 leaves the GEMM to cuBLAS, and the other shapes differ only in the rows of the thin product.
WITH_DROPOUT = {(d, shape) for d in ("bf16", "fp16") for shape in ("8192 tokens", "odd")}
NOTHING = Compiled(0, 0, 0, count(""))  # stands for a kernel that does not compile
# The forms of the known models; other forms differ only in the activation.
FORMS = (("silu", True), ("gelu_tanh", False))


@dataclass(frozen=True)
class KernelReport:
    """One binary, the first call that launches it, and its faults (empty if there are none)."""

    target: str
    dtype: str
    rank: int
    shape: str
    kernel: str
    call: str
    compiled: Compiled
    faults: tuple[str, ...]
    binary: str  # the digest of what the binary follows from

    def as_data(self, triton: str) -> dict[str, Any]:
        """The row as plain numbers and strings, for JSON."""
        c = self.compiled
        return {
            "target": self.target,
            "triton": triton,
            "kernel": self.kernel,
            "pass": self.call,
            "dtype": self.dtype,
            "rank": self.rank,
            "shape": self.shape,
            "rows": SHAPES[self.shape][0],
            "registers": c.registers,
            "spills": c.spills,
            "shared": c.shared,
            "limit": TARGETS[self.target].shared_limit,
            "instructions": dict(c.instructions),
            "in_flight": None if c.loop is None else c.loop.in_flight,
            "loads_ahead": None if c.loop is None else c.loop.loads_ahead,
            "loop_length": None if c.loop is None else c.loop.length,
            "round_trips": None if c.loop is None else c.loop.round_trips,
            "warnings": list(c.warnings),
            "binary": self.binary,
            "faults": list(self.faults),
        }


def calls(
    target: str, dtype: str, rank: int, shape: str, activations: Sequence[str]
) -> Iterator[tuple[str, Directions]]:
    """Every call whose kernels are compiled, by name; without activations, known blocks only."""
    device = TARGETS[target].device
    sizes, kind = SHAPES[shape], DTYPES[dtype]
    layer = partial(layer_calls, device, *sizes, rank, kind)
    yield "layer", layer(backend="fused")
    yield "layer with bias", layer(backend="fused", bias=True)
    if (dtype, shape) in WITH_DROPOUT:
        yield "layer with dropout", layer(backend="fused", dropout=0.1)
        yield "split layer with dropout", layer(backend="split", dropout=0.1)
        yield "term over a base with dropout", layer(over_base=True, dropout=0.1)
    if shape == "8192 tokens":
        yield "layer with strided operands", layer(backend="fused", strided=True)
        # As a transformers Conv1D stores it, and as a model loaded in bf16 as a whole has them.
        other: dict[str, Any] = {"layout": "columns", "adapter_dtype": torch.bfloat16}
        yield "layer with columns, bf16 factors", layer(backend="fused", **other)
    if tile_family(device) not in WITHOUT_PRODUCT:
        yield "product layer", layer(backend="split", form="product")
    if rank > most_block_rank(device):
        return
    forms = [(activation, gated) for activation in activations for gated in (True, False)]
    for activation, gated in forms or FORMS:
        name = f"{'gated' if gated else 'plain'} {activation} block"
        ranks = (rank,) * (2 + gated)
        settings: dict[str, Any] = {"activation": activation, "gated": gated}
        yield name, block_calls(device, *sizes, ranks, kind, backend="fused", **settings)


def launches(
    target: str, dtype: str, rank: int, shape: str, activations: Sequence[str]
) -> Iterator[tuple[str, Launch]]:
    """Each binary once, with the first call that needs it, such as "layer, forward"."""
    seen: set[Any] = set()
    for name, directions in calls(target, dtype, rank, shape, activations):
        for direction, made in zip(directions._fields, directions, strict=True):
            for launch in made:
                if not isinstance(launch, Launch):
                    continue
                binary = binary_of(launch, target)
                if binary not in seen:
                    seen.add(binary)
                    yield f"{name}, {direction}", launch


Task = tuple[str, str, int, Sequence[str], Sequence[str], Sequence[str]]


def compile_one(
    task: Task, known: Mapping[tuple[str, str], Compiled] = MappingProxyType({})
) -> list[KernelReport]:
    """The kernels of one target, dtype and rank: all of them, or those that are named.

    A binary that several shapes share is compiled once, and one that is ``known``, by target and
    digest, not at all.
    """
    target, dtype, rank, shapes, activations, kernels = task
    found = []
    compiled: dict[Any, tuple[Compiled, tuple[str, ...]]] = {}
    for shape in shapes:
        for call, launch in launches(target, dtype, rank, shape, activations):
            name, binary = kernel_name(launch), binary_of(launch, target)
            if kernels and name not in kernels:
                continue
            key = digest(launch, target)
            if binary not in compiled:
                compiled[binary] = _compiled(launch, target, known.get((target, key)))
            one, wrong = compiled[binary]
            found.append(KernelReport(target, dtype, rank, shape, name, call, one, wrong, key))
    return found


def _compiled(
    launch: Launch, target: str, known: Compiled | None = None
) -> tuple[Compiled, tuple[str, ...]]:
    """The compiled launch and its faults; a launch that does not compile has that as its fault."""
    try:
        one = compile_launch(launch, target) if known is None else known
    except Exception as error:
        last = str(error).strip().splitlines()[-1:]
        return NOTHING, (f"does not compile: {type(error).__name__} {last}",)
    return one, faults(launch, one, target)


def report(
    tasks: Sequence[Task], known: Mapping[tuple[str, str], Compiled]
) -> Iterator[list[KernelReport]]:
    """Task by task, compiled on every core; Triton's cache holds what several of them share."""
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(partial(compile_one, known=known), tasks)


def covers(task: Task, row: Row) -> bool:
    """Whether a row is of a kind that the task makes anew."""
    target, dtype, rank, shapes, _, kernels = task
    same = (row.get("target"), row.get("dtype"), row.get("rank")) == (target, dtype, rank)
    return same and row.get("shape") in shapes and (not kernels or row["kernel"] in kernels)


def as_table(reports: Sequence[KernelReport]) -> str:
    """One line per kernel."""
    header = f"{'target':7} {'dtype':5} {'rank':>4} {'shape':12} {'kernel':11} {'call':39} "
    lines = [header + f"{'regs':>4} {'spills':>6} {'shared':>7}  instructions"]
    for one in reports:
        c = one.compiled
        used = " ".join(f"{name} {n}" for name, n in c.instructions.items() if n)
        if c.loop is not None:
            used += "" if c.loop.in_flight is None else f", {c.loop.in_flight} in flight"
            used += f", {c.loop.loads_ahead} loads ahead"
        line = f"{one.target:7} {one.dtype:5} {one.rank:4} {one.shape:12} {one.kernel:11} "
        line += f"{one.call:39} {c.registers:4} {c.spills:6} {c.shared:7}  {used}"
        lines.append(line + (f"  FAULT: {'; '.join(one.faults)}" if one.faults else ""))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16", "fp16"])
    parser.add_argument("--rank", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    only = "activations of gated and plain blocks (default: gated silu and plain gelu_tanh)"
    parser.add_argument("--activation", nargs="+", choices=ACTIVATIONS, default=[], help=only)
    parser.add_argument("--kernel", nargs="+", default=[], help="only these kernels (default: all)")
    kept = "also write the rows to this file, and do not compile again what it holds"
    parser.add_argument("--json", type=Path, help=kept)
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.json)
    except (OSError, ValueError) as error:
        parser.error(f"--json: {error}")
    import triton

    tasks: list[Task] = [
        (target, dtype, rank, options.shape, options.activation, options.kernel)
        for target in options.target
        for dtype in options.dtype
        for rank in options.rank
    ]
    found: list[KernelReport] = []
    known = binaries(rows, triton.__version__)
    for task, made in zip(tasks, report(tasks, known), strict=True):
        found += made
        rows = [row for row in rows if not covers(task, row)]
        rows += [one.as_data(triton.__version__) for one in made]
        if options.json is not None:
            write_rows(options.json, rows)
    print(as_table(found))
    bad = [one for one in found if one.faults]
    print(f"{len(found)} kernels, {len(bad)} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    # Interpreted kernels cannot be compiled, and triton reads the variable when it is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
