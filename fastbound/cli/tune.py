"""The flags of `fastbound tune`."""

from __future__ import annotations

import argparse

HELP = "measure this machine's GPU and write its table of plans"
DESCRIPTION = """\
Times tiles and strategies of bounded layers, and tiles of whole MLP blocks, on this machine's GPU,
the most useful shapes first, until the budget is spent, and writes the best of each into a table.
Every process that starts afterwards takes its plans from there; fastbound.explain prints where a
plan came from.
"""
EPILOG = """\
A table at another place than the default one is read only after it has been moved there. Run
nothing else on the GPU meanwhile.

examples:
  fastbound tune
  fastbound tune --shapes llama-3-8b --tokens 1k:8k --ranks 16 --budget-minutes 3
"""
RUN = "fastbound.performance.tuning.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--shapes",
        metavar="NAMES",
        default="llama-3-8b,llama-2-7b,phi-1.5,gpt-neo-125m",
        help="the models whose MLP layers and blocks are measured, separated by commas (default: "
        "llama-3-8b, llama-2-7b, phi-1.5 and gpt-neo-125m, which are all it knows)",
    )
    parser.add_argument(
        "--tokens",
        metavar="RANGE",
        default="1024:32768",
        help="rows of x: 4096, or 1k,8k, or 1k:32k for all doublings between (default: 1024:32768)",
    )
    parser.add_argument(
        "--ranks",
        metavar="N,N",
        default="16,32",
        help="ranks, each rounded up to 16, 32 or 64; a block's plans are those of twice its rank "
        "(default: 16,32)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="DTYPE",
        help="bfloat16 or float16 (default: bfloat16)",
    )
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=8.0,
        metavar="X",
        help="stop after this many minutes (default: 8)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the table to write (default: ~/.cache/fastbound/plans/<architecture>.json)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the table at --output (default: refuse a table that exists)",
    )
