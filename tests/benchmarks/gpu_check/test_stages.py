"""The tiles that the check tries."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")


from fastbound.dispatch.device import Device
from fastbound.performance.passes import PASSES, default_candidate
from fastbound.performance.tuning.candidates import candidates
from tests.support.plans import planned

CPU = torch.device("cpu")


def test_the_first_candidate_of_a_sweep_is_the_default_and_none_is_there_twice() -> None:
    chosen = planned(Device("sm_90", 132), 8192, 14336, 4096, 16, torch.bfloat16, "fused").tiles
    assert chosen is not None
    for name in PASSES:
        found = candidates(name, chosen)
        assert found[0] == default_candidate(name, chosen)
        assert len({str(candidate) for candidate in found}) == len(found) > 10
