"""Counted traffic of one adapted layer and one block: `python -m benchmarks.static.traffic`.

Nothing is timed. Every kernel launch and every PyTorch operation is metered (see meter.py) at one
small size whose tiles divide it, and what is found there in passes, that is in units of a tensor's
own size, holds at any size. GEMMs stand apart: a tiled GEMM reads its operands several times.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.report.rows import MIB, markdown_table
from benchmarks.rivals.cases import MODEL_BLOCKS, Block, Case, Shape
from benchmarks.rivals.competitors import (
    BLOCK_COMPETITORS,
    LAYER_COMPETITORS,
    Competitor,
    operator,
    per_layer,
)
from benchmarks.static.meter import Meter, Moved, Region, Step
from fastbound.dispatch.defaults import filled_tiles, padded_rank
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import FP32, linear_workspaces

M, K, N, RANK = 128, 256, 384, 16
DTYPE = torch.bfloat16
GATED = Block("traffic", K, N, "silu", gated=True, bias=False)
LAYER = Shape("traffic", "layer", K, N)
PLAIN = Block("traffic", K, N, "gelu_tanh", gated=False, bias=True)
DIRECTIONS = ("forward", "backward")
RIVALS = ("frozen", "peft_bf16", "peft_fp32")

# What a kernel's arguments hold, for tensors that no caller sees.
_NAMES = {
    "_forward_kernel": {"G": "g", "U": "u", "H": "act"},
    "_backward_kernel": {"DH": "dact", "G": "g", "U": "u", "DG": "dg", "DU": "du"},
}


class Passes(NamedTuple):
    """Reads and writes in units of the tensor's size."""

    read: float
    written: float

    def __str__(self) -> str:
        return f"{self.read:.3g} / {self.written:.3g}"


Ideal = dict[str, tuple[Passes, Passes]]

# One read of a tall operand for each thin product that needs it and no GEMM can give, one write for
# what only an activation kernel makes; y and dx come from GEMMs whole. (forward, backward)
NOTHING = Passes(0, 0)
IDEAL_LINEAR = {
    "x": (Passes(1, 0), Passes(1, 0)),
    "y": (NOTHING, NOTHING),
    "dy": (NOTHING, Passes(1, 0)),
    "dx": (NOTHING, NOTHING),
}
IDEAL_PLAIN = {
    **IDEAL_LINEAR,
    "g": (Passes(1, 0), Passes(1, 0)),
    "act": (Passes(0, 1), NOTHING),
    "dact": (NOTHING, Passes(1, 0)),
    "dg": (NOTHING, Passes(0, 1)),
}
IDEAL_GATED = {
    **IDEAL_PLAIN,
    "u": (Passes(1, 0), Passes(1, 0)),
    "du": (NOTHING, Passes(0, 1)),
}


@dataclass(frozen=True)
class Counted:
    """The steps of a forward and of a backward, and which memory is which tensor."""

    steps: dict[str, list[Step]]  # by direction
    regions: dict[str, Region]  # by the formula's name

    def _moved(self, direction: str, name: str, gemm: bool) -> Iterator[Moved]:
        region = self.regions[name]
        for step in self.steps[direction]:
            if step.gemm is gemm and region in step.moved:
                yield step.moved[region]

    def passes(self, direction: str, name: str) -> Passes:
        """Reads and writes of a tensor outside the GEMMs."""
        nbytes, moved = self.regions[name].nbytes, list(self._moved(direction, name, False))
        return Passes(sum(m.read for m in moved) / nbytes, sum(m.written for m in moved) / nbytes)

    def gemms(self, direction: str, name: str) -> Passes:
        """How many GEMMs read and how many write a tensor, whatever its tiles read again."""
        moved = list(self._moved(direction, name, True))
        return Passes(sum(m.read > 0 for m in moved), sum(m.written > 0 for m in moved))

    def bytes_outside(self, direction: str, elements: int) -> int:
        """Bytes read and written outside the GEMMs in all tensors of so many elements."""
        return sum(
            moved.read + moved.written
            for step in self.steps[direction]
            if not step.gemm
            for region, moved in step.moved.items()
            if region.elements == elements
        )

    def bytes_in_gemms(self, direction: str, elements: int) -> int:
        """The same for GEMMs, each reading and writing a tensor once."""
        return sum(
            region.nbytes * ((moved.read > 0) + (moved.written > 0))
            for step in self.steps[direction]
            if step.gemm
            for region, moved in step.moved.items()
            if region.elements == elements
        )

    def written(self, elements: int) -> set[Region]:
        """The tensors of so many elements, or more, that anything writes."""
        return {
            region
            for steps in self.steps.values()
            for step in steps
            for region, moved in step.moved.items()
            if moved.written and region.elements >= elements
        }


