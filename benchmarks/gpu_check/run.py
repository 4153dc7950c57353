"""The stages in order, each with its share of the budget."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.ceilings import measure_ceilings
from benchmarks.gpu_check.choosing import choice_steps
from benchmarks.gpu_check.correctness import check_correctness
from benchmarks.gpu_check.options import WEIGHTS, Options
from benchmarks.gpu_check.session import Session, answers, run_steps, tail
from benchmarks.gpu_check.stages import benchmark_steps, tile_steps
from benchmarks.gpu_check.tool_stages import profiled, tuned
from benchmarks.report.facts import ROOT, facts
from benchmarks.report.page import page
from benchmarks.report.summary import summary
from fastbound.truth.interpreter import interpreted_bf16


def ceilings(session: Session, deadline: float) -> None:
    """Measure the ceilings by a large copy and a large matrix product."""
    session.ceilings = measure_ceilings(session.options.device, tiny=session.options.tiny)
    session.results["ceilings"] = asdict(session.ceilings)


def choices(session: Session, deadline: float) -> None:
    """Record what "auto" chooses on this card at the shapes of the known models."""
    store = session.results["choices"] = {"rows": []}
    run_steps(session, "choices", choice_steps(session), store, deadline)


def benchmark(session: Session, deadline: float) -> None:
    """Time layers against their floor and rivals, single kernels, and the cost of a call."""
    store = session.results["benchmark"] = {"rows": [], "kernels": [], "calls": [], "skipped": []}
    run_steps(session, "benchmark", benchmark_steps(session), store, deadline)


def tiles(session: Session, deadline: float) -> None:
    """Time the tile candidates of every pass."""
    store = session.results["tiles"] = {"rows": [], "dropped": []}
    run_steps(session, "tiles", tile_steps(session, store, deadline), store, deadline)


STAGES: Mapping[str, Callable[[Session, float], None]] = {
    "correctness": check_correctness,
    "ceilings": ceilings,
    "choices": choices,
    "benchmark": benchmark,
    "tune": tuned,
    "profile": profiled,
    "tiles": tiles,
}


def check(options: Options) -> Session:
    """Run the stages within the budget, each with its share of what is left."""
    session = Session(options, facts(options.device))
    session.say(f"{session.facts.device}, torch {torch.__version__}, {session.facts.commit}")
    session.save()
    end = session.start + 60 * options.minutes
    stages = [name for name in STAGES if name in options.only]
    scope: AbstractContextManager[None] = interpreted_bf16() if options.tiny else nullcontext()
    with scope:
        for i, name in enumerate(stages):
            share = WEIGHTS[name] / sum(WEIGHTS[later] for later in stages[i:])
            deadline = time.monotonic() + share * max(0.0, end - time.monotonic())
            if time.monotonic() > end:
                session.results[name] = {"not_reached": True}
                session.say(f"{name}: not reached")
                continue
            session.say(f"{name}: until {deadline - session.start:.0f} s")
            try:
                STAGES[name](session, deadline)
            except Exception:
                session.fail(f"{name}: {tail()}")
            session.save()
            if not answers(options.device):
                _go_on_elsewhere(session, stages[i + 1 :], end)
                break
    return session


def _go_on_elsewhere(session: Session, stages: Sequence[str], end: float) -> None:
    """Run the remaining stages in another process, as this one has lost the device."""
    if not stages:
        return
    session.say(f"the device no longer answers: {', '.join(stages)} in another process")
    options = session.options
    found: dict[str, Any] = {}
    left = f"{max(0.01, (end - time.monotonic()) / 60):.2f}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--output", folder]
        only = ",".join(dict.fromkeys(["ceilings", *stages]))
        command += ["--minutes", left, "--only", only, "--workers", str(options.workers)]
        subprocess.run([*command, "--device", options.device.type], cwd=ROOT, check=False)
        for path in Path(folder).glob("*.json"):
            found = json.loads(path.read_text())
    session.failures += found.get("failures", [])
    session.results.update({name: found.get(name, {"not_reached": True}) for name in stages})
    session.save()


def run(options: Options) -> int:
    """Check, print the summary, write and print the report page; returns 1 if anything failed."""
    session = check(options)
    results = json.loads(session.path.read_text())
    written = session.path.with_suffix(".md")
    written.write_text(page(results), encoding="utf-8")
    print(f"{summary(results, brief=True)}\n\n{page(results)}")
    print(f"written: {session.path} and {written}")
    return 1 if session.failures else 0
