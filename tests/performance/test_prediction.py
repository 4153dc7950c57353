"""Predicted times: sums over the recorded calls, and their printing beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="workspaces are those of Triton's tiles")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.report import __main__ as report
from benchmarks.report.readme import read_checks, readme_section
from benchmarks.static import predictions
from benchmarks.static.recorded import BLOCK_RIVALS, LAYER_RIVALS, calls_of, ratio
from benchmarks.static.recorded import predictions as predicted
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import (
    BF16,
    DATASHEET,
    FP32,
    Ceilings,
    Prediction,
    operands,
    prediction_of,
    seconds,
)
from fastbound.performance.recorder import Operation
from fastbound.performance.shapes import MODEL_SHAPES, Block, Shape

HOPPER = Device("sm_90", 132)
LLAMA = next(shape for shape in MODEL_SHAPES if shape.model == "llama-3-8b")
NAMES = ("frozen", *LAYER_RIVALS, "torch")
M, RANK = 8192, 16


@settings(deadline=None)  # the first call of all imports PEFT, which takes seconds
@given(
    name=st.sampled_from(NAMES),
    device=st.sampled_from([HOPPER, Device("sm_80", 1), Device("gfx942", 304)]),
    M=st.integers(1, 10**6),
    N=st.integers(1, 300_000),
    K=st.integers(1, 300_000),
    rank=st.integers(1, 64),
)
def test_any_shape_has_a_time_at_or_above_the_floor(
    name: str, device: Device, M: int, N: int, K: int, rank: int
) -> None:
    shape = Shape("m", "p", K, N)
    for ceilings in DATASHEET.values():
        assert 1 <= ratio(name, shape, M, ceilings, rank, device) < float("inf")


def test_a_layer_takes_the_sum_of_its_calls() -> None:
    ceilings = Ceilings(flops=1e12, bandwidth=1e9)
    gemm, dx = predicted("frozen", LLAMA, M)
    frozen = seconds((gemm, dx), ceilings)
    assert frozen == 2 * gemm.seconds(ceilings)
    for name in NAMES:
        whole = sum(one.seconds(ceilings) for one in predicted(name, LLAMA, M))
        assert ratio(name, LLAMA, M, ceilings) == whole / frozen


def test_a_call_takes_the_longer_of_operations_and_bytes() -> None:
    _, thin, *_ = predicted("fused", LLAMA, M)
    assert thin.name == f"thin [{M}, {LLAMA.K}] [{LLAMA.K}, {RANK}]"
    assert thin.flops == 2 * M * RANK * LLAMA.K
    # x, sin(ωA) and S
    assert thin.nbytes == BF16 * (M * LLAMA.K + RANK * LLAMA.K + M * RANK)
    by_memory, by_compute = Ceilings(1e30, 1.0), Ceilings(1.0, 1e30)
    assert (thin.seconds(by_memory), thin.bound_by(by_memory)) == (thin.nbytes, "memory")
    assert (thin.seconds(by_compute), thin.bound_by(by_compute)) == (thin.flops, "compute")
    one = Prediction("", flops=6, nbytes=8)
    assert one.seconds(Ceilings(1.0, 1.0)) == 8
    assert one.seconds(Ceilings(0.5, 1.0)) == 12


def test_a_tensor_that_is_added_onto_is_read_and_written() -> None:
    x, w = (torch.empty(*size, device="meta", dtype=torch.bfloat16) for size in ((6, 4), (4, 8)))
    y = torch.empty(6, 8, device="meta", dtype=torch.bfloat16)
    product = Operation("mm", (("self", x), ("mat2", w)), (("out", y),))
    onto = Operation("addmm_", (("self", y), *product.read), (("self", y),))
    assert prediction_of(product) == ("mm [6, 4] [4, 8]", 2 * 6 * 4 * 8, BF16 * (24 + 32 + 48))
    assert prediction_of(onto)[1:] == (2 * 6 * 4 * 8, BF16 * (24 + 32 + 2 * 48))
    view = Operation("mul", (("self", x), ("other", x.t())), (("out", x),))
    assert prediction_of(view).nbytes == BF16 * 2 * 24


@pytest.mark.parametrize("name", NAMES)
def test_every_competitor_does_the_same_arithmetic(name: str) -> None:
    """The frozen products, and six thin ones: the adapter's."""
    thin = 2 * M * RANK * (LLAMA.K + LLAMA.N)
    flops = sum(one.flops for one in predicted(name, LLAMA, M))
    adapter = 0 if name == "frozen" else 3 * thin
    assert flops == 4 * M * LLAMA.N * LLAMA.K + adapter


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["frozen", *BLOCK_RIVALS])
def test_every_block_does_the_same_arithmetic(name: str, gated: bool) -> None:
    block = Block("m", 4096, 14336, "silu", gated=gated, bias=False)
    projections = 3 if gated else 2
    flops = sum(one.flops for one in predicted(name, block, M))
    adapter = 0 if name == "frozen" else projections * 6 * M * RANK * (block.K + block.N)
    assert flops == projections * 4 * M * block.N * block.K + adapter


def parts(name: str, place: Shape | Block) -> int:
    """Workspaces, which are fp32 [parts, rows, R], of every call that has one."""
    forward, backward = calls_of(name, place, M)
    tensors = [t for call in (*forward, *backward) for _, t in operands(call) if t.dim() == 3]
    assert all(t.element_size() == FP32 for t in tensors)
    return sum(t.numel() for t in tensors)


def test_workspaces_are_read_and_written_by_fused_and_split_alone() -> None:
    for name in NAMES:
        assert (parts(name, LLAMA) > 0) is (name in ("fused", "split"))


def test_fewer_passes_predict_less_time() -> None:
    for ceilings in DATASHEET.values():
        ratios = [ratio(name, LLAMA, M, ceilings) for name in ("frozen", *LAYER_RIVALS)]
        assert ratios == sorted(ratios)
    fused, addmm = (
        sum(prediction_of(call).nbytes for call in calls_of(name, LLAMA, M).backward)
        for name in ("fused", "addmm")
    )
    assert fused < addmm


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
    assert predictions.main([str(results)]) == 0
    printed = capsys.readouterr().out
    assert "an invented card, abc1234: measured ceilings 700 TFLOP/s, 4.00 TB/s" in printed
    fused, peft = (ratio(name, LLAMA, M, Ceilings(7e14, 4e12)) for name in ("fused", "peft_fp32"))
    assert f"{fused:.3f} / 1.050" in printed
    line = next(line for line in printed.splitlines() if line.startswith("| llama-3-8b.mlp"))
    assert "/ 0.950" not in line  # at 1024 tokens nothing was measured
    assert "/ 0.950" in printed
    assert f"{1.8 / peft - 1:+.1%}" in printed


def test_without_measurements_it_says_so_and_predicts_from_a_datasheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predictions, "RESULTS", tmp_path / "none")
    assert predictions.main(["--gpu", "a100-80gb"]) == 0
    printed = capsys.readouterr()
    assert "No measurements: there is no usable file of gpu_check in" in printed.out
    assert "a100-80gb: ceilings from its datasheet, 312 TFLOP/s" in printed.out
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
    assert predictions.main([str(results)]) == 2
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
