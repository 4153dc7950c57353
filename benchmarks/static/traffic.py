"""Count the memory traffic of an adapted layer and block: `python -m benchmarks.static.traffic`.

Nothing is timed. The fused operator is metered (see meter.py) at one small size that its tiles
divide. The result in passes, that is in units of a tensor's own size, holds at any size. GEMMs are
counted separately, since a tiled GEMM reads its operands several times. The traffic of competitors
and the workspaces come from recorded calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from fastbound.kernels.gated import MOST

from benchmarks.report.rows import MIB, markdown_table
from benchmarks.rivals.cases import Block, Case, Shape
from benchmarks.rivals.competitors import Competitor, operator, per_layer
from benchmarks.static import in_the_interpreter
from benchmarks.static.meter import Meter, Moved, Step
from benchmarks.static.recorded import DTYPE, calls_of, rivals_of, versions
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import Region, kernel_name, moved, operands
from fastbound.performance.recorder import Directions
from fastbound.performance.shapes import block_of, linear_shapes

M, K, N, RANK = 128, 256, 384, 16
GATED = Block("traffic", K, N, "silu", gated=True, bias=False)
LAYER = Shape("traffic", "layer", K, N)
PLAIN = Block("traffic", K, N, "gelu_tanh", gated=False, bias=True)
A_PRIME = 8191  # tokens; a prime, so that no other tensor has as many elements as a tall one
DIRECTIONS = ("forward", "backward")

# The formula's names for kernels' arguments, for tensors that no caller sees.
_NAMES = {
    "_activate_kernel": {"G": "g", "U": "u", "H": "act"},
    "_activate_backward_kernel": {"DH": "dact", "G": "g", "U": "u", "DG": "dg", "DU": "du"},
}


class Accesses(NamedTuple):
    """A tensor's reads and writes, in units of its size."""

    read: float
    written: float

    def __str__(self) -> str:
        return f"{self.read:.3g} / {self.written:.3g}"


Ideal = dict[str, tuple[Accesses, Accesses]]

# (forward, backward): one read of a tall operand for each thin product that no GEMM can compute,
# and one write of what only an activation kernel makes. GEMMs write y and dx completely.
NOTHING = Accesses(0, 0)
IDEAL_LINEAR = {
    "x": (Accesses(1, 0), Accesses(1, 0)),
    "y": (NOTHING, NOTHING),
    "dy": (NOTHING, Accesses(1, 0)),
    "dx": (NOTHING, NOTHING),
}
IDEAL_PLAIN = {
    **IDEAL_LINEAR,
    "g": (Accesses(1, 0), Accesses(1, 0)),
    "act": (Accesses(0, 1), NOTHING),
    "dact": (NOTHING, Accesses(1, 0)),
    "dg": (NOTHING, Accesses(0, 1)),
}
IDEAL_GATED = {
    **IDEAL_PLAIN,
    "u": (Accesses(1, 0), Accesses(1, 0)),
    "du": (NOTHING, Accesses(0, 1)),
}


@dataclass(frozen=True)
class Counted:
    """The steps of a forward and a backward, and the memory region of each named tensor."""

    steps: dict[str, list[Step]]  # by direction
    regions: dict[str, Region]  # by the formula's name

    def _moved(self, direction: str, name: str, gemm: bool) -> Iterator[Moved]:
        region = self.regions[name]
        for step in self.steps[direction]:
            if step.gemm is gemm and region in step.moved:
                yield step.moved[region]

    def accesses(self, direction: str, name: str) -> Accesses:
        """Reads and writes of a tensor outside the GEMMs."""
        nbytes, moved = self.regions[name].nbytes, list(self._moved(direction, name, False))
        return Accesses(sum(m.read for m in moved) / nbytes, sum(m.written for m in moved) / nbytes)

    def gemms(self, direction: str, name: str) -> Accesses:
        """How many GEMMs read a tensor and how many write it, not counting repeated reads."""
        moved = list(self._moved(direction, name, True))
        return Accesses(sum(m.read > 0 for m in moved), sum(m.written > 0 for m in moved))

    def written(self, elements: int) -> set[Region]:
        """The regions of at least ``elements`` elements that any step writes."""
        return {
            region
            for steps in self.steps.values()
            for step in steps
            for region, moved in step.moved.items()
            if moved.written and region.elements >= elements
        }


# With kernels in Triton's interpreter, which a CPU uses only if forced.
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
            # An unused argument repeats an earlier argument's tensor.
            region = step.operands[argument]
            if region not in regions.values():
                regions.setdefault(name, region)
    return Counted({"forward": forward.steps, "backward": backward.steps}, regions)


# Tables


def passes_table(counted: Counted, ideal: Ideal) -> str:
    """Every tall tensor's reads / writes outside GEMMs, the ideal, and the GEMMs that use it."""
    head = ["tensor", "size"]
    for direction in DIRECTIONS:
        head += [direction, "ideal", "GEMMs"]
    lines = []
    for name, best in ideal.items():
        size = "[M, K]" if counted.regions[name].elements == M * K else "[M, N]"
        line = [name, size]
        for direction, one in zip(DIRECTIONS, best, strict=True):
            line += [
                str(counted.accesses(direction, name)),
                str(one),
                str(counted.gemms(direction, name)),
            ]
        lines.append(line)
    return markdown_table(head, lines)


