"""Registers, shared memory and instructions of every kernel, for GPUs that need not be there.

    python -m benchmarks.static.compile_report [--target sm_90 ...] [--rank 16 ...] [--json FILE]

Compiles each launch of one layer's forward and backward with the tiles that dispatch chooses, and
exits with 1 if a kernel spills, asks for more shared memory than the card has, or misses the
instructions it is written for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastbound.dispatch.plan import MAX_TRITON_RANK
from fastbound.performance.compilation import (
    TARGETS,
    Compiled,
    block_launches,
    compile_launch,
    dropout_launches,
    layer_launches,
)
from fastbound.truth.formula import ACTIVATIONS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# One row of Llama-3-8B's gate projection at the three row tiles of the thin product, and a shape
# whose rows TMA cannot take.
SHAPES = {
    "8192 tokens": (8192, 14336, 4096),
    "2048 tokens": (2048, 14336, 4096),
    "512 tokens": (512, 14336, 4096),
    "odd": (8192, 14333, 4093),
}
MATRIX_UNIT = {"sm_80": ("HMMA",), "sm_90": ("HMMA", "HGMMA"), "gfx942": ("v_mfma",)}
FORMS = [(name, gated) for name in ACTIVATIONS for gated in (True, False)]
WITHOUT_DOT = ("factors", "finish", "block finish", "keep bits")
# fp32 leaves the GEMM to cuBLAS, and the other shapes differ in the rows of the thin product only.
WITH_DROPOUT = {(d, shape) for d in ("bf16", "fp16") for shape in ("8192 tokens", "odd")}


@dataclass(frozen=True)
class Row:
    """One kernel of one layer on one target, and what is wrong with it (empty if nothing)."""

    target: str
    dtype: str
    rank: int
    shape: str
    kernel: str
    compiled: Compiled
    faults: tuple[str, ...]


def faults(target: str, dtype: str, shape: str, kernel: str, compiled: Compiled) -> Iterator[str]:
    """What a kernel must not do, or must use and does not."""
    count, limit = compiled.instructions, TARGETS[target].shared_limit
    if compiled.spills:
        yield f"{compiled.spills} spills"
    if compiled.shared > limit:
        yield f"{compiled.shared} bytes of shared memory for {limit}"
    if dtype == "fp32" or kernel.startswith(WITHOUT_DOT):
        return
    if not any(count[name] for name in MATRIX_UNIT[target]):
        yield f"no {' or '.join(MATRIX_UNIT[target])}"
    if target == "sm_90" and "gemm" in kernel:
        if not count["HGMMA"]:
            yield "no HGMMA"
        if shape != "odd" and not (count["UTMALDG"] and count["UTMASTG"]):
            yield "no TMA load or store"


def compile_layer(task: tuple[str, str, int, str, Sequence[str]]) -> list[Row]:
    """Every kernel of one layer and of one MLP block, compiled."""
    target, dtype, rank, shape, activations = task
    rows = []
    launches = layer_launches(target, *SHAPES[shape], rank, DTYPES[dtype])
    if (dtype, shape) in WITH_DROPOUT:
        launches |= dropout_launches(target, *SHAPES[shape], rank, DTYPES[dtype])
    if 2 * rank <= MAX_TRITON_RANK:  # a block's projections stand side by side
        for activation, gated in FORMS:
            if activation not in activations:
                continue
            block = block_launches(target, *SHAPES[shape], rank, DTYPES[dtype], activation, gated)
            form = f"{activation}{'' if gated else ' plain'}"
            launches |= {f"{k} {form}" if k.startswith("act") else k: v for k, v in block.items()}
    for kernel, launch in launches.items():
        compiled = compile_launch(launch, target)
        found = tuple(faults(target, dtype, shape, kernel, compiled))
        rows.append(Row(target, dtype, rank, shape, kernel, compiled, found))
    return rows


def report(
    targets: Sequence[str],
    dtypes: Sequence[str],
    ranks: Sequence[int],
    shapes: Sequence[str],
    activations: Sequence[str],
) -> list[Row]:
    """All combinations, on every core; equal launches are compiled once (Triton's own cache)."""
    tasks = [
        (t, d, r, s, activations) for t in targets for d in dtypes for r in ranks for s in shapes
    ]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [row for rows in pool.map(compile_layer, tasks) for row in rows]


def as_table(rows: Sequence[Row]) -> str:
    """One line a kernel."""
    header = f"{'target':7} {'dtype':5} {'rank':>4} {'shape':12} {'kernel':33} {'regs':>4} "
    lines = [header + f"{'spills':>6} {'shared':>7}  instructions"]
    for row in rows:
        c = row.compiled
        used = " ".join(f"{name} {n}" for name, n in c.instructions.items() if n)
        line = f"{row.target:7} {row.dtype:5} {row.rank:4} {row.shape:12} {row.kernel:33} "
        line += f"{c.registers:4} {c.spills:6} {c.shared:7}  {used}"
        lines.append(line + (f"  FAULT: {'; '.join(row.faults)}" if row.faults else ""))
    return "\n".join(lines)


def as_data(rows: Sequence[Row]) -> dict[str, Any]:
    import triton

    return {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16", "fp16"])
    parser.add_argument("--rank", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--activation", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    rows = report(options.target, options.dtype, options.rank, options.shape, options.activation)
    print(as_table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(as_data(rows), indent=1))
    bad = [row for row in rows if row.faults]
    print(f"{len(rows)} kernels, {len(bad)} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    # Kernels that are interpreted cannot be compiled; the variable is read when triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
