"""The tiles that the check tries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from fastbound.kernels.tiles import Tile
from fastbound.performance.block_passes import BLOCK_PASSES

from benchmarks.rivals.cases import SMOKE_SHAPES
from fastbound.dispatch.device import Device
from fastbound.performance.passes import PASSES, Candidate, default_candidate, make_operands, thin
from fastbound.performance.tuning import sweep as tile_sweep
from fastbound.performance.tuning.candidates import candidates
from tests.support.plans import planned

CPU = torch.device("cpu")


def test_the_first_candidate_of_a_sweep_is_the_default_and_none_is_there_twice() -> None:
    chosen = planned(Device("sm_90", 132), 8192, 14336, 4096, 16, torch.bfloat16, "fused").tiles
    assert chosen is not None
    for name in (*PASSES, *BLOCK_PASSES):
        found = candidates(name, chosen)
        assert found[0] == default_candidate(name, chosen)
        assert len({str(candidate) for candidate in found}) == len(found) > 10


def test_a_candidate_with_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:

    shape = SMOKE_SHAPES[0]
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
