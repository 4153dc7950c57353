"""Predicted time of each pass of a block: `python -m benchmarks.static.block_floor`.

A pass takes the larger of its operations over the compute ceiling and its bytes over the bandwidth
ceiling; passes follow one another and nothing overlaps. Launches and the factors' own bytes are
left out. The tall tensors' passes are those that traffic.py counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.report.rows import markdown_table
from benchmarks.rivals.cases import MODEL_BLOCKS, Block
from benchmarks.static.floor import GPU, GPU_CEILINGS, TYPICAL_TOKENS
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import BF16, RANK, Ceilings, Pass

# Passes outside the GEMMs over [M, K] and [M, N] in bf16, forward and backward together, of a gated
# block and of a plain one; tests/test_traffic.py counts them.
TALL_PASSES = {
    "frozen": {True: (3, 14), False: (0, 5)},
    "fused": {True: (3, 8), False: (3, 5)},
    "per_layer": {True: (8, 18), False: (3, 8)},
    "peft_bf16": {True: (25, 40), False: (16, 21)},
    "peft_fp32": {True: (61, 85), False: (43, 48)},
}


def gemm(name: str, block: Block, M: int, count: int, rank: int) -> Pass:
    """`count` GEMMs between [M, K] and [M, N], each operand moved once, low-rank term included."""
    flops = 2 * M * block.N * (block.K + rank)
    nbytes = BF16 * (M * block.K + block.N * block.K + M * block.N)
    return Pass(name, count * flops, count * nbytes)


def fused_passes(block: Block, M: int, rank: int = RANK, device: Device = GPU) -> list[Pass]:
    """The fused block, forward and backward; its workspaces are written once and read once."""
    from benchmarks.static.traffic import block_workspaces

    K, N, first = block.K, block.N, 2 if block.gated else 1
    parts = block_workspaces(M, block, rank, device.architecture, device.multiprocessors)
    down = 2 * (parts["down: dS parts"] + parts["down: dB parts"])
    activation = 2 * (parts["activation: dS parts"] + parts["activation: dB and dA parts"])
    x, h = BF16 * M * K, BF16 * M * N
    thin_K, thin_N = 2 * M * K * rank, 2 * M * N * rank
    names = "gate, up" if block.gated else "up"
    reads, writes = (3, 2) if block.gated else (2, 1)
    return [
        Pass(f"S of {names}", first * thin_K, x),
        gemm(f"{names}: GEMM", block, M, first, rank),
        Pass("act, S of down", thin_N, reads * h),
        gemm("down: GEMM", block, M, 1, rank),
        Pass("dS, dB of down", 2 * thin_K, x + down),
        gemm("dact: GEMM", block, M, 1, rank),
        Pass(f"dg, du; dS, dB of {names}; dA of down" if block.gated else
             f"dg; dS, dB of {names}; dA of down",
             (2 * first + 1) * thin_N, (reads + writes) * h + activation),
        gemm("dx: GEMM", block, M, first, rank),
        Pass(f"dA of {names}", first * thin_K, x + 2 * parts["dA parts"]),
    ]  # fmt: skip


def seconds(name: str, block: Block, M: int, ceilings: Ceilings, device: Device = GPU) -> float:
    """Forward and backward of one competitor."""
    if name == "fused":
        return sum(one.seconds(ceilings) for one in fused_passes(block, M, device=device))
    gemms = gemm("", block, M, 6 if block.gated else 4, 0 if name == "frozen" else RANK)
    over_K, over_N = TALL_PASSES[name][block.gated]
    extra = BF16 * M * (over_K * block.K + over_N * block.N)
    return gemms.seconds(ceilings) + extra / ceilings.bandwidth


def passes_table(block: Block, M: int, ceilings: Ceilings) -> str:
    """Operations, bytes and predicted milliseconds of every pass of the fused block."""
    lines = []
    passes = fused_passes(block, M)
    for one in passes:
        milliseconds = f"{one.seconds(ceilings) * 1e3:.3f}"
        lines.append(
            [
                one.name,
                f"{one.flops / 1e9:.1f}",
                f"{one.nbytes / 1e6:.0f}",
                milliseconds,
                one.bound_by(ceilings),
            ]
        )
    total = sum(one.seconds(ceilings) for one in passes)
    flops, nbytes = sum(p.flops for p in passes), sum(p.nbytes for p in passes)
    together = ["together", f"{flops / 1e9:.1f}", f"{nbytes / 1e6:.0f}", f"{total * 1e3:.3f}", ""]
    head = ["pass", "GFLOP", "MB", "predicted ms", "bound by"]
    return markdown_table(head, [*lines, together])


def ratio_table(M: int, ceilings: Ceilings) -> str:
    """Predicted forward plus backward of every block, over the frozen block's."""
    rivals = [name for name in TALL_PASSES if name != "frozen"]
    head = ["block", "frozen ms", *rivals, "peft_bf16 / fused", "peft_fp32 / fused"]
    lines = []
    for block in MODEL_BLOCKS:
        found = {name: seconds(name, block, M, ceilings) for name in TALL_PASSES}
        ratios = [f"{found[name] / found['frozen']:.2f}" for name in rivals]
        over = [f"{found[name] / found['fused']:.2f}" for name in ("peft_bf16", "peft_fp32")]
        lines.append([str(block), f"{found['frozen'] * 1e3:.3f}", *ratios, *over])
    return markdown_table(head, lines)


def document(ceilings: Ceilings, M: int = TYPICAL_TOKENS) -> str:
    """Everything `python -m benchmarks.static.block_floor` prints, as NOTES.md holds it."""
    llama = next(block for block in MODEL_BLOCKS if block.model == "llama-3-8b")
    return "\n\n".join(
        [
            f"Predicted arithmetic, not measurement: bf16, r={RANK}, M={M}, ceilings assumed at "
            f"{ceilings.flops / 1e12:g} TFLOP/s and {ceilings.bandwidth / 1e12:g} TB/s, every pass "
            f"exposed, workspaces of {GPU.architecture} tiles on {GPU.multiprocessors} "
            "multiprocessors. The fused block of Llama-3-8B, every projection adapted:",
            passes_table(llama, M, ceilings),
            "Predicted forward plus backward, over the frozen block's:",
            ratio_table(M, ceilings),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.block_floor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tflops", type=float, default=GPU_CEILINGS.flops / 1e12)
    parser.add_argument(
        "--bandwidth", type=float, default=GPU_CEILINGS.bandwidth / 1e12, help="TB/s"
    )
    options = parser.parse_args(arguments)
    print(document(Ceilings(options.tflops * 1e12, options.bandwidth * 1e12)))


if __name__ == "__main__":
    main()
