"""The page about a card: what a reader wants to know first, of whatever a run has reached."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report.page import page
from benchmarks.report.summary import tile_table

FACTS = {
    "device": "a card",
    "architecture": "sm_90",
    "multiprocessors": 132,
    "versions": {"torch": "2.13", "triton": "3.9.0"},
    "commit": "abc1234",
    "date": "2026-01-02T03:04:05Z",
    "readings": {"driver_version": "575.1", "power.limit": "700 W"},
}


def row(competitor: str, median: float, projection: str = "down") -> dict[str, Any]:
    return {
        "model": "llama",
        "projection": projection,
        "M": 8192,
        "competitor": competitor,
        "direction": "forward+backward",
        "median": median,
    }


def results(**more: Any) -> dict[str, Any]:
    empty = {"facts": FACTS, "seconds": 540.0, "timings_mean_nothing": False, "failures": []}
    return {**empty, **more}


def test_a_run_that_reached_nothing_says_so() -> None:
    text = page(results())
    assert "# fastbound on a card" in text
    assert "driver 575.1" in text and "power limit 700 W" in text and "9.0 minutes" in text
    assert "Not looked at in this run." in text
    for stage in ("correctness", "ceilings", "choices", "benchmark", "tune", "profile", "tiles"):
        assert f"- {stage}: not reached" in text
    assert "nan" not in text and "None" not in text


def test_a_sweep_whose_default_tile_does_not_run_is_still_shown() -> None:
    tile = {"name": "gemm", "M": 8192, "is_default": False, "over_default": None}
    swept = [
        {**tile, "candidate": "128x128", "median": 1e-3, "over_floor": 1.25},
        {**tile, "candidate": "cuBLAS", "median": 8e-4, "over_floor": 1.0},
    ]
    text = " ".join(tile_table(swept).split())
    assert "| gemm | 8192 | 128x128 | 1000.0 | - | 1.250 |" in text


def test_times_stand_over_the_frozen_one_and_blocks_apart() -> None:
    rows = [row("frozen", 2e-3), row("auto", 2.06e-3), row("addmm", 2.3e-3)]
    rows += [row("frozen", 4e-3, "mlp"), row("per_layer", 5e-3, "mlp")]
    text = page(results(benchmark={"rows": rows, "not_reached": ["a", "b"]}))
    flat = " ".join(text.split())
    assert "| llama down | 8192 | 2.000 | 1.03 | 1.15 |" in flat
    assert "| llama mlp | 8192 | 4.000 | 1.25 |" in flat
    assert "- benchmark: 2 steps not reached" in text
    assert text.index("a layer cost") < text.index("a whole MLP block cost")


def test_what_was_chosen_and_what_failed_is_named() -> None:
    chosen = {"case": "llama.down at 8192", "part": "forward", "strategy": "fused", "seconds": 3.0}
    chosen["reason"] = "measured 2026-01-02 on a card: fused 1.0 ms, split 1.1 ms; default tiles"
    outcomes = [
        {"case": "a", "status": "passed", "message": ""},
        {"case": "CUDA graph", "status": "skipped", "message": "a CUDA graph needs CUDA"},
    ]
    text = page(
        results(
            choices={"rows": [chosen]},
            correctness={"cases": 2, "outcomes": outcomes, "sanitizer": {"status": "passed"}},
            failures=["fused bf16: Traceback\n  line\nAssertionError: y: error 1e-1"],
        )
    )
    assert "forward: fused 1 times" in text and "fused 1.0 ms, split 1.1 ms" in text
    assert "1 passed, 1 skipped" in text and "Memory checker: passed." in text
    assert "- skipped: CUDA graph: a CUDA graph needs CUDA" in text
    assert "**FAILED** fused bf16: Traceback AssertionError: y: error 1e-1" in text
    assert "Nothing failed." not in text


@pytest.mark.parametrize("tiny", [True, False])
def test_a_cpus_times_are_marked(tiny: bool) -> None:
    assert ("Interpreted on a CPU" in page(results(timings_mean_nothing=tiny))) is tiny
