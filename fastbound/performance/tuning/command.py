"""`fastbound tune`: measure this machine's GPU and write the table that dispatch reads."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch

from fastbound.dispatch.device import describe
from fastbound.dispatch.plan import MAX_TRITON_RANK
from fastbound.dispatch.tables import software, user_folder
from fastbound.errors import InputError, one_of
from fastbound.files import writing
from fastbound.performance.prediction import datasheet_of
from fastbound.performance.progress import progress
from fastbound.performance.shapes import Block, Shape, block_of, linear_shapes, parse_tokens
from fastbound.performance.tuning.bench import DeviceBench
from fastbound.performance.tuning.candidates import Machine, points
from fastbound.performance.tuning.tune import start_table, tune


def run(arguments: argparse.Namespace) -> int:
    """Tune; returns 1 if a shape failed. Raises InputError for what cannot be done as asked."""
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
    one_of("--dtype", arguments.dtype, ("bfloat16", "float16"))
    if not arguments.budget_minutes > 0:
        raise InputError(f"--budget-minutes must be positive, got {arguments.budget_minutes}")
    _require_gpu()

    device = torch.device("cuda", torch.cuda.current_device())
    described = describe(device)
    name = torch.cuda.get_device_name(device)
    machine = Machine(described, name, datasheet_of(name), software())
    path = _output(arguments.output, described.architecture)
    with writing(path.parent, f".{path.name}.lock"):
        try:
            table = start_table(path, machine, resume=arguments.resume)
        except (OSError, ValueError) as error:
            raise InputError(str(error)) from error
        todo = points(shapes, tokens, ranks)
        dtype = getattr(torch, arguments.dtype)
        print(
            f"{name}: {len(todo)} shapes, at most {arguments.budget_minutes:g} minutes, into {path}"
        )
        with progress(sum(point.steps for point in todo), "tuning", "step") as bar:

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


def _output(given: str | None, architecture: str) -> Path:
    if given is not None:
        return Path(given)
    folder = user_folder()
    if folder is None:
        raise InputError("no home folder is known for the table: give --output")
    return folder / f"{architecture}.json"


def _ranks(text: str) -> list[int]:

    ranks = [part.strip() for part in text.split(",")]
    if not all(r.isascii() and r.isdigit() and 1 <= int(r) <= MAX_TRITON_RANK for r in ranks):
        raise ValueError(f"--ranks {text!r}: give whole numbers from 1 to {MAX_TRITON_RANK}")
    return list(dict.fromkeys(int(r) for r in ranks))


def _require_gpu() -> None:

    missing = [] if torch.cuda.is_available() else ["a GPU that torch sees (CUDA or ROCm)"]
    if importlib.util.find_spec("triton") is None:
        missing.append("the package triton")
    if missing:
        raise InputError(
            f"tuning times kernels, and needs {' and '.join(missing)}: run it on the machine that "
            "will train. Without a table the default plans are used"
        )
