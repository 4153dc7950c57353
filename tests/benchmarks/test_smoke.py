"""The whole suite runs at tiny sizes, holds every competitor, and its report renders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.report import __main__ as report
from benchmarks.report.rows import read
from benchmarks.rivals.cases import block_cases

pytestmark = pytest.mark.slow  # minutes; rivals/ measures every competitor in seconds

# What a CPU without a GPU leaves out, and where there is no compiler `compiled` as well.
ALWAYS = {"frozen", "fused", "addmm", "peft_fp32", "peft_bf16"}


@pytest.fixture(scope="module")
def smoke_json(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of one smoke run of the whole suite, as a user would start it.

    FASTBOUND_SMOKE_RUN names that of a run on one thread that has been made already.
    """
    made = os.environ.get("FASTBOUND_SMOKE_RUN")
    if made is not None:
        return Path(made)
    path = tmp_path_factory.mktemp("benchmarks") / "smoke.json"
    # pytest-benchmark measures nothing under xdist, whose variables a run of these tests may have.
    environment = {
        k: v
        for k, v in os.environ.items()
        if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")
    }
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--smoke"]
    run = subprocess.run(
        [*command, "--device=cpu", f"--benchmark-json={path}", "-p", "no:cacheprovider"],
        cwd=repository,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ratios, from medians of interleaved rounds" in run.stdout
    return path


def test_smoke_run_holds_every_competitor_and_the_facts(smoke_json: Path) -> None:
    saved = json.loads(smoke_json.read_text())
    tests: dict[tuple[Any, ...], set[str]] = {}
    for bench in saved["benchmarks"]:
        if not bench["fullname"].startswith("benchmarks/bench_linear.py"):
            continue
        info = bench["extra_info"]
        tests.setdefault((info["M"], info["direction"]), set()).add(info["competitor"])
        assert bench["stats"]["rounds"] == len(bench["stats"]["data"]) == 3
        assert bench["group"].endswith(info["direction"])
    assert set(tests) == {(M, d) for M in (32, 64) for d in ("forward", "forward+backward")}
    for competitors in tests.values():
        assert competitors - {"compiled"} == ALWAYS
    facts = saved["machine_info"]["fastbound"]
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == 1
    assert {"device", "driver", "triton", "peft", "version"} <= facts.keys()


def test_smoke_run_holds_every_competitor_of_both_blocks(smoke_json: Path) -> None:
    saved = json.loads(smoke_json.read_text())
    found: dict[str, set[str]] = {}
    for bench in saved["benchmarks"]:
        if bench["fullname"].startswith("benchmarks/bench_mlp.py"):
            found.setdefault(bench["group"], set()).add(bench["extra_info"]["competitor"])
    assert set(found) == {
        f"{case} {direction}"
        for case in block_cases("cpu", smoke=True)
        for direction in ("forward", "forward+backward")
    }
    for competitors in found.values():
        assert competitors - {"compiled"} == ALWAYS - {"addmm"} | {"per_layer"}


def test_report_renders_from_a_saved_run(smoke_json: Path, tmp_path: Path) -> None:
    report.main([str(smoke_json), "--output", str(tmp_path)])
    name = smoke_json.stem
    text = (tmp_path / f"{name}.md").read_text()
    _, rows = read(smoke_json)
    for row in rows:
        assert f"{row.median * 1e3:.3f}" in text
    for picture in (f"{name}-time.png", f"{name}-saved.png"):
        assert f"({picture})" in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
