"""Everything a machine with a GPU should run, in one command with a time budget.

    python -m benchmarks.gpu_check [--minutes 9] [--only correctness,ceilings,benchmark,...]

Most important first, stopping at the budget with what there is. The results file is written after
every step, so that a crash loses at most the running one. Exit status 1 if anything failed.
`--device cpu` runs all of it in tiny form through Triton's interpreter: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.report.facts import ROOT, Facts, facts
from fastbound.files import replace_files

if TYPE_CHECKING:
    from benchmarks.gpu_check.ceilings import Measured
    from benchmarks.gpu_check.correctness import Check, Outcome

FORMAT = "fastbound gpu_check 1"
WEIGHTS = {  # of the budget
    "correctness": 4.0,
    "ceilings": 0.4,
    "benchmark": 4.0,
    "tune": 2.0,
    "profile": 1.5,
    "tiles": 1.5,
}
CASE_SECONDS = 180.0  # before a case counts as hung
SANITIZER_SECONDS = 150.0


@dataclass(frozen=True)
class Options:
    """``workers`` processes check and compile; 0: cases run in this process."""

    device: torch.device
    minutes: float
    output: Path
    only: tuple[str, ...]
    workers: int

    @property
    def tiny(self) -> bool:
        return self.device.type == "cpu"


@dataclass
class Session:
    """The results so far, where they are written, and the clock."""

    options: Options
    facts: Facts
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    ceilings: Measured | None = None

    @property
    def path(self) -> Path:
        device = "-".join("".join(c if c.isalnum() else " " for c in self.facts.device).split())
        date = self.facts.date.replace(":", "").rstrip("Z")
        return self.options.output / f"{device.lower()}-{date}-{self.facts.commit}.json"

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"FAILED {text}")

    def save(self) -> None:
        """The whole file anew, never half of it."""
        self.options.output.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "facts": asdict(self.facts),
            "timings_mean_nothing": self.options.tiny,
            "options": {"minutes": self.options.minutes, "only": list(self.options.only)},
            "seconds": time.monotonic() - self.start,
            "failures": self.failures,
            **self.results,
        }
        replace_files({self.path: (json.dumps(content, indent=1) + "\n").encode()})


def correctness(session: Session, deadline: float) -> None:
    """Every kernel and the operator against fp64, then a memory checker on a small case."""
    from benchmarks.gpu_check.correctness import Outcome, cases

    everything = cases(session.options.device, tiny=session.options.tiny)
    outcomes: list[Outcome] = []
    store = session.results["correctness"] = {}

    def record(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.status == "failed":
            session.fail(f"{outcome.case}: {outcome.message}")
        if outcome.status == "failed" or len(outcomes) % 20 == 0:
            session.say(f"correctness: {len(outcomes)} of {len(everything)}")
            save()

    def save() -> None:
        store.update(cases=len(everything), outcomes=[asdict(outcome) for outcome in outcomes])
        session.save()

    # A tenth of the time is the memory checker's.
    _check(everything, session.options, time.monotonic() + 0.9 * _left(deadline), record)
    reached = {outcome.case for outcome in outcomes}
    late = [case for case in everything if str(case) not in reached]
    outcomes += [Outcome(str(case), "not reached", 0.0) for case in late]
    if late:
        session.say(f"correctness: out of time, {len(late)} cases not reached")
    store["sanitizer"] = sanitizer(session, deadline)
    save()


def _check(
    everything: Sequence[Check],
    options: Options,
    deadline: float,
    record: Callable[[Outcome], None],
) -> None:
    from benchmarks.gpu_check.correctness import Outcome, examine, examine_item
    from fastbound.performance.isolation import Broken, isolated

    if options.workers == 0:
        for case in everything:
            if time.monotonic() > deadline:
                return
            record(examine(case, options.device))
        return
    results = isolated(
        examine_item,
        [(case, str(options.device)) for case in everything],
        workers=options.workers,
        deadline=deadline,
        limit=CASE_SECONDS,
        retire=lambda outcome: outcome.broken,
    )
    for index, result in results:
        if isinstance(result, Broken):
            result = Outcome(str(everything[index]), "failed", 0.0, result.message)
        record(result)


def sanitizer(session: Session, deadline: float) -> dict[str, str]:
    """compute-sanitizer's memcheck over a few small cases, where it is installed and works."""
    tool = shutil.which("compute-sanitizer")
    if session.options.device.type != "cuda" or tool is None:
        return {"status": "skipped", "message": "no GPU, or compute-sanitizer is not installed"}
    seconds = min(SANITIZER_SECONDS, _left(deadline))
    session.say(f"compute-sanitizer, at most {seconds:.0f} s")
    # Without the caching allocator every tensor is an allocation of its own, with its own ends.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", sys.executable, "-m", "benchmarks.gpu_check.correctness"]
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"status": "not reached", "message": f"not done after {seconds:.0f} s"}
    output = run.stdout + run.stderr
    summary = [line for line in output.splitlines() if "ERROR SUMMARY" in line]
    if not summary:
        return {"status": "skipped", "message": "it could not run: " + output[-500:]}
    if run.returncode or not all("SUMMARY: 0 errors" in line for line in summary):
        session.fail(f"compute-sanitizer: {summary[-1]}")
        return {"status": "failed", "message": output[-6000:]}
    return {"status": "passed", "message": summary[-1]}


