"""The check for a machine with a GPU, in tiny form on a CPU: whole, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from benchmarks.gpu_check.cases import cases
from benchmarks.report import __main__ as report
from benchmarks.report import compare
from benchmarks.report.page import page
from benchmarks.report.summary import summary

pytestmark = pytest.mark.slow  # minutes; the stages have quick tests of their own beside this
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The whole of it as a user would start it; what it printed, and its file."""
    output = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device=cpu", "--workers=1"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [*command, "--minutes=7", f"--output={output}"],
        cwd=repository,
        env={**environment, "OMP_NUM_THREADS": "1", "FASTBOUND_COMMIT": "abc1234"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (path,) = output.glob("*-abc1234.json")
    return result.stdout, path


def test_runs_every_stage_and_says_that_its_times_mean_nothing(run: tuple[str, Path]) -> None:
    printed, path = run
    saved = json.loads(path.read_text())
    assert saved["failures"] == []
    assert saved["timings_mean_nothing"] and "times above mean nothing" in printed
    outcomes = saved["correctness"]["outcomes"]
    assert len(outcomes) == saved["correctness"]["cases"] == len(cases(CPU, tiny=True))
    statuses = {outcome["case"]: outcome["status"] for outcome in outcomes}
    assert statuses.pop("CUDA graph") == "skipped" and set(statuses.values()) == {"passed"}
    assert saved["ceilings"]["bandwidth"] > 0 and saved["ceilings"]["flops"] > 0
    taking_part = {"layer": set(), "mlp": set()}
    for row in saved["benchmark"]["rows"]:
        taking_part["mlp" if row["projection"] == "mlp" else "layer"].add(row["competitor"])
    assert {(row["part"], row["strategy"]) for row in saved["choices"]["rows"]} >= {
        *(("forward", "torch"), ("backward", "torch"))
    }
    whole = [row for row in saved["choices"]["rows"] if row["part"] == "whole"]
    assert [row["strategy"] in ("block", "layers") for row in whole] == [True]
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


def test_a_page_for_a_reader_ends_the_output(run: tuple[str, Path]) -> None:
    printed, path = run
    saved = json.loads(path.read_text())
    text = summary(saved, brief=True)
    assert "| forward |" in " ".join(summary(saved).split())
    assert "| forward |" not in " ".join(text.split())
    written = path.with_suffix(".md")
    assert printed.endswith(f"{text}\n\n{page(saved)}\nwritten: {path} and {written}\n")
    assert written.read_text() == page(saved)


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
