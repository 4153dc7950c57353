"""The flags of `fastbound profile`."""

from __future__ import annotations

import argparse

HELP = "show what adapters cost over the frozen module as sequences grow"
DESCRIPTION = """\
Forward and backward of one adapted layer (linear), one MLP block (mlp) or a stack of two decoder
layers (step), fused and by PEFT, over the same module without an adapter, at every length. Prints a
table; profile.json and profile.png go to the output folder.
"""
EPILOG = """\
Caches are cold and launches are hidden on a GPU; what runs out of memory is marked and the rest
goes on. Read ratios: they hold for this machine.
"""
RUN = "fastbound.performance.profiling.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; a default that is None here depends on the device."""
    parser.add_argument(
        "--tokens",
        metavar="RANGE",
        help="lengths: 4096, 1k,8k or 1k:128k for its doublings (default: 1k:128k; CPU 128:1k)",
    )
    parser.add_argument(
        "--model-shape", metavar="NAME", help="sizes (default: llama-3-8b; CPU gpt-neo-125m)"
    )
    parser.add_argument("--mode", default="linear", help="linear, mlp or step (default: linear)")
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="of the adapters (16)")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (bfloat16; CPU float32)")
    parser.add_argument("--rounds", type=int, metavar="N", help="timings each (20; CPU 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--output", metavar="DIR", default="profile", help="folder (profile)")
    parser.add_argument(
        "--trace", action="store_true", help="also trace.json: a step of the fused form, longest"
    )