# By their kernels in Triton's interpreter, which a CPU takes only where it is told to.
FUSED = Competitor("fused", operator(forced=True))
PER_LAYER = Competitor("per_layer", per_layer(forced=True))


def counted(shape: Shape | Block, competitor: Competitor = FUSED) -> Counted:
    """Meter one forward and one backward of a layer or a block."""
    o = Case(shape, M, str(DTYPE).removeprefix("torch."), RANK).operands(torch.device("cpu"))
    contender, x, dy = competitor.build(o), o.leaves().x, o.dy
    weights = [p.weight for p in o.projections.values()]
    with Meter(weights) as forward:
        y = contender.forward(x)
    with Meter(weights) as backward:
        dx, *_ = torch.autograd.grad(y, (x, *contender.trained), dy)
    regions = {"x": Region.of(x), "y": Region.of(y), "dy": Region.of(dy), "dx": Region.of(dx)}
    for step in (*forward.steps, *backward.steps):
        for argument, name in _NAMES.get(step.name, {}).items():
            # An argument without use holds another's tensor, which comes before it.
            region = step.operands[argument]
            if region not in regions.values():
                regions.setdefault(name, region)
    return Counted({"forward": forward.steps, "backward": backward.steps}, regions)


# Tables


def passes_table(counted: Counted, ideal: Ideal) -> str:
    """Every tall tensor: reads / writes outside the GEMMs beside the ideal, and GEMMs it is in."""
    head = ["tensor", "size"]
    for direction in DIRECTIONS:
        head += [direction, "ideal", "GEMMs"]
    lines = []
    for name, best in ideal.items():
        size = "[M, K]" if counted.regions[name].elements == M * K else "[M, N]"
        line = [name, size]
        for direction, one in zip(DIRECTIONS, best, strict=True):
            line += [
                str(counted.passes(direction, name)),
                str(one),
                str(counted.gemms(direction, name)),
            ]
        lines.append(line)
    return markdown_table(head, lines)


def comparison_table(rivals: dict[str, Counted], at: Shape | Block) -> str:
    """Passes over all tall tensors together, in units of one in bf16 (fp32 counts twice)."""
    head = ["", *(f"{direction} [M, {d}]" for direction in DIRECTIONS for d in "KN")]
    head += ["with GEMMs K + N", f"KiB a token, {at.model}"]
    lines = []
    for name, counted in rivals.items():
        outside, total = [], [0, 0]
        for direction in DIRECTIONS:
            for i, width in enumerate((K, N)):
                unit = M * width * DTYPE.itemsize
                found = counted.bytes_outside(direction, M * width)
                outside.append(found / unit)
                total[i] += (found + counted.bytes_in_gemms(direction, M * width)) // unit
        moved = DTYPE.itemsize * (total[0] * at.K + total[1] * at.N)
        cells = [*(f"{n:g}" for n in outside), f"{total[0]} + {total[1]}", f"{moved / 1024:.0f}"]
        lines.append([name, *cells])
    return markdown_table(head, lines)


def block_workspaces(
    rows: int, block: Block, rank: int, architecture: str, sms: int
) -> dict[str, int]:
    """Bytes of each workspace of one block's backward, every projection adapted."""
    from fastbound.kernels.gated import column_blocks, spanned_chunks
    from fastbound.kernels.launch import blocks
    from fastbound.kernels.reduce import row_chunks

    K, N, R = block.K, block.N, padded_rank(rank)
    first = 2 if block.gated else 1  # projections that read x
    tiles = filled_tiles(Device(architecture, sms), rows, (N, K), 2 * R, DTYPE)
    chunks_K = row_chunks(rows, K, tiles.reduce, sms)[0]
    chunks_N = spanned_chunks(rows, N, tiles.gated, sms)[0]
    return {
        "down: dS parts": FP32 * blocks(K, tiles.reduce.block_n) * rows * R,
        "down: dB parts": FP32 * chunks_K * K * R,
        "activation: dS parts": FP32 * column_blocks(N, tiles.gated) * rows * first * R,
        "activation: dB and dA parts": FP32 * chunks_N * N * (first + 1) * R,
        "dA parts": FP32 * chunks_K * K * first * R,
    }


