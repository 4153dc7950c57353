"""The floor of each shape by arithmetic, nothing measured: `python -m benchmarks.floor`.

The frozen layer does 2·M·N·K operations forward and as many for dx. A competitor adds passes over
[M, K] and [M, N] tensors; TRAFFIC counts them, in bytes per element, from what each one executes.
Predicted time: the larger of operations over the compute ceiling and the GEMM's bytes over the
bandwidth ceiling, plus the extra bytes over the bandwidth ceiling as if nothing overlapped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases import CPU_SHAPES, CPU_TOKENS, MODEL_SHAPES, Shape
from benchmarks.report import markdown_table

BF16 = 2
RANK = 16
TOKENS = (1024, 8192, 32768)
TYPICAL_TOKENS = 8192


@dataclass(frozen=True)
class Traffic:
    """Bytes a competitor moves beyond the floor, per element of [M, K] and of [M, N]."""

    forward_K: int
    forward_N: int
    backward_K: int
    backward_N: int
    saved_K: int  # bytes kept for backward, per element of [M, K] ...
    saved_r: int  # ... and per element of [M, r]


# For bf16 x and W. PEFT in fp32, forward: x cast (2+4), read (4); B's product written (4), scaled
# (4+4), added (2+4+4), cast (4+2). Its backward: dy cast twice (6+6), scaled (8), read twice (8);
# fp32 dx written (4), cast (6), added (6), x read (4).
TRAFFIC = {
    "frozen": Traffic(0, 0, 0, 0, 0, 0),
    "fused": Traffic(2, 0, 2, 2, 2, 2),
    "split": Traffic(2, 4, 6, 2, 2, 2),
    "addmm": Traffic(2, 4, 6, 4, 2, 2),
    "peft_bf16": Traffic(2, 12, 10, 8, 2, 2),
    "peft_fp32": Traffic(10, 28, 20, 28, 4, 4),
}


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: operations per second in a large GEMM, bytes per second."""

    flops: float
    bandwidth: float


def gemm_flops(shape: Shape, M: int) -> int:
    """Operations of x Wᵀ, and of dy W: 2·M·N·K."""
    return 2 * M * shape.N * shape.K


def gemm_bytes(shape: Shape, M: int, itemsize: int = BF16) -> int:
    """Bytes of x, W and y, each moved once."""
    return itemsize * (M * shape.K + shape.N * shape.K + M * shape.N)


def adapter_flops(shape: Shape, M: int, rank: int = RANK) -> int:
    """Operations the adapter adds: two thin products forward, four backward."""
    return 6 * M * rank * (shape.K + shape.N)


def gemm_seconds(shape: Shape, M: int, ceilings: Ceilings) -> float:
    """The bare GEMM, forward or dx, at the ceilings."""
    return max(gemm_flops(shape, M) / ceilings.flops, gemm_bytes(shape, M) / ceilings.bandwidth)


def predicted_ratio(name: str, shape: Shape, M: int, ceilings: Ceilings) -> float:
    """Forward plus backward of a competitor over that of the frozen layer."""
    traffic = TRAFFIC[name]
    extra = M * shape.K * (traffic.forward_K + traffic.backward_K)
    extra += M * shape.N * (traffic.forward_N + traffic.backward_N)
    floor = 2 * gemm_seconds(shape, M, ceilings)
    return (floor + extra / ceilings.bandwidth) / floor


def saved_bytes(name: str, shape: Shape, M: int, rank: int = RANK) -> int:
    """Bytes kept for backward on bf16 x, x itself included, tensors of a weight's size left out."""
    return M * (TRAFFIC[name].saved_K * shape.K + TRAFFIC[name].saved_r * rank)


def floor_table(shapes: Sequence[Shape], M: int, tokens: Sequence[int], ceilings: Ceilings) -> str:
    """Operations and bytes at M, the floor's time at each of `tokens`, predicted ratios at M."""

    def milliseconds(shape: Shape, M: int) -> str:
        seconds = gemm_seconds(shape, M, ceilings)
        by_memory = seconds > gemm_flops(shape, M) / ceilings.flops
        return f"{seconds * 1e3:.3f}" + (" (memory)" if by_memory else "")

    rivals = [name for name in TRAFFIC if name != "frozen"]
    times = [f"ms @ {count}" for count in tokens]
    head = ["layer", "K->N", "GFLOP", "MB", "FLOP/B", "adapter", *times, *rivals]
    lines = []
    for shape in shapes:
        flops, moved = gemm_flops(shape, M), gemm_bytes(shape, M)
        lines.append(
            [
                str(shape),
                f"{shape.K}->{shape.N}",
                f"{flops / 1e9:.1f}",
                f"{moved / 1e6:.0f}",
                f"{flops / moved:.0f}",
                f"{adapter_flops(shape, M) / (2 * flops):.2%}",
                *(milliseconds(shape, count) for count in tokens),
                *(f"{predicted_ratio(name, shape, M, ceilings):.2f}" for name in rivals),
            ]
        )
    return markdown_table(head, lines)


def saved_table(shapes: Sequence[Shape], M: int) -> str:
    """MiB kept for backward by one layer."""
    names = [name for name in TRAFFIC if name != "split"]
    lines = [
        [str(shape), *(f"{saved_bytes(name, shape, M) / 2**20:.2f}" for name in names)]
        for shape in shapes
    ]
    return markdown_table(["layer", *names], lines)


def document(ceilings: Ceilings) -> str:
    """Everything `python -m benchmarks.floor` prints, as NOTES.md holds it."""
    assumed = f"{ceilings.flops / 1e12:g} TFLOP/s and {ceilings.bandwidth / 1e12:g} TB/s"
    return "\n\n".join(
        [
            f"Arithmetic, not measurement: bf16, r={RANK}, ceilings assumed at {assumed}. GFLOP, "
            f"MB and FLOP/B are of the bare GEMM, forward or dx, at M={TYPICAL_TOKENS}; `adapter` "
            "is the adapter's share of the operations; `ms @ M` the bare GEMM at the ceilings, "
            "all bound by compute unless marked. The last columns predict forward plus backward "
            f"over the frozen layer's at M={TYPICAL_TOKENS}, every extra pass over memory exposed; "
            "while the GEMM is bound by compute they are the same for any M.",
            floor_table(MODEL_SHAPES, TYPICAL_TOKENS, TOKENS, ceilings),
            f"The CPU's cases, at {CPU_CEILINGS.flops / 1e9:g} GFLOP/s and "
            f"{CPU_CEILINGS.bandwidth / 1e9:g} GB/s, assumed for two cores:",
            floor_table(CPU_SHAPES, CPU_TOKENS[0], CPU_TOKENS, CPU_CEILINGS),
            f"MiB kept for backward by one layer at M={TYPICAL_TOKENS} (`split` as `fused`):",
            saved_table(MODEL_SHAPES, TYPICAL_TOKENS),
        ]
    )


GPU_CEILINGS = Ceilings(700e12, 4.3e12)
CPU_CEILINGS = Ceilings(400e9, 20e9)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__)
    parser.add_argument("--tflops", type=float, default=GPU_CEILINGS.flops / 1e12)
    parser.add_argument(
        "--bandwidth", type=float, default=GPU_CEILINGS.bandwidth / 1e12, help="TB/s"
    )
    options = parser.parse_args(arguments)
    print(document(Ceilings(options.tflops * 1e12, options.bandwidth * 1e12)))


if __name__ == "__main__":
    main()