def ceilings(session: Session, deadline: float) -> None:
    """A large copy and a large matrix product."""
    from benchmarks.gpu_check.ceilings import measure_ceilings

    session.ceilings = measure_ceilings(session.options.device, tiny=session.options.tiny)
    session.results["ceilings"] = asdict(session.ceilings)


def benchmark(session: Session, deadline: float) -> None:
    """Layers against their floor and rivals, single kernels, and what a call costs."""
    from benchmarks.gpu_check.stages import benchmark_steps

    store = session.results["benchmark"] = {"rows": [], "kernels": [], "calls": [], "skipped": []}
    _steps(session, "benchmark", benchmark_steps(session), store, deadline)


def tiles(session: Session, deadline: float) -> None:
    """Candidates for every pass."""
    from benchmarks.gpu_check.stages import tile_steps

    store = session.results["tiles"] = {"rows": [], "dropped": []}
    _steps(session, "tiles", tile_steps(session, store, deadline), store, deadline)


def tune(session: Session, deadline: float) -> None:
    """The tuner, into the results."""
    from benchmarks.gpu_check.tool_stages import tuned

    tuned(session, deadline)


def profile(session: Session, deadline: float) -> None:
    """Overhead against sequence length."""
    from benchmarks.gpu_check.tool_stages import profiled

    profiled(session, deadline)


Step = tuple[str, Callable[[], Mapping[str, Sequence[Any]]]]


def _steps(
    session: Session, stage: str, steps: Sequence[Step], store: dict[str, Any], deadline: float
) -> None:
    """Run steps until the deadline; each returns rows for the lists in ``store``."""
    for done, (name, step) in enumerate(steps):
        if time.monotonic() > deadline:
            store["not_reached"] = [later for later, _ in steps[done:]]
            session.say(f"{stage}: out of time, {len(steps) - done} steps not reached")
            break
        session.say(f"{stage}: {name}")
        try:
            found = step()
        except torch.OutOfMemoryError as error:
            store.setdefault("out_of_memory", []).append(f"{name}: {str(error).splitlines()[0]}")
            session.say(f"{name}: out of memory, left out")
        except Exception:
            session.fail(f"{name}: {_tail()}")
        else:
            for key, rows in found.items():
                store[key] += [asdict(row) for row in rows]
        if session.options.device.type == "cuda":
            torch.cuda.empty_cache()
        session.save()


STAGES: Mapping[str, Callable[[Session, float], None]] = {
    "correctness": correctness,
    "ceilings": ceilings,
    "benchmark": benchmark,
    "tune": tune,
    "profile": profile,
    "tiles": tiles,
}


def check(options: Options) -> Session:
    """Run the stages within the budget, each with its share of what is left."""
    from fastbound.truth.interpreter import interpreted_bf16

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
                session.fail(f"{name}: {_tail()}")
            session.save()
    return session


def _left(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def _tail() -> str:
    return "\n".join(traceback.format_exc().strip().splitlines()[-8:])


def parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="budget (default: 9)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", default=",".join(WEIGHTS), help="stages, comma-separated")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--workers", type=int, help="processes (default: one for each CPU, up to 12)"
    )
    options = parser.parse_args(arguments)
    only = tuple(name.strip() for name in options.only.split(",") if name.strip())
    unknown = [name for name in only if name not in WEIGHTS]
    if unknown or not only:
        parser.error(f"--only takes {', '.join(WEIGHTS)}; got {options.only!r}")
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu runs the tiny form")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    workers = min(12, os.cpu_count() or 1) if options.workers is None else options.workers
    return Options(device, options.minutes, options.output, only, workers)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device.type == "cpu":
        # Before anything imports triton, which reads it once.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    session = check(options)
    from benchmarks.report.summary import summary

    print(summary(json.loads(session.path.read_text()), brief=True))
    print(f"written: {session.path}")
    return 1 if session.failures else 0
