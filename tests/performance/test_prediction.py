"""The time model: sums of passes at the ceilings, and its printing beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="workspaces are those of Triton's tiles")

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.report import __main__ as report
from benchmarks.report.readme import read_checks, readme_section
from benchmarks.static import model
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import (
    BF16,
    DATASHEET,
    STRATEGIES,
    Ceilings,
    gemm_flops,
    gemm_seconds,
    layer_passes,
    predicted_ratio,
    predicted_seconds,
    traffic,
)
from fastbound.performance.shapes import MODEL_SHAPES, Shape

HOPPER = Device("sm_90", 132)
LLAMA = next(shape for shape in MODEL_SHAPES if shape.model == "llama-3-8b")
M = 8192


@given(
    name=st.sampled_from(STRATEGIES),
    device=st.sampled_from([None, HOPPER, Device("sm_80", 1), Device("gfx942", 304)]),
    M=st.integers(1, 10**6),
    N=st.integers(1, 300_000),
    K=st.integers(1, 300_000),
    rank=st.integers(1, 64),
)
def test_any_shape_has_a_time_at_or_above_the_floor(
    name: str, device: Device | None, M: int, N: int, K: int, rank: int
) -> None:
    shape = Shape("m", "p", K, N)
    for ceilings in DATASHEET.values():
        ratio = predicted_ratio(name, shape, M, ceilings, rank, device)
        assert 1 <= ratio < float("inf")


def test_a_layer_takes_the_sum_of_its_passes() -> None:
    ceilings = Ceilings(flops=1e12, bandwidth=1e9)
    for name in STRATEGIES:
        passes = layer_passes(name, LLAMA, M, device=HOPPER)
        whole = predicted_seconds(name, LLAMA, M, ceilings, device=HOPPER)
        assert whole == sum(one.seconds(ceilings) for one in passes)
    assert predicted_seconds("frozen", LLAMA, M, ceilings) == 2 * gemm_seconds(LLAMA, M, ceilings)


def test_a_pass_takes_the_longer_of_operations_and_bytes() -> None:
    (first, *_) = layer_passes("fused", LLAMA, M)
    assert (first.name, first.nbytes) == ("S", BF16 * M * LLAMA.K)
    assert first.flops == 2 * M * 16 * LLAMA.K
    by_memory, by_compute = Ceilings(1e30, 1.0), Ceilings(1.0, 1e30)
    assert (first.seconds(by_memory), first.bound_by(by_memory)) == (first.nbytes, "memory")
    assert (first.seconds(by_compute), first.bound_by(by_compute)) == (first.flops, "compute")


def test_every_strategy_does_the_same_arithmetic() -> None:
    """The frozen products, and six thin ones: the adapter's."""
    thin = 2 * M * 16 * (LLAMA.K + LLAMA.N)
    for name in STRATEGIES:
        flops = sum(one.flops for one in layer_passes(name, LLAMA, M))
        adapter = 0 if name == "frozen" else 3 * thin
        assert flops == 2 * gemm_flops(LLAMA, M) + adapter, name


def test_workspaces_are_read_and_written_by_fused_and_split_alone() -> None:
    for name in STRATEGIES:
        with_parts, without = (
            sum(one.nbytes for one in layer_passes(name, LLAMA, M, device=device))
            for device in (HOPPER, None)
        )
        assert (with_parts > without) is (name in ("fused", "split"))


def test_fewer_passes_predict_less_time() -> None:
    for ceilings in DATASHEET.values():
        ratios = [predicted_ratio(name, LLAMA, M, ceilings) for name in STRATEGIES]
        assert ratios == sorted(ratios)
    assert traffic("fused")["backward", "N"] < traffic("addmm")["backward", "N"]


# Invented for this test: no card gave these figures.
FACTS = {
    "device": "an invented card",
    "architecture": "sm_90",
    "multiprocessors": 132,
    "commit": "abc1234",
    "date": "2026-01-02T03:04:05Z",
    "versions": {"torch": "2.13"},
    "readings": {"driver_version": "1.2"},
}


def row(competitor: str, median: float, projection: str = "gate_up") -> dict[str, Any]:
    return {
        "model": "llama-3-8b",
        "projection": projection,
        "M": 8192,
        "K": 4096,
        "N": 14336,
        "rank": 16,
        "dtype": "bfloat16",
        "direction": "forward+backward",
        "competitor": competitor,
        "path": "",
        "saved_bytes": 2**20,
        "peak_bytes": 2**21,
        "median": median,
        "q1": 0.99 * median,
        "q3": 1.01 * median,
        "min": median,
        "rounds": 20,
    }


