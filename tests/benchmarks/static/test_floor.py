"""The floor counts what must be done, and NOTES.md holds it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rivals.cases import Shape
from benchmarks.static import floor
from fastbound.performance import prediction as time_model


def test_floor_counts_operations_and_bytes() -> None:
    shape, M = Shape("m", "p", 4096, 14336), 8192
    assert time_model.gemm_flops(shape, M) == 2 * 8192 * 4096 * 14336
    assert time_model.gemm_bytes(shape, M) == 2 * (8192 * 4096 + 4096 * 14336 + 8192 * 14336)
    compute = time_model.Ceilings(flops=1.0, bandwidth=float("inf"))
    memory = time_model.Ceilings(flops=float("inf"), bandwidth=1.0)
    assert time_model.gemm_seconds(shape, M, compute) == time_model.gemm_flops(shape, M)
    assert time_model.gemm_seconds(shape, M, memory) == time_model.gemm_bytes(shape, M)
    assert time_model.predicted_ratio("frozen", shape, M, floor.GPU_CEILINGS) == 1


def test_notes_hold_the_floor_that_the_script_prints(repository: Path) -> None:
    notes = (repository / "benchmarks" / "NOTES.md").read_text()
    printed = floor.document(floor.GPU_CEILINGS)
    assert printed in notes, "run `python -m benchmarks.static.notes`"
