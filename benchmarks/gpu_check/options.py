"""The options of a check, which are parsed before triton is imported, as the device decides how."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report.facts import ROOT

DESCRIPTION = "Everything a machine with a GPU should run, in one command with a time budget."
WEIGHTS = {  # relative shares of the budget
    "correctness": 4.0,
    "ceilings": 0.4,
    "choices": 2.0,
    "benchmark": 4.0,
    "tune": 2.0,
    "profile": 1.5,
    "tiles": 1.5,
}


@dataclass(frozen=True)
class Options:
    """The parsed options; ``workers`` processes check and compile, or with 0 this process does."""

    device: torch.device
    minutes: float
    output: Path
    only: tuple[str, ...]
    workers: int

    @property
    def tiny(self) -> bool:
        return self.device.type == "cpu"


def parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=DESCRIPTION)
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget (default: 9)")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder for the results (default: benchmarks/results)",
    )
    parser.add_argument(
        "--only", default=",".join(WEIGHTS), help="stages to run, comma-separated (default: all)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu"
    )
    parser.add_argument(
        "--workers", type=int, help="number of processes (default: one per CPU, at most 12)"
    )
    options = parser.parse_args(arguments)
    only = tuple(name.strip() for name in options.only.split(",") if name.strip())
    unknown = [name for name in only if name not in WEIGHTS]
    if unknown or not only:
        parser.error(f"--only accepts {', '.join(WEIGHTS)}; got {options.only!r}")
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu runs tiny sizes")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    workers = min(12, os.cpu_count() or 1) if options.workers is None else options.workers
    return Options(device, options.minutes, options.output, only, workers)
