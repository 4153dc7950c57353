"""`fastbound tune`: measure this machine's GPU and write the table that dispatch reads."""

from __future__ import annotations

import argparse
from pathlib import Path

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
        type=Path,
        metavar="FILE",
        help="table to write (default: ~/.cache/fastbound/plans/<architecture>.json)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the table at --output")


def run(arguments: argparse.Namespace) -> int:
    """1 where a shape failed; raises InputError for what cannot be done as asked."""
    from fastbound.errors import InputError
    from fastbound.performance.shapes import Block, Shape, block_of, linear_shapes, parse_tokens

    try:
        names = [name.strip() for name in arguments.shapes.split(",") if name.strip()]
        shapes: list[Shape | Block] = []
        for name in names:
            shapes += [*linear_shapes(name), block_of(name)]
        tokens = parse_tokens(arguments.tokens)
        ranks = _ranks(arguments.ranks)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not shapes:
        raise InputError("--shapes names no model")
    if arguments.dtype not in ("bfloat16", "float16"):
        raise InputError(f"--dtype is bfloat16 or float16, got {arguments.dtype!r}")
    if not arguments.budget_minutes > 0:
        raise InputError(f"--budget-minutes must be positive, got {arguments.budget_minutes}")
    _require_gpu()

    import torch
    from tqdm import tqdm

    from fastbound.dispatch.device import describe
    from fastbound.dispatch.tables import software, user_folder
    from fastbound.performance.prediction import datasheet_of
    from fastbound.performance.tuning.bench import DeviceBench
    from fastbound.performance.tuning.candidates import Machine, points
    from fastbound.performance.tuning.tune import start_table, tune

    device = torch.device("cuda", torch.cuda.current_device())
    described = describe(device)
    name = torch.cuda.get_device_name(device)
    machine = Machine(described, name, datasheet_of(name), software())
    path = arguments.output or user_folder() / f"{described.architecture}.json"
    try:
        table = start_table(path, machine, resume=arguments.resume)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    todo = points(shapes, tokens, ranks)
    dtype = getattr(torch, arguments.dtype)
    print(f"{name}: {len(todo)} shapes, at most {arguments.budget_minutes:g} minutes, into {path}")
    with tqdm(total=sum(point.steps for point in todo), unit="step") as bar:

        def step(doing: str) -> None:
            bar.set_postfix_str(doing, refresh=False)
            bar.update()

        bench = DeviceBench(device, described, dtype, say=bar.write)
        tuned = tune(
            todo,
            bench,
            machine,
            table,
            path,
            minutes=arguments.budget_minutes,
            dtype=dtype,
            step=step,
        )
    for failure in tuned.failures:
        print(f"FAILED {failure}")
    entries = len(tuned.table.entries) + len(tuned.table.blocks)
    print(f"{entries} entries in {path}" if entries else "nothing measured, nothing written")
    if tuned.not_reached:
        print(f"{len(tuned.not_reached)} shapes not reached: --resume goes on with them")
    return 1 if tuned.failures else 0


def _ranks(text: str) -> list[int]:
    from fastbound.dispatch.plan import MAX_TRITON_RANK

    ranks = [part.strip() for part in text.split(",")]
    if not all(r.isascii() and r.isdigit() and 1 <= int(r) <= MAX_TRITON_RANK for r in ranks):
        raise ValueError(f"--ranks {text!r}: give whole numbers from 1 to {MAX_TRITON_RANK}")
    return list(dict.fromkeys(int(r) for r in ranks))


def _require_gpu() -> None:
    import importlib.util

    import torch

    from fastbound.errors import InputError

    missing = [] if torch.cuda.is_available() else ["a GPU that torch sees (CUDA or ROCm)"]
    if importlib.util.find_spec("triton") is None:
        missing.append("the package triton")
    if missing:
        raise InputError(
            f"tuning times kernels, and needs {' and '.join(missing)}: run it on the machine that "
            "will train. Without a table the default plans are used"
        )
