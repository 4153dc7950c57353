"""The cost of a call: every subject is measured, and the launches are left out and put back."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the launches are Triton's")

from benchmarks.static import call_cost
from fastbound.truth.interpreter import interpreting


@pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="no plan with tiles on this device"
)
def test_every_subject_stands_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_cost.main(["--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    for name in ("F.linear", "empty Function", "torch", "split", "fused"):
        assert f"| {name}" in printed
    assert ("no launch" in printed) is not torch.cuda.is_available()


def test_launches_are_left_out_for_the_measurement_alone() -> None:
    from fastbound.kernels.launch import Launch

    ran: list[int] = []

    def kernel() -> None:
        ran.append(1)

    run = Launch.run
    with call_cost.no_launches():
        Launch(kernel, (1,), (), {}, 4, 1).run()
        assert not ran and Launch.run is not run
    assert Launch.run is run


def test_rounds_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call_cost.main(["--rounds", "0"])
    assert "--rounds must be >= 1, got 0" in capsys.readouterr().err
