"""The flags of `fastbound profile`."""

from __future__ import annotations

import argparse

HELP = "show what adapters cost over the frozen module as sequences grow"
DESCRIPTION = """\
Times forward and backward of one adapted layer, one MLP block or two decoder layers, with
fastbound's adapters and with PEFT's, over the same module without an adapter, at every length. It
prints a table and writes profile.json and profile.png.
"""
EPILOG = """\
On a GPU, caches are cold and the cost of launching kernels is hidden. A length that does not fit
into memory is marked, and the others go on. Compare ratios, on one machine: they are what carries
over.

examples:
  fastbound profile --mode mlp
  fastbound profile --device cpu --tokens 32,64 --rounds 2 --output small
"""
RUN = "fastbound.performance.profiling.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; a default that is None here depends on the device."""
    parser.add_argument(
        "--tokens",
        metavar="RANGE",
        help="sequence lengths: 4096, or 1k,8k, or 1k:128k for all doublings between (default: "
        "1k:128k; on a CPU 128:1k)",
    )
    parser.add_argument(
        "--model-shape",
        metavar="NAME",
        help="the model whose layer sizes are used (default: llama-3-8b; on a CPU gpt-neo-125m)",
    )
    parser.add_argument(
        "--mode",
        default="linear",
        metavar="MODE",
        help="linear: the MLP's layers one by one; mlp: the whole block; step: two decoder layers "
        "(default: linear)",
    )
    parser.add_argument(
        "--rank", type=int, default=16, metavar="N", help="rank of the adapters (default: 16)"
    )
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="bfloat16, float16 or float32 (default: bfloat16; on a CPU float32)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="timings of each variant, interleaved (default: 20; on a CPU 5)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu or cuda (default: auto, a GPU if there is one)",
    )
    parser.add_argument(
        "--output", metavar="DIR", default="profile", help="output folder (default: profile)"
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="also write trace.json, one step of the fused form at the greatest length (default: "
        "no trace)",
    )