RESULTS = {
    "format": "fastbound gpu_check 1",
    "facts": FACTS,
    "timings_mean_nothing": False,
    "failures": [],
    "ceilings": {"flops": 7e14, "bandwidth": 4e12, "matmul_size": 8192},
    "benchmark": {
        "rows": [
            row("frozen", 0.002),
            row("fused", 0.0021),
            row("peft_fp32", 0.0036),
            row("frozen", 0.008, "mlp"),
            row("fused", 0.0076, "mlp"),
        ],
        "kernels": [],
    },
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps(RESULTS))
    return folder


def test_predictions_stand_beside_what_was_measured(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert model.main([str(results)]) == 0
    printed = capsys.readouterr().out
    assert "an invented card, abc1234: measured ceilings 700 TFLOP/s, 4.00 TB/s" in printed
    predicted = predicted_ratio("fused", LLAMA, M, Ceilings(7e14, 4e12), device=HOPPER)
    assert f"{predicted:.3f} / 1.050" in printed
    line = next(line for line in printed.splitlines() if line.startswith("| llama-3-8b.mlp"))
    assert "/ 0.950" not in line  # at 1024 tokens nothing was measured
    assert "/ 0.950" in printed
    assert (
        f"{1.8 / predicted_ratio('peft_fp32', LLAMA, M, Ceilings(7e14, 4e12)) - 1:+.1%}" in printed
    )


def test_without_measurements_it_says_so_and_predicts_from_a_datasheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "RESULTS", tmp_path / "none")
    assert model.main(["--gpu", "a100-80gb"]) == 0
    printed = capsys.readouterr()
    assert "Nothing measured: no usable file of gpu_check in" in printed.out
    assert "a100-80gb: ceilings of its datasheet, 312 TFLOP/s" in printed.out
    assert printed.err == ""
    for shape in MODEL_SHAPES:
        assert f"| {shape} " in printed.out


def test_files_that_cannot_be_used_are_named(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "cpu.json").write_text(json.dumps({**RESULTS, "timings_mean_nothing": True}))
    (results / "other.json").write_text('{"format": "other"}')
    (results / "half.json").write_text('{"format": ')
    (results / "bare.json").write_text(json.dumps({**RESULTS, "ceilings": {}}))
    assert model.main([str(results)]) == 2
    error = capsys.readouterr().err
    assert "cpu.json left out: its times mean nothing" in error
    assert "other.json left out: format 'other'" in error
    assert "half.json left out: cannot be read as JSON" in error
    assert "bare.json left out: its ceilings were not measured" in error


def test_a_folder_of_checks_becomes_the_tables_of_the_readme(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "notes.json").write_text("[]")
    older = {**RESULTS, "facts": {**FACTS, "date": "2025-01-01T00:00:00Z", "device": "an old card"}}
    (results / "zzz.json").write_text(json.dumps(older))
    assert report.main([str(results), "--output", str(tmp_path)]) == 0
    assert "notes.json left out" in capsys.readouterr().err
    text = (tmp_path / "gpu.md").read_text()
    assert text.index("### an old card") < text.index("### an invented card")
    assert "2026-01-02, commit abc1234, torch 2.13, driver 1.2." in text
    flat = " ".join(text.split())
    assert "| llama-3-8b.gate_up | 8192 | 2.000 | 1.050 | 1.800 | 1.71 |" in flat
    assert "| llama-3-8b.mlp | 8192 | 8.000 | 0.950 | - |" in flat
    assert "| **fastbound, fused** | 2.100 ms | 2.0% | 1.050 | 1.714 | 1.00 MiB | 2.0 MiB |" in flat
    assert "Interpreted" not in text


def test_times_of_a_cpu_are_marked_and_failures_counted() -> None:
    text = readme_section({**RESULTS, "timings_mean_nothing": True, "failures": ["a", "b"]})
    assert "**Interpreted on a CPU" in text and "2 failures in all" in text


def test_a_folder_without_checks_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no file of gpu_check" in capsys.readouterr().err
    assert read_checks([tmp_path]) == ({}, {})
