"""The floor of each shape by arithmetic, nothing measured: `python -m benchmarks.static.floor`.

The frozen layer does 2·M·N·K operations forward and as many for dx. A competitor adds passes over
[M, K] and [M, N] tensors; `fastbound.performance.prediction` holds them and predicts their times.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.report.rows import markdown_table
from benchmarks.rivals.cases import CPU_SHAPES, CPU_TOKENS, MODEL_SHAPES
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import (
    RANK,
    STRATEGIES,
    Ceilings,
    adapter_flops,
    gemm_bytes,
    gemm_flops,
    gemm_seconds,
    predicted_ratio,
    saved_bytes,
)
from fastbound.performance.shapes import Shape

TOKENS = (1024, 8192, 32768)
TYPICAL_TOKENS = 8192
GPU = Device("sm_90", 132)  # whose tiles the workspaces are for


def floor_table(
    shapes: Sequence[Shape],
    M: int,
    tokens: Sequence[int],
    ceilings: Ceilings,
    device: Device | None = None,
) -> str:
    """Operations and bytes at M, the floor's time at each of `tokens`, predicted ratios at M."""

    def milliseconds(shape: Shape, M: int) -> str:
        seconds = gemm_seconds(shape, M, ceilings)
        by_memory = seconds > gemm_flops(shape, M) / ceilings.flops
        return f"{seconds * 1e3:.3f}" + (" (memory)" if by_memory else "")

    rivals = [name for name in STRATEGIES if name != "frozen"]
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
                *(
                    f"{predicted_ratio(name, shape, M, ceilings, RANK, device):.2f}"
                    for name in rivals
                ),
            ]
        )
    return markdown_table(head, lines)


def saved_table(shapes: Sequence[Shape], M: int) -> str:
    """MiB kept for backward by one layer."""
    names = [name for name in STRATEGIES if name != "split"]
    lines = [
        [str(shape), *(f"{saved_bytes(name, shape, M) / 2**20:.2f}" for name in names)]
        for shape in shapes
    ]
    return markdown_table(["layer", *names], lines)


def document(ceilings: Ceilings) -> str:
    """Everything `python -m benchmarks.static.floor` prints, as NOTES.md holds it."""
    assumed = f"{ceilings.flops / 1e12:g} TFLOP/s and {ceilings.bandwidth / 1e12:g} TB/s"
    return "\n\n".join(
        [
            f"Arithmetic, not measurement: bf16, r={RANK}, ceilings assumed at {assumed}. GFLOP, "
            f"MB and FLOP/B are of the bare GEMM, forward or dx, at M={TYPICAL_TOKENS}; `adapter` "
            "is the adapter's share of the operations; `ms @ M` the bare GEMM at the ceilings, "
            "all bound by compute unless marked. The last columns predict forward plus backward "
            f"over the frozen layer's at M={TYPICAL_TOKENS}: a pass takes the longer of its "
            "operations and its bytes, none overlaps another, and the workspaces are those of "
            f"{GPU.architecture} tiles on {GPU.multiprocessors} multiprocessors.",
            floor_table(MODEL_SHAPES, TYPICAL_TOKENS, TOKENS, ceilings, GPU),
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.floor", description=__doc__)
    parser.add_argument("--tflops", type=float, default=GPU_CEILINGS.flops / 1e12)
    parser.add_argument(
        "--bandwidth", type=float, default=GPU_CEILINGS.bandwidth / 1e12, help="TB/s"
    )
    options = parser.parse_args(arguments)
    print(document(Ceilings(options.tflops * 1e12, options.bandwidth * 1e12)))


if __name__ == "__main__":
    main()