def tall_passes(
    name: str, place: Shape | Block, M: int = A_PRIME
) -> dict[tuple[str, str, bool], float]:
    """A competitor's passes over all tall tensors together, from its recorded calls.

    The keys are the direction, the width K or N, and whether a GEMM makes the passes; a GEMM's
    operands each move once. The unit is one pass in bf16, so fp32 counts twice.
    """
    calls = calls_of(name, place, M)
    found = dict.fromkeys(product(DIRECTIONS, "KN", (False, True)), 0.0)
    for direction in DIRECTIONS:
        for call in getattr(calls, direction):
            regions = moved(call)
            gemm = place.N * place.K in [region.elements for region in regions]
            for width in "KN":
                tall = M * getattr(place, width)
                nbytes = sum(region.nbytes for region in regions if region.elements == tall)
                found[direction, width, gemm] += nbytes / (tall * DTYPE.itemsize)
    return found


def comparison_table(place: Shape | Block) -> str:
    """Each competitor's passes, without GEMMs and in total."""
    head = ["", *(f"{direction} [M, {d}]" for direction in DIRECTIONS for d in "KN")]
    head += ["with GEMMs K + N", f"KiB per token, {place.model}"]
    lines = []
    for name in ("frozen", *rivals_of(place)):
        found = tall_passes(name, place)
        K, N = (sum(n for (_, width, _), n in found.items() if width == each) for each in "KN")
        nbytes = DTYPE.itemsize * (K * place.K + N * place.N)
        outside = [f"{passes:g}" for (_, _, gemm), passes in found.items() if not gemm]
        lines.append([name, *outside, f"{K:g} + {N:g}", f"{nbytes / 1024:.0f}"])
    return markdown_table(head, lines)


def workspaces(calls: Directions) -> list[tuple[str, int]]:
    """The parts [parts, ., R] that one launch leaves for a later one to add: names and bytes."""
    found: dict[int, tuple[str, int]] = {}
    for launch in calls.launches:
        for argument, tensor in operands(launch):
            if tensor.dim() == 3:
                region, size = Region.of(tensor), list(tensor.shape)
                part = f"{kernel_name(launch)}: {argument} {size}"
                found.setdefault(region.storage, (part, region.nbytes))
    return list(found.values())


def workspace_table(found: Sequence[tuple[str, int]], tall: int, name: str) -> str:
    """Each workspace and its share of one tall bf16 tensor of ``tall`` elements."""
    total = [*found, ("total", sum(nbytes for _, nbytes in found))]
    lines = [[part, f"{n / MIB:.1f}", f"{n / (tall * DTYPE.itemsize):.1%}"] for part, n in total]
    return markdown_table(["workspace", "MiB", f"share of {name}"], lines)


def document(rows: int = 8192, sms: int = 132, architecture: str = "sm_90") -> str:
    """Everything that `python -m benchmarks.static.traffic` prints, and NOTES.md contains."""
    llama, phi, gate = block_of("llama-3-8b"), block_of("phi-1.5"), linear_shapes("llama-3-8b")[0]
    device = Device(architecture, sms)
    setting = f"M={rows}, {architecture} tiles, {sms} multiprocessors, r={RANK}"
    layer_parts, block_parts = (
        workspaces(calls_of("fused", place, rows, RANK, device)) for place in (gate, llama)
    )
    return "\n\n".join(
        [
            f"The first table of each pair is `fused`, counted at M={M}, K={K}, N={N}, r={RANK}, "
            "bf16, in Triton's interpreter: reads / writes outside the GEMMs, in units of the "
            "tensor. `GEMMs` is how many GEMMs read / write it; their tiles read it several times "
            "by design. The second table has all competitors, from their recorded calls "
            f"({versions()}): passes over all tall tensors together outside the GEMMs, in units of "
            "one pass in bf16 (fp32 counts twice), and the total with GEMMs that move each operand "
            "once.",
            "One layer, K to N:",
            passes_table(counted(LAYER), IDEAL_LINEAR),
            comparison_table(gate),
            "A gated block (silu), every projection adapted:",
            passes_table(counted(GATED), IDEAL_GATED),
            comparison_table(llama),
            "A plain block (gelu_tanh); g is the first projection's output:",
            passes_table(counted(PLAIN), IDEAL_PLAIN),
            comparison_table(phi),
            "Workspaces of Llama-3-8B's gate or up, from its recorded launches (P has parts of a "
            f"thin product, Q of a factor's gradient), {setting}:",
            workspace_table(layer_parts, rows * llama.N, "dy"),
            "Workspaces of its whole block:",
            workspace_table(block_parts, rows * llama.N, "dact"),
            "Each is written once and read once, except P of the activation's backward: there a "
            f"program adds up to {MOST} blocks of columns to its own part, one after the other, in "
            "cache.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.traffic", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=8192, help="tokens for the workspaces (8192)")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--architecture", default="sm_90", help="such as sm_80, sm_90 or gfx942")
    options: Any = parser.parse_args(arguments)
    print(document(options.rows, options.multiprocessors, options.architecture))


if __name__ == "__main__":
    in_the_interpreter()
    main()
