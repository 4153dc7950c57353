"""Count the binaries that a model needs and time their compilation, without a GPU.

    python -m benchmarks.static.binaries [--target sm_90] [--lengths 1 4096] [--compile 4096]

Records every launch of Llama-3-8B's layers and of its block, forward and backward, at each number
of tokens in the range, and counts the launches that need different binaries. `--compile` compiles
those of one length one after the other with an empty cache, as a first training step does.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from fastbound.kernels.launch import Launch

from benchmarks.report.rows import markdown_table
from fastbound.dispatch.device import Device
from fastbound.performance.compilation import TARGETS, binary_of, build
from fastbound.performance.prediction import RANK, kernel_name
from fastbound.performance.recorder import block_calls, layer_calls
from fastbound.performance.shapes import block_of, linear_shapes

MODEL = "llama-3-8b"
STRATEGIES = ("fused", "split")


def binaries(
    target: str, lengths: Iterable[int], strategies: Sequence[str] = STRATEGIES
) -> dict[Any, Launch]:
    """Each binary's key with the first launch that needs it, over all ``lengths`` (in tokens)."""
    device = Device(target, TARGETS[target].multiprocessors)
    block, found = block_of(MODEL), dict[Any, Launch]()
    for M in lengths:
        for backend in strategies:
            calls = [
                layer_calls(device, M, shape.N, shape.K, RANK, torch.bfloat16, backend=backend)
                for shape in linear_shapes(MODEL)
            ]
            sizes, ranks = (M, block.N, block.K), (RANK,) * 3
            calls.append(block_calls(device, *sizes, ranks, torch.bfloat16, backend=backend))
            for launch in (launch for each in calls for launch in each.launches):
                found.setdefault(binary_of(launch, device), launch)
    return found


def compile_seconds(target: str, found: Iterable[Launch]) -> list[tuple[str, float]]:
    """Each kernel's name and the seconds to compile it, with an empty cache."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for launch in found:
            started = time.perf_counter()
            build(launch, target)
            taken.append((kernel_name(launch), time.perf_counter() - started))
    return taken


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.binaries", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90")
    parser.add_argument("--lengths", nargs=2, type=int, default=(1, 4096), metavar=("FROM", "TO"))
    parser.add_argument("--compile", type=int, metavar="TOKENS", help="also compile at this length")
    options = parser.parse_args(arguments)
    first, last = options.lengths
    if not 1 <= first <= last:
        parser.error(f"--lengths must be 1 <= FROM <= TO, got {first} {last}")
    if options.compile is not None and options.compile < 1:
        parser.error(f"--compile must be >= 1, got {options.compile}")
    found = binaries(options.target, range(first, last + 1))
    kernels = Counter(kernel_name(launch) for launch in found.values())
    lines = [[name, str(n)] for name, n in [*kernels.most_common(), ("total", len(found))]]
    print(f"{MODEL}, {first} to {last} tokens, r={RANK}, bf16, {options.target}:\n")
    print(markdown_table(["kernel", "binaries"], lines))
    if options.compile is not None:
        one = binaries(options.target, [options.compile], ["fused"])
        taken = compile_seconds(options.target, one.values())
        lines = [[name, f"{seconds:.2f}"] for name, seconds in taken]
        lines.append(["total", f"{sum(seconds for _, seconds in taken):.2f}"])
        print(f"\nCompiled one after the other, {options.compile} tokens, fused:\n")
        print(markdown_table(["kernel", "seconds"], lines))
    return 0


if __name__ == "__main__":
    # Interpreted kernels cannot be compiled, and triton reads the variable when it is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
