"""`fastbound profile`: what adapters cost over the frozen module as sequences grow."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch

from fastbound.errors import InputError, one_of
from fastbound.files import writing
from fastbound.performance.profiling.profile import (
    ProfilePoint,
    describe_mode,
    profile,
    subjects,
    variants,
    write_trace,
)
from fastbound.performance.profiling.report import TRACE, Profile, flatness, table, write
from fastbound.performance.progress import progress
from fastbound.performance.shapes import parse_tokens
from fastbound.version import versions


def run(arguments: argparse.Namespace) -> int:
    """Profile and print the table. Raises InputError for what cannot be done as asked."""
    device = _device(arguments.device)
    on_gpu = device.type == "cuda"
    dtypes = {str(d)[6:]: d for d in (torch.bfloat16, torch.float16, torch.float32)}
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    model = arguments.model_shape or ("llama-3-8b" if on_gpu else "gpt-neo-125m")
    rounds = (20 if on_gpu else 5) if arguments.rounds is None else arguments.rounds
    one_of("--dtype", dtype, tuple(dtypes))
    if arguments.rank < 1:
        raise InputError(f"--rank must be >= 1, got {arguments.rank}")
    if rounds < 2:
        raise InputError(f"--rounds must be >= 2, got {rounds}")
    output = Path(arguments.output)

    try:
        tokens = parse_tokens(arguments.tokens or ("1k:128k" if on_gpu else "128:1k"))
        chosen = subjects(arguments.mode, model)
    except ValueError as error:
        raise InputError(str(error)) from error

    with writing(output):
        points: list[ProfilePoint] = []
        report = Profile(
            model=model,
            mode=arguments.mode,
            what=describe_mode(arguments.mode),
            device=torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
            dtype=dtype,
            rank=arguments.rank,
            rounds=rounds,
            versions=versions("fastbound", "torch", "peft", "transformers"),
            points=points,
        )
        with progress(len(tokens) * len(chosen), "profiling", "length") as bar:

            def step(doing: str) -> None:
                bar.set_postfix_str(doing, refresh=False)
                bar.update()

            for subject in chosen:
                forms = variants(subject, arguments.rank, dtypes[dtype], device)
                found = profile(subject, forms, tokens, device, rounds=rounds, step=step)
                points += found
                write(report, output)  # so that a later failure loses nothing of this one
                reached = [p.tokens for p in found if p.variant == "fused" and p.median is not None]
                if arguments.trace and subject is chosen[0] and reached:
                    path = output / TRACE
                    write_trace(subject, forms["fused"], max(reached), device, path)
                del forms
        print(f"{report.what}\n\n{table(report)}\n\n{flatness(report)}".rstrip())
        print(f"Written to {output}: profile.json, profile.png")
        broken = [point for point in points if point.broken]
        for each in broken:
            print(f"FAILED {each.variant} at {each.tokens} tokens: {each.failure}", file=sys.stderr)
        return 1 if broken else 0


def _device(name: str) -> torch.device:

    one_of("--device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; --device cpu takes small sizes")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