def workspace_table(found: dict[str, int], tall: int, name: str) -> str:
    """Each workspace and its share of one tall bf16 tensor of ``tall`` elements."""
    total = {**found, "together": sum(found.values())}
    lines = [
        [part, f"{n / MIB:.1f}", f"{n / (tall * DTYPE.itemsize):.1%}"] for part, n in total.items()
    ]
    return markdown_table(["workspace", "MiB", f"share of {name}"], lines)


def document(rows: int = 8192, sms: int = 132, architecture: str = "sm_90") -> str:
    """Everything `python -m benchmarks.static.traffic` prints, as NOTES.md holds it."""
    from fastbound.kernels.gated import SPAN

    llama = next(block for block in MODEL_BLOCKS if block.model == "llama-3-8b")
    phi = next(block for block in MODEL_BLOCKS if block.model == "phi-1.5")
    linear = {
        c.name: counted(LAYER, c)
        for c in (FUSED, *(c for c in LAYER_COMPETITORS if c.name in RIVALS))
    }
    gated, plain = (
        {
            c.name: counted(block, c)
            for c in (FUSED, PER_LAYER, *(c for c in BLOCK_COMPETITORS if c.name in RIVALS))
        }
        for block in (GATED, PLAIN)
    )
    setting = f"M={rows}, {architecture} tiles, {sms} multiprocessors, r={RANK}"
    layer_parts = linear_workspaces(rows, (llama.K, llama.N), RANK, architecture, sms)
    block_parts = block_workspaces(rows, llama, RANK, architecture, sms)
    return "\n\n".join(
        [
            f"Counted at M={M}, K={K}, N={N}, r={RANK}, bf16, in Triton's interpreter and from "
            f"PyTorch's operations ({versions()}). First a table of `fused`: reads / writes "
            "outside the GEMMs, in units of the tensor; `GEMMs` is how many GEMMs read / write it, "
            "whose tiles read it again by design. Then all competitors: passes over all tall "
            "tensors together outside the GEMMs, in units of one in bf16 (fp32 counts twice), and "
            "with GEMMs that move each operand once.",
            "One layer, K to N:",
            passes_table(linear["fused"], IDEAL_LINEAR),
            comparison_table(linear, llama),
            "A gated block (silu), every projection adapted:",
            passes_table(gated["fused"], IDEAL_GATED),
            comparison_table(gated, llama),
            "A plain block (gelu_tanh); g is the first projection's output:",
            passes_table(plain["fused"], IDEAL_PLAIN),
            comparison_table(plain, phi),
            f"Workspaces of Llama-3-8B's gate or up, arithmetic from the tiles: {setting}:",
            workspace_table(layer_parts, rows * llama.N, "dy"),
            "Of its whole block:",
            workspace_table(block_parts, rows * llama.N, "dact"),
            "Each is written once and read once, but for the activation's dS parts: a program adds "
            f"{SPAN} blocks of columns to its own, one after the other, in cache.",
        ]
    )


def versions() -> str:
    """What the counts of PEFT and of PyTorch's own operations depend on."""
    import peft

    return f"torch {torch.__version__.split('+')[0]}, PEFT {peft.__version__}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.traffic", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=8192, help="tokens, for the workspaces")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--architecture", default="sm_90", help="sm_80, sm_90, gfx942")
    options: Any = parser.parse_args(arguments)
    print(document(options.rows, options.multiprocessors, options.architecture))


def in_the_interpreter(module: str) -> None:
    """Start `python -m module` anew in Triton's interpreter: chosen before kernels are imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})


if __name__ == "__main__":
    in_the_interpreter("benchmarks.static.traffic")
    main()
