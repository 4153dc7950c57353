"""The check for a machine with a GPU, in tiny form on a CPU: it runs, judges and stops in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from fastbound.kernels.tiles import GemmTile

from benchmarks.gpu_check import correctness, stages
from benchmarks.gpu_check import session as gpu_check
from benchmarks.gpu_check.correctness import GemmCase, OperatorCase, TallCase, examine
from benchmarks.report import compare, facts
from benchmarks.report import rows as report
from benchmarks.report.summary import summary
from benchmarks.rivals.calls import measure_calls
from fastbound.dispatch.device import Device
from fastbound.performance.block_passes import BLOCK_PASSES
from fastbound.performance.isolation import Broken, isolated
from fastbound.performance.passes import PASSES, default_candidate
from fastbound.performance.tuning import sweep as tile_sweep
from fastbound.performance.tuning.candidates import candidates
from tests.support.plans import planned

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The whole of it as a user would start it; what it printed, and its file."""
    output = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device=cpu", "--workers=1"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [*command, "--minutes=5", f"--output={output}"],
        cwd=repository,
        env={**environment, "OMP_NUM_THREADS": "1", "FASTBOUND_COMMIT": "abc1234"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (path,) = output.glob("*-abc1234.json")
    return result.stdout, path


@pytest.mark.slow
def test_runs_every_stage_and_says_that_its_times_mean_nothing(run: tuple[str, Path]) -> None:
    printed, path = run
    saved = json.loads(path.read_text())
    assert saved["failures"] == []
    assert saved["timings_mean_nothing"] and "times above mean nothing" in printed
    outcomes = saved["correctness"]["outcomes"]
    assert len(outcomes) == saved["correctness"]["cases"] == len(correctness.cases(CPU, tiny=True))
    assert {outcome["status"] for outcome in outcomes} == {"passed"}
    assert saved["ceilings"]["bandwidth"] > 0 and saved["ceilings"]["flops"] > 0
    taking_part = {"layer": set(), "mlp": set()}
    for row in saved["benchmark"]["rows"]:
        taking_part["mlp" if row["projection"] == "mlp" else "layer"].add(row["competitor"])
    shared = {"frozen", "fused", "peft_fp32", "peft_bf16"}
    assert taking_part == {"layer": shared | {"addmm"}, "mlp": shared | {"per_layer"}}
    assert {row["kernel"] for row in saved["benchmark"]["kernels"]} >= {
        *("thin", "reduce dy", "activate", "activate backward")
    }
    assert {row["how"] for row in saved["benchmark"]["calls"]} == {"host"}
    swept = {(row["name"], row["candidate"]) for row in saved["tiles"]["rows"]}
    dropped = {(row["name"], row["candidate"]) for row in saved["tiles"]["dropped"]}
    assert len({name for name, _ in swept}) == 5
    assert len(swept - {(name, "cuBLAS") for name, _ in swept}) + len(dropped) == 10
    assert saved["facts"]["commit"] == "abc1234"
    assert {(e["N"], e["K"], e["M"]) for e in saved["tune"]["table"]["entries"]} == {(192, 64, 32)}
    assert {(b["form"], b["N"], b["M"]) for b in saved["tune"]["table"]["blocks"]} == {
        ("gated silu", 160, 32),
        ("plain gelu_tanh", 160, 32),
    }
    profiled = {one["points"][0]["place"]: one for one in saved["profile"]["reports"]}
    assert list(profiled) == ["mlp", "c_fc", "c_proj"]
    for one in profiled.values():
        assert {point["tokens"] for point in one["points"]} == {32, 64}
        assert one["flatness"] in printed


@pytest.mark.slow
def test_the_summary_ends_the_output(run: tuple[str, Path]) -> None:
    printed, path = run
    saved = json.loads(path.read_text())
    text = summary(saved, brief=True)
    assert "| forward |" in " ".join(summary(saved).split())
    assert "| forward |" not in " ".join(text.split())
    assert printed.endswith(f"{text}\nwritten: {path}\n")


@pytest.mark.slow
def test_compare_reads_its_file(
    run: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = run
    assert compare.main([str(path), str(path)]) == 0
    saved = json.loads(path.read_text())
    fused = next(row for row in saved["benchmark"]["rows"] if row["competitor"] == "fused")
    for name in ("median", "q1", "q3"):
        fused[name] *= 100
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps(saved))
    capsys.readouterr()
    assert compare.main([str(path), str(worse)]) == 1
    assert capsys.readouterr().out.count("WORSE") == 1
    assert compare.main([str(worse), str(path)]) == 0
    point = next(p for p in saved["profile"]["reports"][0]["points"] if p["variant"] == "fused")
    point["over_floor"] *= 100
    worse.write_text(json.dumps(saved))
    capsys.readouterr()
    assert compare.main([str(path), str(worse)]) == 1
    assert capsys.readouterr().out.count("WORSE") == 2


@pytest.mark.slow
def test_its_tables_for_the_readme_are_marked_as_a_cpu_s(
    run: tuple[str, Path], tmp_path: Path
) -> None:
    _, path = run
    assert report.main([str(path.parent), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "**Interpreted on a CPU" in text and "commit abc1234" in text
    saved = json.loads(path.read_text())
    medians = {
        (row["projection"], row["competitor"]): row["median"]
        for row in saved["benchmark"]["rows"]
        if row["direction"] == "forward+backward"
    }
    for (projection, competitor), median in medians.items():
        assert f"{median / medians[projection, 'frozen']:.3f}" in text, (projection, competitor)
    for profiled in saved["profile"]["reports"]:
        for point in profiled["points"]:
            assert f"{point['over_floor']:.3f}" in text or point["variant"] == "frozen"


def options(tmp_path: Path, **changes: Any) -> gpu_check.Options:
    base = gpu_check.Options(CPU, 1.0, tmp_path, ("correctness",), workers=0)
    return replace(base, **changes)


@dataclass(frozen=True)
class Planted:
    """A case that does not pass."""

    message: str

    def __str__(self) -> str:
        return "planted"

    def check(self, device: torch.device) -> None:
        raise AssertionError(self.message)


def test_a_failing_case_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = OperatorCase((2, 16), 16, 2, "fp32")
    everything = [Planted("off by one"), sound]
    monkeypatch.setattr(correctness, "cases", lambda device, tiny: everything)
    arguments = ["--device=cpu", "--workers=0", "--only=correctness", f"--output={tmp_path}"]
    assert gpu_check.main(arguments) == 1
    assert "FAILED planted: " in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text())
    first, second = saved["correctness"]["outcomes"]
    assert first["status"] == "failed" and "AssertionError: off by one" in first["message"]
    assert second["status"] == "passed"
    assert len(saved["failures"]) == 1


def test_a_failing_stage_leaves_the_file_and_the_later_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(session: gpu_check.Session, deadline: float) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(gpu_check, "STAGES", {**gpu_check.STAGES, "correctness": broken})
    session = gpu_check.check(options(tmp_path, only=("correctness", "ceilings")))
    assert "no such luck" in session.failures[0]
    saved = json.loads(session.path.read_text())
    assert saved["ceilings"]["bandwidth"] > 0 and len(saved["failures"]) == 1


def test_the_budget_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Slow:
        number: int

        def check(self, device: torch.device) -> None:
            time.sleep(0.5)

    monkeypatch.setattr(correctness, "cases", lambda device, tiny: [Slow(i) for i in range(100)])
    start = time.monotonic()
    session = gpu_check.check(options(tmp_path, minutes=1 / 60, only=tuple(gpu_check.WEIGHTS)))
    assert time.monotonic() - start < 20
    saved = json.loads(session.path.read_text())
    statuses = [outcome["status"] for outcome in saved["correctness"]["outcomes"]]
    assert len(statuses) == 100 and statuses[0] == "passed" and statuses[-1] == "not reached"
    assert saved["failures"] == []


def test_out_of_memory_leaves_a_step_out_and_is_no_failure(tmp_path: Path) -> None:
    def hungry() -> dict[str, list[Any]]:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate")

    session = gpu_check.Session(options(tmp_path), facts.facts(CPU))
    store: dict[str, Any] = {"rows": []}
    deadline = time.monotonic() + 60
    gpu_check._steps(
        session, "tiles", [("a", hungry), ("b", lambda: {"rows": []})], store, deadline
    )
    assert store["out_of_memory"] == ["a: out of memory. Tried to allocate"]
    assert session.failures == []


def test_work_in_processes_survives_death_hanging_and_errors() -> None:
    dies, hangs = "__import__('os')._exit(7)", "__import__('time').sleep(600)"
    items = ["1 + 1", "1 / 0", dies, "2 + 2", hangs, "3 + 3"]
    deadline = time.monotonic() + 120
    found = dict(isolated(eval, items, workers=2, deadline=deadline, limit=3))
    assert [found[i] for i in (0, 3, 5)] == [2, 4, 6]
    assert found[1] == Broken("ZeroDivisionError: division by zero")
    assert found[2] == Broken("the process died with exit code 7")
    assert found[4] == Broken("no result after 3 s")


def test_work_in_processes_ends_at_the_deadline() -> None:
    start = time.monotonic()
    hangs = ["__import__('time').sleep(600)"] * 3
    assert not list(isolated(eval, hangs, workers=2, deadline=start + 1, limit=600))
    assert time.monotonic() - start < 30


def test_a_case_names_an_unwritten_or_a_wrong_element(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbound.kernels import lowrank_gemm

    case = GemmCase(33, 48, 64, 16, "fp32", GemmTile(32, 32, 32, 4, 2), transposed=False)
    assert examine(case, CPU).status == "passed"
    original = lowrank_gemm.launch_lowrank_gemm

    def cut(X, W, S, F, bias, Y, *rest):
        return original(X[:-1], W, S[:-1], F, bias, Y[:-1], *rest)

    monkeypatch.setattr(lowrank_gemm, "launch_lowrank_gemm", cut)
    outcome = examine(case, CPU)
    assert outcome.status == "failed" and "an element was not written" in outcome.message


def test_the_cases_of_a_gpu_cover_what_they_must() -> None:
    everything = correctness.cases(CPU)
    assert len({str(case) for case in everything}) == len(everything)
    operator = [case for case in everything if isinstance(case, OperatorCase)]
    assert {(case.dtype, case.rank) for case in operator} >= {
        (dtype, rank) for dtype in ("fp32", "fp16", "bf16") for rank in (1, 3, 8, 16, 24, 64)
    }
    assert {case.backend for case in operator} == {"fused", "split"}
    forms = {(c.tile.descriptors, c.transposed) for c in everything if isinstance(c, GemmCase)}
    assert forms == {(a, b) for a in (True, False) for b in (True, False)}
    assert any(isinstance(case, TallCase) for case in everything)
    large = [case for case in everything if isinstance(case, correctness.LargeCase)]
    assert all(case.M * max(case.N, case.K) > 2**31 for case in large)


def test_the_first_candidate_of_a_sweep_is_the_default_and_none_is_there_twice() -> None:
    chosen = planned(Device("sm_90", 132), 8192, 14336, 4096, 16, torch.bfloat16, "fused").tiles
    assert chosen is not None
    for name in (*PASSES, *BLOCK_PASSES):
        found = candidates(name, chosen)
        assert found[0] == default_candidate(name, chosen)
        assert len({str(candidate) for candidate in found}) == len(found) > 10


def test_a_candidate_with_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbound.kernels.tiles import Tile

    from fastbound.performance.passes import Candidate, make_operands, thin

    shape = stages.SMOKE_SHAPES[0]
    o = make_operands(shape, 32, 4, torch.float32, CPU, 4)
    right, wrong = Candidate(Tile(32, 32, 4, 2)), Candidate(Tile(16, 32, 4, 2))

    def build(o: Any, candidate: Any) -> Any:
        if candidate is wrong:
            o = replace(o, x=o.x * 2)
        return thin(o, candidate)

    monkeypatch.setitem(PASSES, "thin", build)
    rows, dropped = tile_sweep.sweep("thin", o, shape, [right, wrong], CPU, rounds=2)
    assert [row.candidate for row in rows] == [str(right)]
    assert "off the default tile's result" in dropped[0].reason


def test_a_call_that_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.rivals import calls
    from benchmarks.rivals.layer import Competitor

    def broken(problem: Any) -> Any:
        raise RuntimeError("not here")

    frozen = next(c for c in calls.COMPETITORS if c.name == "frozen")
    monkeypatch.setattr(calls, "COMPETITORS", (frozen, Competitor("fused", broken)))
    case = stages.Case(stages.SMOKE_SHAPES[0], 8, "float32", 4)
    rows, failures = measure_calls(case, CPU, rounds=2)
    assert [row.competitor for row in rows] == ["frozen"]
    assert failures[0].competitor == "fused" and "not here" in failures[0].message


def row(competitor: str, median: float, spread: float = 0.0) -> dict[str, Any]:
    info = {"model": "m", "projection": "p", "M": 1, "K": 2, "N": 3, "rank": 4}
    info |= {"dtype": "bfloat16", "direction": "forward", "competitor": competitor}
    stats = {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread)}
    return {
        **info,
        "path": "",
        "saved_bytes": 0,
        "peak_bytes": None,
        **stats,
        "min": 1,
        "rounds": 3,
    }


def pytest_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As pytest-benchmark saves it."""
    stats = ("median", "q1", "q3", "min", "rounds")
    benchmarks = [
        {
            "extra_info": {k: v for k, v in r.items() if k not in stats},
            "stats": {k: v for k, v in r.items() if k in stats},
        }
        for r in rows
    ]
    saved = {"machine_info": {"fastbound": {"device": "d"}}, "commit_info": {}}
    path.write_text(json.dumps({**saved, "benchmarks": benchmarks}))
    return path


@pytest.mark.parametrize(
    ("slower", "spread", "status"),
    [(1.02, 0.0, 0), (1.04, 0.0, 1), (1.04, 0.02, 0), (1.06, 0.02, 1), (0.5, 0.0, 0)],
)
def test_worse_means_more_than_three_per_cent_beyond_the_spread(
    tmp_path: Path, slower: float, spread: float, status: int
) -> None:
    """The spread here is that of the competitor alone: half its interquartile range."""
    before = pytest_json(tmp_path / "a.json", [row("frozen", 1.0), row("fused", 1.1)])
    after = [row("frozen", 2.0), row("fused", 2.2 * slower, spread)]  # another clock, same ratio
    assert compare.main([str(before), str(pytest_json(tmp_path / "b.json", after))]) == status


def test_files_that_cannot_be_compared_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = pytest_json(tmp_path / "good.json", [row("frozen", 1.0), row("fused", 1.1)])
    other = [{**r, "M": 2} for r in (row("frozen", 1.0), row("fused", 1.1))]
    apart = pytest_json(tmp_path / "apart.json", other)
    alone = pytest_json(tmp_path / "alone.json", [row("fused", 1.1)])
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for path, said in (
        (apart, "no ratio in common"),
        (alone, "alone.json holds no ratio"),
        (damaged, "damaged.json cannot be read as JSON"),
        (tmp_path / "none.json", "none.json cannot be read"),
    ):
        assert compare.main([str(good), str(path)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prints", "exit_code", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("========= ERROR SUMMARY: 2 errors", 0, "failed"),
        ("========= ERROR SUMMARY: 0 errors", 1, "failed"),  # a case did not pass under it
        ("========= Error: Device not supported", 255, "skipped"),
    ],
)
def test_the_memory_checker_is_judged_by_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, exit_code: int, status: str
) -> None:
    """A stand-in for the tool: what it prints is all that is known of it."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{prints}'\nexit {exit_code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    on_gpu = options(tmp_path, device=torch.device("cuda"))
    session = gpu_check.Session(on_gpu, facts.facts(CPU))
    assert gpu_check.sanitizer(session, time.monotonic() + 60)["status"] == status
    assert bool(session.failures) == (status == "failed")


def test_readings_are_those_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1.2, 345 MHz, 3201 MHz, 1980 MHz, 70 W, 700 W, 30'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    read = facts.readings(torch.device("cuda", 0))
    assert (read["driver_version"], read["clocks.sm"]) == ("1.2", "345 MHz")
    assert read["temperature.gpu"] == "30"
    assert facts.readings(CPU) == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only=speed"], "ceilings, benchmark, tune, profile, tiles; got 'speed'"),
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
        gpu_check.parse(arguments)
    assert said in capsys.readouterr().err


def test_the_commit_comes_from_the_environment_git_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTBOUND_COMMIT", raising=False)
    assert facts.commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("fedcba9\n")
    assert facts.commit(tmp_path) == "fedcba9"
    monkeypatch.setenv("FASTBOUND_COMMIT", "abc1234")
    assert facts.commit(tmp_path) == "abc1234"
