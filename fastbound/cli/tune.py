"""The flags of `fastbound tune`."""

from __future__ import annotations

import argparse

HELP = "measure this machine's GPU and write its table of plans"
DESCRIPTION = """\
Times tiles and strategies of bounded layers, and tiles of whole MLP blocks, on the GPU, most useful
shapes first, until the budget ends, and writes the best of each into a table. Every process started
afterwards looks its plans up there: fastbound.explain prints from where a plan came.
"""
EPILOG = """\
A table elsewhere than in its default place is only read once it is moved there. Leave the GPU to
the tuner while it runs.
"""
RUN = "fastbound.performance.tuning.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--shapes",
        metavar="NAMES",
        default="llama-3-8b,llama-2-7b,phi-1.5,gpt-neo-125m",
        help="models whose MLP projections and blocks are measured, with commas between "
        "(default: all known)",
    )
    parser.add_argument(
        "--tokens",
        metavar="RANGE",
        default="1024:32768",
        help="rows of x: 4096, 1k,8k or 1k:32k for its doublings (default: 1024:32768)",
    )
    parser.add_argument(
        "--ranks",
        metavar="N,N",
        default="16,32",
        help="ranks, rounded up to 16, 32 or 64; blocks look up twice theirs (default: 16,32)",
    )
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float16 (bfloat16)")
    parser.add_argument(
        "--budget-minutes", type=float, default=8.0, metavar="X", help="stop after (default: 8)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="table to write (default: ~/.cache/fastbound/plans/<architecture>.json)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the table at --output")
