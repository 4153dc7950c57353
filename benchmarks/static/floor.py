"""The floor of layers and blocks by arithmetic, not measured: `python -m benchmarks.static.floor`.

The frozen layer does 2·M·N·K operations forward and as many for dx. What a competitor does in
addition is recorded (see recorded.py), and `fastbound.performance.prediction` predicts its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.report.rows import markdown_table
from benchmarks.rivals.cases import CPU_SHAPES, CPU_TOKENS, MODEL_BLOCKS, MODEL_SHAPES
from benchmarks.static.recorded import GPU, predictions, ratio, rivals_of, versions
from fastbound.performance.prediction import RANK, Ceilings, Prediction, seconds
from fastbound.performance.shapes import Block, Shape, block_of

TOKENS = (1024, 8192, 32768)
TYPICAL_TOKENS = 8192
SMALL = 0.002  # calls that take less than this share of the total are combined in one line
GPU_CEILINGS = Ceilings(700e12, 4.3e12)
CPU_CEILINGS = Ceilings(400e9, 20e9)
CPU_RIVALS = ("torch", "addmm", "peft_bf16", "peft_fp32")
RULE = (
    "a call takes the longer of its operations and its bytes; it moves each of its tensors once, "
    "and also reads what it adds onto; no call overlaps another"
)


def floor_table(
    shapes: Sequence[Shape],
    M: int,
    tokens: Sequence[int],
    ceilings: Ceilings,
    rivals: Sequence[str],
) -> str:
    """Operations and bytes at M, the floor's time at each of `tokens`, predicted ratios at M."""

    def gemm(shape: Shape, M: int) -> Prediction:
        return predictions("frozen", shape, M)[0]

    times = [f"ms @ {count}" for count in tokens]
    lines = []
    for shape in shapes:
        one = gemm(shape, M)
        adapted = sum(each.flops for each in predictions("addmm", shape, M))
        line = [str(shape), f"{shape.K}->{shape.N}", f"{one.flops / 1e9:.1f}"]
        line += [f"{one.nbytes / 1e6:.0f}", f"{one.flops / one.nbytes:.0f}"]
        line.append(f"{adapted / (2 * one.flops) - 1:.2%}")
        for count in tokens:
            bound = " (memory)" if gemm(shape, count).bound_by(ceilings) == "memory" else ""
            line.append(f"{gemm(shape, count).seconds(ceilings) * 1e3:.3f}{bound}")
        lines.append([*line, *(f"{ratio(name, shape, M, ceilings):.2f}" for name in rivals)])
    head = ["layer", "K->N", "GFLOP", "MB", "FLOP/B", "adapter", *times, *rivals]
    return markdown_table(head, lines)


def block_table(blocks: Sequence[Block], M: int, ceilings: Ceilings) -> str:
    """The frozen block's time, and every competitor's predicted ratio to it."""
    rivals = rivals_of(blocks[0])
    lines = []
    for block in blocks:
        ratios = {name: ratio(name, block, M, ceilings) for name in rivals}
        over = [ratios[name] / ratios["fused"] for name in ("peft_bf16", "peft_fp32")]
        frozen = seconds(predictions("frozen", block, M), ceilings)
        cells = [f"{value:.2f}" for value in (*ratios.values(), *over)]
        lines.append([str(block), f"{frozen * 1e3:.3f}", *cells])
    head = ["block", "frozen ms", *rivals, "peft_bf16 / fused", "peft_fp32 / fused"]
    return markdown_table(head, lines)


def calls_table(found: Sequence[Prediction], ceilings: Ceilings) -> str:
    """Operations, bytes and predicted milliseconds of every call, with small calls combined."""

    def line(name: str, some: Sequence[Prediction], bound_by: str = "") -> list[str]:
        flops, nbytes = sum(one.flops for one in some), sum(one.nbytes for one in some)
        taken = f"{seconds(some, ceilings) * 1e3:.3f}"
        return [name, f"{flops / 1e9:.1f}", f"{nbytes / 1e6:.0f}", taken, bound_by]

    least = SMALL * seconds(found, ceilings)
    small = [one for one in found if one.seconds(ceilings) < least]
    lines = [line(one.name, [one], one.bound_by(ceilings)) for one in found if one not in small]
    lines += [line(f"{len(small)} smaller calls", small), line("total", found)]
    return markdown_table(["call", "GFLOP", "MB", "predicted ms", "bound by"], lines)


def _assumed(ceilings: Ceilings) -> str:
    return (
        f"bf16, r={RANK}, with assumed ceilings of {ceilings.flops / 1e12:g} TFLOP/s and "
        f"{ceilings.bandwidth / 1e12:g} TB/s"
    )


def layers_document(ceilings: Ceilings = GPU_CEILINGS) -> str:
    """What `python -m benchmarks.static.floor` prints about layers, and NOTES.md contains."""
    return "\n\n".join(
        [
            f"Arithmetic, not measurement: {_assumed(ceilings)}. GFLOP, MB and FLOP/B are those of "
            f"the bare GEMM, forward or dx, at M={TYPICAL_TOKENS}. `adapter` is the adapter's "
            "share of the operations. `ms @ M` is the bare GEMM's time at the ceilings, bound by "
            "compute unless marked. The last columns are predictions: forward plus backward "
            f"divided by that of the frozen layer at M={TYPICAL_TOKENS}, from the calls that each "
            f"competitor makes over meta tensors ({versions()}). The rule: {RULE}. Tiles and "
            f"workspaces are those of {GPU.architecture} with {GPU.multiprocessors} "
            "multiprocessors.",
            floor_table(MODEL_SHAPES, TYPICAL_TOKENS, TOKENS, ceilings, rivals_of(MODEL_SHAPES[0])),
            f"The cases for a CPU, at an assumed {CPU_CEILINGS.flops / 1e9:g} GFLOP/s and "
            f"{CPU_CEILINGS.bandwidth / 1e9:g} GB/s for two cores; `torch` is the path that the "
            "operator takes there:",
            floor_table(CPU_SHAPES, CPU_TOKENS[0], CPU_TOKENS, CPU_CEILINGS, CPU_RIVALS),
        ]
    )


def blocks_document(ceilings: Ceilings = GPU_CEILINGS, M: int = TYPICAL_TOKENS) -> str:
    """The same for blocks."""
    return "\n\n".join(
        [
            f"Predictions, not measurements: {_assumed(ceilings)}, M={M}, by the same rule. This "
            "is the fused block of Llama-3-8B with every projection adapted. Sizes are those of a "
            f"call's first two operands, and calls under {SMALL:.1%} of the total share one line:",
            calls_table(predictions("fused", block_of("llama-3-8b"), M), ceilings),
            "Predicted forward plus backward, divided by that of the frozen block:",
            block_table(MODEL_BLOCKS, M, ceilings),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.floor", description=__doc__)
    parser.add_argument("--tflops", type=float, default=GPU_CEILINGS.flops / 1e12)
    parser.add_argument(
        "--bandwidth", type=float, default=GPU_CEILINGS.bandwidth / 1e12, help="TB/s"
    )
    options = parser.parse_args(arguments)
    ceilings = Ceilings(options.tflops * 1e12, options.bandwidth * 1e12)
    print(layers_document(ceilings), blocks_document(ceilings), sep="\n\n")


if __name__ == "__main__":
    main()
