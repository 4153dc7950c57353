"""Check the cases in processes that may die or hang, and run a memory checker over a few of them.

python -m benchmarks.gpu_check.correctness    a few small cases, for a memory checker to watch

Outputs and workspaces are filled with NaN beforehand. Kernels compile in parallel, and a case that
breaks the device does not affect any other case.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import torch

import fastbound
from benchmarks.gpu_check.cases import Check, LargeCase, cases
from benchmarks.gpu_check.options import Options
from benchmarks.gpu_check.session import Session, answers, tail
from benchmarks.gpu_check.tools import TOOL_CASES, Unavailable
from benchmarks.report.facts import ROOT
from fastbound.performance.isolation import Broken, isolated, stop_group
from fastbound.truth.interpreter import interpreted_bf16, interpreting, poisoned_empty

CASE_SECONDS = 180.0  # after which a case counts as hung
SANITIZER_SECONDS = 150.0


@dataclass(frozen=True)
class Outcome:
    """A case's outcome: ``status`` is "passed", "failed", "skipped" or "not reached".

    ``broken`` says that the device no longer works after the case.
    """

    case: str
    status: str
    seconds: float
    message: str = ""
    broken: bool = False


def examine(case: Check, device: torch.device) -> Outcome:
    """Run a case. Never raises, whatever the case does."""
    start = time.perf_counter()
    status, message = "passed", ""
    try:
        with ExitStack() as scope:
            scope.enter_context(poisoned_empty())
            if interpreting() and device.type == "cpu":
                scope.enter_context(interpreted_bf16())
            case.check(device)
            _synchronise(device)
    except Unavailable as reason:
        status, message = "skipped", str(reason)
    except torch.OutOfMemoryError as error:
        status, message = "skipped", _last_line(error)
    except Exception:
        status = "failed"
        message = tail()
    seconds = time.perf_counter() - start
    return Outcome(str(case), status, seconds, message, broken=not answers(device))


def examine_item(item: tuple[Check, str]) -> Outcome:
    """:func:`examine` a case on the named device, in another process."""
    torch.set_num_threads(1)
    fastbound.set_planning("fixed")  # other processes on the card would distort any timing
    case, device = item
    return examine(case, torch.device(device))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def check_correctness(session: Session, deadline: float) -> None:
    """Check every kernel and the operator against fp64, then a few cases by a memory checker."""
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

    options = session.options
    mode = session.facts.readings.get("compute_mode", "Default")
    if options.workers and mode != "Default":
        session.say(f"correctness: compute mode {mode}, so all cases run in this process")
        options = replace(options, workers=0)
    # The memory checker gets a tenth of the time. Cases that may fill the card run last and alone.
    large = [case for case in everything if type(case) is LargeCase and not options.tiny]
    end = time.monotonic() + 0.9 * _left(deadline)
    _check([case for case in everything if case not in large], options, end, record)
    if large:
        _check(large, replace(options, workers=min(1, options.workers)), end, record)
    reached = {outcome.case for outcome in outcomes}
    late = [case for case in everything if str(case) not in reached]
    outcomes += [Outcome(str(case), "not reached", 0.0) for case in late]
    if late:
        session.say(f"correctness: out of time, {len(late)} cases were not reached")
    store["sanitizer"] = sanitizer(session, deadline)
    save()


def _check(
    everything: Sequence[Check],
    options: Options,
    deadline: float,
    record: Callable[[Outcome], None],
) -> None:
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
    """Run compute-sanitizer's memcheck over a few small cases, if it is installed and works."""
    tool = shutil.which("compute-sanitizer")
    if session.options.device.type != "cuda" or tool is None:
        return {"status": "skipped", "message": "no GPU, or compute-sanitizer is not installed"}
    seconds = min(SANITIZER_SECONDS, _left(deadline))
    session.say(f"compute-sanitizer, at most {seconds:.0f} s")
    # Without the caching allocator every tensor is an allocation with bounds of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", sys.executable, "-m", "benchmarks.gpu_check.correctness"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            output, _ = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"status": "not reached", "message": f"not finished after {seconds:.0f} s"}
        finally:  # the program that it watches as well, which would run on beside every timing
            stop_group(run.pid)
    summary = [line for line in output.splitlines() if "ERROR SUMMARY" in line]
    if not summary:
        return {"status": "skipped", "message": "it could not run: " + output[-500:]}
    if run.returncode or not all("SUMMARY: 0 errors" in line for line in summary):
        session.fail(f"compute-sanitizer: {summary[-1]}")
        return {"status": "failed", "message": output[-6000:]}
    return {"status": "passed", "message": summary[-1]}


def _left(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def main(arguments: Sequence[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watched = [case for case in cases(device, tiny=True) if case not in TOOL_CASES]
    outcomes = [examine(case, device) for case in watched]
    for outcome in outcomes:
        print(outcome.status, outcome.case, outcome.message, flush=True)
    return 1 if any(outcome.status not in ("passed", "skipped") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
