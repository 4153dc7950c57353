"""A check stops in time, and what fails in it is recorded and stops nothing else."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from benchmarks.gpu_check import correctness
from benchmarks.gpu_check import run as check_run
from benchmarks.gpu_check import session as check_session
from benchmarks.gpu_check.cases import OperatorCase
from benchmarks.gpu_check.options import WEIGHTS, Options, parse
from benchmarks.gpu_check.session import Session, run_steps
from benchmarks.report.facts import facts

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Planted:
    """A case that does not pass."""

    message: str

    def __str__(self) -> str:
        return "planted"

    def check(self, device: torch.device) -> None:
        raise AssertionError(self.message)


@pytest.mark.interpreted
def test_a_failing_case_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = OperatorCase((2, 16), 16, 2, "fp32")
    everything = [Planted("off by one"), sound]
    monkeypatch.setattr(correctness, "cases", lambda device, tiny: everything)
    arguments = ["--device=cpu", "--workers=0", "--only=correctness", f"--output={tmp_path}"]
    assert check_run.run(parse(arguments)) == 1
    assert "FAILED planted: " in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text())
    first, second = saved["correctness"]["outcomes"]
    assert first["status"] == "failed" and "AssertionError: off by one" in first["message"]
    assert second["status"] == "passed"
    assert len(saved["failures"]) == 1


def test_a_failing_stage_leaves_the_file_and_the_later_stages(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(session: Session, deadline: float) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(check_run, "STAGES", {**check_run.STAGES, "correctness": broken})
    session = check_run.check(replace(options, only=("correctness", "ceilings")))
    assert "no such luck" in session.failures[0]
    saved = json.loads(session.path.read_text())
    assert saved["ceilings"]["bandwidth"] > 0 and len(saved["failures"]) == 1


def test_a_lost_device_ends_its_stage_and_the_later_ones_run_elsewhere(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(session: Session, deadline: float) -> None:
        store = session.results["correctness"] = {"rows": []}
        steps = [(name, lambda: {"rows": []}) for name in ("first", "second", "third")]
        run_steps(session, "correctness", steps, store, deadline)

    working = iter([True, False, False])
    for module in (check_session, check_run):
        monkeypatch.setattr(module, "answers", lambda device: next(working))
    monkeypatch.setattr(check_run, "STAGES", {**check_run.STAGES, "correctness": stage})
    session = check_run.check(replace(options, only=("correctness", "ceilings")))
    saved = json.loads(session.path.read_text())
    assert saved["correctness"]["not_reached"] == ["third"]
    (failure,) = saved["failures"]
    assert "DeviceLostError: the device no longer answers after second" in failure
    assert saved["ceilings"]["bandwidth"] > 0


def test_the_budget_ends_the_run(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Slow:
        number: int

        def check(self, device: torch.device) -> None:
            time.sleep(0.5)

    monkeypatch.setattr(correctness, "cases", lambda device, tiny: [Slow(i) for i in range(100)])
    start = time.monotonic()
    session = check_run.check(replace(options, minutes=1 / 60, only=tuple(WEIGHTS)))
    assert time.monotonic() - start < 20
    saved = json.loads(session.path.read_text())
    statuses = [outcome["status"] for outcome in saved["correctness"]["outcomes"]]
    assert len(statuses) == 100 and statuses[0] == "passed" and statuses[-1] == "not reached"
    assert saved["failures"] == []


def test_out_of_memory_leaves_a_step_out_and_is_no_failure(options: Options) -> None:
    def hungry() -> dict[str, list[Any]]:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate")

    session = Session(options, facts(CPU))
    store: dict[str, Any] = {"rows": []}
    deadline = time.monotonic() + 60
    run_steps(session, "tiles", [("a", hungry), ("b", lambda: {"rows": []})], store, deadline)
    assert store["out_of_memory"] == ["a: out of memory. Tried to allocate"]
    assert session.failures == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only=speed"], "ceilings, choices, benchmark, tune, profile, tiles; got 'speed'"),
        (["--minutes=0"], "--minutes must be positive, got 0"),
        (["--device=cuda"], "torch sees no GPU here"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "cuda" in arguments[0]:
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    assert said in capsys.readouterr().err
