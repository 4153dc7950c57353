"""The product form's memory, counted, and its predicted time.

    python -m benchmarks.static.product_form [--gpu h200]

The largest workspaces are those of recorded calls over meta tensors. The peak of a training step is
counted from all allocations of a small model on the CPU. Times are predictions; none is measured. A
call takes the longer of its operations and its bytes. The two kernels that compute sines are also
limited by the instructions of their lanes, which no matrix unit runs: per element, r for ω·B A and
`SINE` for the sine.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from fastbound.kernels.launch import Launch
from transformers import LlamaConfig, LlamaForCausalLM

import fastbound
from benchmarks.report.rows import MIB, markdown_table
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import DATASHEET, RANK, kernel_name, prediction_of
from fastbound.performance.recorder import Call, Directions, layer_calls
from fastbound.performance.shapes import Shape, linear_shapes

TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
HOPPER = Device("sm_90", 132)
SINE = 30  # instructions per element for reduction, polynomials and selection, compiled for sm_90
# Lanes of all multiprocessors times the datasheet's boost clock: fp32 instructions per second.
LANES = {
    "a100-80gb": 108 * 64 * 1.41e9,
    "h100": 132 * 128 * 1.83e9,
    "h200": 132 * 128 * 1.83e9,
    "4090": 128 * 128 * 2.52e9,
}
SINES = ("product: adapt", "product: contract")
CLOSE = 0.03  # the share of the frozen layer's forward that computing W + ΔW may take
PLAIN_BYTES = 12  # bytes per element of W that the plain formula saves: angle, sine and W + ΔW


def calls_of(shape: Shape, M: int) -> Directions:
    """The calls of a layer in the product form, in bf16 at M rows."""
    sizes = (M, shape.N, shape.K, RANK)
    return layer_calls(HOPPER, *sizes, torch.bfloat16, backend="split", form="product")


def largest_workspace(shape: Shape, M: int = 8192) -> int:
    """The bytes of the largest part of W + ΔW, or of dyᵀ x, that exists at a time."""
    made = [one for one in calls_of(shape, M).launches if kernel_name(one) in SINES]
    given = [dict(zip(one.kernel.arg_names, one.arguments, strict=False)) for one in made]
    return max(each[name].nbytes for each in given for name in ("OUT", "G") if name in each)


def memory_table(shapes: Sequence[Shape]) -> str:
    """Memory of the weight's size per layer: by the plain formula under autograd, and here."""
    lines = [
        [
            str(shape),
            f"{shape.N * shape.K * PLAIN_BYTES / MIB:.0f}",
            "0",
            f"{largest_workspace(shape) / MIB:.0f}",
        ]
        for shape in shapes
    ]
    return markdown_table(
        ["layer", "plain formula saves, MiB", "saved here", "largest workspace, MiB"], lines
    )


def predicted(call: Call, gpu: str) -> float:
    """The predicted seconds of one call."""
    least = prediction_of(call).seconds(DATASHEET[gpu])
    if not isinstance(call, Launch) or kernel_name(call) not in SINES:
        return least
    given = dict(zip(call.kernel.arg_names, call.arguments, strict=False))
    return max(least, given["N"] * given["K"] * (given["rank"] + SINE) / LANES[gpu])


def making(shape: Shape, gpu: str) -> float:
    """The seconds to compute W + ΔW once, which do not depend on the number of rows."""
    return sum(predicted(c, gpu) for c in calls_of(shape, 1024).forward if isinstance(c, Launch))


def gemm(shape: Shape, M: int, gpu: str) -> float:
    """The seconds of the frozen layer's forward."""
    ceilings = DATASHEET[gpu]
    nbytes = 2 * (M * shape.K + M * shape.N + shape.N * shape.K)
    return max(2 * M * shape.N * shape.K / ceilings.flops, nbytes / ceilings.bandwidth)


def crossover(shape: Shape, gpu: str) -> int:
    """The fewest rows at which computing W + ΔW takes at most `CLOSE` of the forward's GEMM."""
    limit = making(shape, gpu) / CLOSE
    return bisect_left(range(1, 2**24), limit, key=lambda M: gemm(shape, M, gpu)) + 1


def time_table(shapes: Sequence[Shape], tokens: Sequence[int], gpu: str) -> str:
    """Forward plus backward, divided by that of the layer trained whole, which is three GEMMs."""

    def ratio(shape: Shape, M: int) -> float:
        calls: list[Call] = [*calls_of(shape, M).forward, *calls_of(shape, M).backward]
        return sum(predicted(call, gpu) for call in calls) / (3 * gemm(shape, M, gpu))

    lines = [
        [
            str(shape),
            *(f"{ratio(shape, M):.3f}" for M in tokens),
            f"{making(shape, gpu) * 1e3:.3f}",
            str(crossover(shape, gpu)),
        ]
        for shape in shapes
    ]
    head = ["layer", *map(str, tokens), "W + ΔW, ms", f"rows from which that is {CLOSE:.0%}"]
    return markdown_table(head, lines)


def step_peak(tokens: int = 256, **how: Any) -> int:
    """The peak bytes that a training step of a 4-layer Llama allocates, without the weights.

    The model is in fp32 with K=1024, N=2816 and rank 16; ``how`` goes to `fastbound.inject`.
    PyTorch's profiler counts the allocations.
    """
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fastbound.inject(model, RANK, form="product", bound="2*rms", **how)
    row = torch.arange(tokens)[None] % config.vocab_size

    def step() -> None:
        model(input_ids=row, labels=row).loss.backward()
        model.zero_grad(set_to_none=True)

    step()  # allocates caches that stay, which are not part of the step
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events: Any = profile.profiler.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in moves))


def peaks_table() -> str:
    """The peak of a step with fused blocks, layer by layer, and by the formula under autograd."""
    ways: dict[str, dict[str, Any]] = {
        "fused blocks": {},
        "layer by layer": {"fuse_mlp": False},
        "plain formula": {"fuse_mlp": False, "backend": "reference"},
    }
    lines = [[name, f"{step_peak(**how) / MIB:.0f}"] for name, how in ways.items()]
    return markdown_table(["4-layer Llama, fp32, 256 tokens", "peak of a step, MiB"], lines)


def document(gpu: str = "h200") -> str:
    ceilings, shapes = DATASHEET[gpu], linear_shapes("llama-3-8b")
    stated = f"{ceilings.flops / 1e12:g} TFLOP/s, {ceilings.bandwidth / 1e12:g} TB/s"
    return "\n\n".join(
        [
            f"Counted: bf16, r={RANK}.",
            memory_table(shapes),
            peaks_table(),
            f"Predicted, not measured: {gpu} at its datasheet's {stated}; forward plus backward "
            "divided by that of the same layer with its whole weight trained, by number of rows:",
            time_table(shapes, TOKENS, gpu),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.product_form", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--gpu", choices=LANES, default="h200", help="GPU of the datasheet (h200)")
    print(document(parser.parse_args(arguments).gpu))


if __name__ == "__main__":
    main()
