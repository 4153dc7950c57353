"""`fastbound profile`: what adapters cost over the frozen module as sequences grow."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path("profile"), help="folder (profile)"
    )
    parser.add_argument(
        "--trace", action="store_true", help="also trace.json: a step of the fused form, longest"
    )


def run(arguments: argparse.Namespace) -> int:
    """Raises InputError for what cannot be done as asked."""
    import torch

    from fastbound.errors import InputError
    from fastbound.performance.shapes import parse_tokens

    device = _device(arguments.device)
    on_gpu = device.type == "cuda"
    dtypes = {str(d)[6:]: d for d in (torch.bfloat16, torch.float16, torch.float32)}
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    model = arguments.model_shape or ("llama-3-8b" if on_gpu else "gpt-neo-125m")
    rounds = (20 if on_gpu else 5) if arguments.rounds is None else arguments.rounds
    if dtype not in dtypes:
        raise InputError(f"--dtype is one of {', '.join(dtypes)}, got {dtype!r}")
    if arguments.rank < 1:
        raise InputError(f"--rank must be >= 1, got {arguments.rank}")
    if rounds < 2:
        raise InputError(f"--rounds must be >= 2, got {rounds}")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise InputError(f"--output {arguments.output} is a file: name a folder")

    from fastbound.performance.profiling.profile import describe_mode, subjects

    try:
        tokens = parse_tokens(arguments.tokens or ("1k:128k" if on_gpu else "128:1k"))
        chosen = subjects(arguments.mode, model)
    except ValueError as error:
        raise InputError(str(error)) from error

    from tqdm import tqdm

    from fastbound.performance.profiling.profile import profile, variants, write_trace
    from fastbound.performance.profiling.report import TRACE, Profile, flatness, table, write
    from fastbound.version import versions

    points = []
    with tqdm(total=len(tokens) * len(chosen), unit="length") as bar:

        def step(doing: str) -> None:
            bar.set_postfix_str(doing, refresh=False)
            bar.update()

        for subject in chosen:
            forms = variants(subject, arguments.rank, dtypes[dtype], device)
            found = profile(subject, forms, tokens, device, rounds=rounds, step=step)
            points += found
            reached = [p.tokens for p in found if p.variant == "fused" and p.median is not None]
            if arguments.trace and subject is chosen[0] and reached:
                arguments.output.mkdir(parents=True, exist_ok=True)
                path = arguments.output / TRACE
                write_trace(subject, forms["fused"], max(reached), device, path)
            del forms
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
    write(report, arguments.output)
    print(f"{report.what}\n\n{table(report)}\n\n{flatness(report)}".rstrip())
    print(f"Written to {arguments.output}: profile.json, profile.png")
    return 0


def _device(name: str) -> torch.device:
    import torch

    from fastbound.errors import InputError

    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device is auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; --device cpu takes small sizes")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
