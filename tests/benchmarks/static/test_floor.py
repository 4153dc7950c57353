"""The floor counts what must be done, and NOTES.md holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rivals.cases import Shape
from benchmarks.static import floor
from benchmarks.static.recorded import predictions, ratio, versions
from fastbound.performance.prediction import Ceilings


def test_floor_counts_operations_and_bytes() -> None:
    shape, M = Shape("m", "p", 4096, 14336), 8192
    forward, dx = predictions("frozen", shape, M)
    for gemm in (forward, dx):
        assert gemm.flops == 2 * 8192 * 4096 * 14336
        assert gemm.nbytes == 2 * (8192 * 4096 + 4096 * 14336 + 8192 * 14336)
        assert gemm.seconds(Ceilings(flops=1.0, bandwidth=float("inf"))) == gemm.flops
        assert gemm.seconds(Ceilings(flops=float("inf"), bandwidth=1.0)) == gemm.nbytes
    assert ratio("frozen", shape, M, floor.GPU_CEILINGS) == 1


def test_notes_hold_the_floor_that_the_script_prints(repository: Path) -> None:
    notes = (repository / "benchmarks" / "NOTES.md").read_text()
    if versions() not in notes:
        pytest.skip(f"NOTES.md records the calls of other versions than {versions()}")
    assert floor.layers_document() in notes, "run `python -m benchmarks.static.notes`"
