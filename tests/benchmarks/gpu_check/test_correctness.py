"""The cases of the check: what they cover, what they see, and the memory checker's verdict."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from fastbound.kernels.tiles import GemmTile

from benchmarks.gpu_check import correctness, variants
from benchmarks.gpu_check.cases import (
    Check,
    DispatchedCase,
    GemmCase,
    LargeCase,
    OperatorCase,
    TallCase,
    cases,
)
from benchmarks.gpu_check.correctness import examine
from benchmarks.gpu_check.options import Options
from benchmarks.gpu_check.session import Session
from benchmarks.gpu_check.tools import TOOL_CASES, Unavailable
from benchmarks.gpu_check.variants import VARIANTS, VariantCase, variant_cases
from benchmarks.report.facts import facts
from tests.support.processes import ends

CPU = torch.device("cpu")


@pytest.mark.interpreted
def test_a_case_names_an_unwritten_or_a_wrong_element(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbound.kernels import lowrank_gemm

    case = GemmCase(33, 48, 64, 16, "fp32", GemmTile(32, 32, 32, 4, 2), transposed=False)
    assert examine(case, CPU).status == "passed"
    original = lowrank_gemm.launch_lowrank_gemm

    def cut(X, W, S, F, bias, Y, *rest):
        return original(X[:-1], W, S[:-1], F, bias, Y[:-1], *rest)

    monkeypatch.setattr(lowrank_gemm, "launch_lowrank_gemm", cut)
    outcome = examine(case, CPU)
    assert outcome.status == "failed" and "an element was not written" in outcome.message


@pytest.mark.interpreted
@pytest.mark.parametrize("case", variant_cases(tiny=True), ids=str)
def test_what_a_call_can_also_be_is_as_exact_as_the_formula(case: Check) -> None:
    outcome = examine(case, CPU)
    assert outcome.status == "passed", outcome.message


@pytest.mark.interpreted
def test_a_wrong_rate_of_dropout_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "keep_rate", lambda p: 1.0)
    outcome = examine(VariantCase("dropout", (3, 5, 24), 40, 8, "fp32"), CPU)
    assert outcome.status == "failed" and "error" in outcome.message


def test_the_cases_of_a_gpu_cover_what_they_must() -> None:
    everything = cases(CPU)
    assert {case.variant for case in everything if isinstance(case, VariantCase)} == set(VARIANTS)
    assert len({str(case) for case in everything}) == len(everything)
    operator = [case for case in everything if isinstance(case, OperatorCase)]
    assert {(case.dtype, case.rank) for case in operator} >= {
        (dtype, rank) for dtype in ("fp32", "fp16", "bf16") for rank in (1, 3, 8, 16, 24, 64)
    }
    assert {case.backend for case in operator} == {"fused", "split"}
    assert all(case in everything for case in TOOL_CASES)
    dispatched = [case for case in everything if isinstance(case, DispatchedCase)]
    assert everything[: len(dispatched)] == dispatched  # what users would run comes first
    assert {case.backend for case in dispatched} == {"fused", "split", "torch"}
    forms = {(c.tile.descriptors, c.transposed) for c in everything if isinstance(c, GemmCase)}
    assert forms == {(a, b) for a in (True, False) for b in (True, False)}
    assert any(isinstance(case, TallCase) for case in everything)
    large = [case for case in everything if type(case) is LargeCase]
    assert all(case.M * max(case.N, case.K) > 2**31 for case in large)


@pytest.mark.parametrize(
    ("prints", "exit_code", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("========= ERROR SUMMARY: 2 errors", 0, "failed"),
        ("========= ERROR SUMMARY: 0 errors", 1, "failed"),  # a case did not pass under it
        ("========= Error: Device not supported", 255, "skipped"),
    ],
)
def test_the_memory_checker_is_judged_by_its_summary(
    options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prints: str,
    exit_code: int,
    status: str,
) -> None:
    """A stand-in for the tool: what it prints is all that is known of it."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{prints}'\nexit {exit_code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    on_gpu = replace(options, device=torch.device("cuda"))
    session = Session(on_gpu, facts(CPU))
    assert correctness.sanitizer(session, time.monotonic() + 60)["status"] == status
    assert bool(session.failures) == (status == "failed")


def test_what_a_memory_checker_watches_ends_with_it(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, tool = tmp_path / "number", tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {note}\nwait\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    session = Session(replace(options, device=torch.device("cuda")), facts(CPU))
    found = correctness.sanitizer(session, time.monotonic() + 2)
    assert found["status"] == "not reached" and not session.failures
    assert ends(int(note.read_text()))


def test_a_card_for_one_process_is_given_to_one_and_large_cases_go_last(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exclusive mode lets no second context onto the card; several large cases race for memory."""
    taken: list[tuple[int, list[str]]] = []
    made = [LargeCase(130, 96, 32, "fused"), TOOL_CASES[0], LargeCase(140, 96, 32, "fused")]
    monkeypatch.setattr(correctness, "cases", lambda device, tiny: made)

    def check(cases, options, deadline, record):
        taken.append((options.workers, [str(case) for case in cases]))

    monkeypatch.setattr(correctness, "_check", check)
    for mode, first, last in (("Default", 12, 1), ("Exclusive_Process", 0, 0)):
        taken.clear()
        on_gpu = replace(options, workers=12, device=torch.device("cuda"))
        session = Session(on_gpu, facts(CPU))
        session.facts.readings["compute_mode"] = mode
        correctness.check_correctness(session, time.monotonic() + 10)
        assert taken == [(first, ["torch.compile"]), (last, [str(made[0]), str(made[2])])]


def test_two_processes_are_not_sent_to_a_card_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import tools

    monkeypatch.setattr(tools, "readings", lambda _: {"compute_mode": "Exclusive_Process"})
    with pytest.raises(Unavailable, match="allows only one process on the card"):
        tools.TogetherCase().check(CPU)


@pytest.mark.slow  # two processes that import everything
def test_two_processes_on_one_device_share_their_gradients() -> None:
    TOOL_CASES[2].check(CPU)


def test_a_compiled_call_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda layer, **_: lambda x: 1.1 * layer(x))
    with pytest.raises(AssertionError, match="y of the compiled call is off by"):
        TOOL_CASES[0].check(CPU)
