"""Every kernel compiles for GPUs that are not here: no spills, memory within the card's limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from fastbound.kernels.launch import Launch

from benchmarks.static.compile_report import KernelReport, faults, kernel_name, launches
from fastbound.dispatch.device import Device
from fastbound.performance import compilation
from fastbound.performance.compilation import TARGETS, Compiled, SteadyLoop, compile_launch
from fastbound.performance.recorder import layer_calls
from fastbound.truth.formula import ACTIVATIONS

LAYER = {"factors", "thin", "descriptor", "pointer", "reduce", "finish_both", "finish", "keep"}
BLOCK = {"activate", "activate_backward"}


def compiled(repository: Path, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """What the command reports, in a process of its own: here the kernels may be interpreted."""
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.compile_report", *options, "--json", str(out)]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= row["limit"] and not row["faults"], row
        if row["target"] == "sm_90" and row["kernel"] == "descriptor":
            assert row["in_flight"] >= 1 and row["loads_ahead"] >= 4, row
            assert row["instructions"]["HGMMA"] and row["instructions"]["UTMALDG"], row


@pytest.mark.parametrize(
    ("target", "kernel"),
    [
        ("sm_90", "descriptor"),
        ("gfx942", "finish"),
        pytest.param("sm_80", "thin", marks=pytest.mark.slow),
    ],
)
def test_a_kernel_compiles_without_faults(
    target: str, kernel: str, repository: Path, tmp_path: Path
) -> None:
    options = ("--target", target, "--dtype", "bf16", "--rank", "16", "--shape", "8192 tokens")
    rows = compiled(repository, tmp_path, *options, "--activation", "silu", "--kernel", kernel)
    assert {row["kernel"] for row in rows} == {kernel}
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_an_activation_compiles_without_faults(
    target: str, activation: str, repository: Path, tmp_path: Path
) -> None:
    options = ("--target", target, "--dtype", "bf16", "--rank", "16", "--activation", activation)
    own = ("--shape", "8192 tokens", "odd", "--kernel", *sorted(BLOCK))
    rows = compiled(repository, tmp_path, *options, *own)
    assert {row["kernel"] for row in rows} == BLOCK
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rank"), [("bf16", "16"), ("bf16", "64"), ("fp16", "16")])
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_faults(
    target: str, dtype: str, rank: str, repository: Path, tmp_path: Path
) -> None:
    options = ("--target", target, "--dtype", dtype, "--rank", rank, "--activation", "silu")
    rows = compiled(repository, tmp_path, *options, "--shape", "8192 tokens", "odd")
    expected = (
        LAYER | (BLOCK if rank == "16" else set()) | ({"narrow"} if dtype == "fp16" else set())
    )
    assert {row["kernel"] for row in rows} == expected - (
        {"descriptor"} if target != "sm_90" else set()
    )
    check(rows)


def test_the_report_lists_what_a_call_launches() -> None:
    """At 512 rows K is cut, and the sum of S's parts is a kernel of its own."""

    def named(shape: str) -> list[tuple[str, str]]:
        found = launches("sm_90", "bf16", 16, shape, ())
        return [(kernel_name(launch), call) for call, launch in found]

    assert ("finish", "layer, forward") in named("512 tokens")
    many = named("8192 tokens")
    assert ("finish", "layer, forward") not in many
    assert ("pointer", "split layer with dropout, backward") in many
    assert {kernel for kernel, _ in many} == LAYER


def test_faults_are_found() -> None:
    clean = {"HMMA": 0, "HGMMA": 4, "UTMALDG": 2, "UTMASTG": 1, "LDL": 0, "STL": 0, "v_mfma": 0}

    sound = SteadyLoop(1, 4, 88)

    def found(loop: SteadyLoop | None = sound, **changes: int) -> list[str]:
        figures = {"registers": 100, "spills": 0, "shared": 1000}
        figures |= {k: v for k, v in changes.items() if k in figures}
        counts = clean | {k: v for k, v in changes.items() if k in clean}
        binary = Compiled(**figures, instructions=counts, loop=loop)
        place = ("sm_90", "bf16", 16, "8192 tokens", "descriptor", "layer, forward", 3)
        return list(faults(KernelReport(*place, binary, ())))

    assert found() == []
    assert found(spills=3) == ["3 spills"]
    assert found(shared=300_000) == ["300000 bytes of shared memory for 232448"]
    assert found(HGMMA=0) == ["no HMMA or HGMMA", "no HGMMA"]
    assert found(UTMALDG=0) == ["no TMA load or store"]
    assert found(None) == ["no loop over matrix products"]
    assert found(SteadyLoop(0, 4, 88)) == ["the loop waits for its own matrix products"]
    assert found(SteadyLoop(1, 2, 88)) == ["2 loads ahead of the loop for 3 stages"]


def test_a_loop_that_waits_for_all_it_started_is_told_from_one_that_runs_ahead() -> None:
    def listing(*instructions: str) -> str:
        lines = [f"        /*{16 * i:04x}*/    {text} ;" for i, text in enumerate(instructions)]
        return "\n".join(lines)

    load, product = "UTMALDG.2D [UR8], [UR4]", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24"
    back = "@P0 BRA 0x{:x}"
    ahead = [load, load, load, load]
    running = [product, "WARPGROUP.DEPBAR.LE gsb0, 0x1", load, load, back.format(64)]
    waiting = [load, load, product, "WARPGROUP.DEPBAR.LE gsb0, 0x0", back.format(0)]
    assert compilation.steady_loop(listing(*ahead, *running)) == SteadyLoop(1, 4, 5)
    assert compilation.steady_loop(listing(*waiting)) == SteadyLoop(0, 0, 5)
    assert compilation.steady_loop(listing(*ahead)) is None


@pytest.mark.parametrize(
    "vector, scalar, scratch, spills", [(0, 0, 0, 0), (0, 7, 0, 0), (3, 0, 0, 3), (0, 0, 8, 2)]
)
def test_amd_spills_are_those_that_go_through_memory(
    vector: int, scalar: int, scratch: int, spills: int
) -> None:
    listing = f"""
        .private_segment_fixed_size: {scratch}
        .sgpr_spill_count: {scalar}
        .vgpr_count: 90
        .vgpr_spill_count: {vector}
    """
    binary = SimpleNamespace(asm={"amdgcn": listing}, metadata=SimpleNamespace(shared=1024))
    found = compilation._read_amdgcn(binary)
    assert (found.registers, found.spills, found.shared) == (90, spills, 1024)
    assert found.instructions["sgpr spills"] == scalar


def test_the_registers_of_a_thread_are_an_option_of_nvidias_compiler() -> None:
    limited = Launch(None, (1,), (), {}, 4, 1, registers=255)
    assert limited.limits("cuda") == {"maxnreg": 255} and limited.limits("hip") == {}
    assert limited._replace(registers=None).limits("cuda") == {}


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are not interpreted here"
)
def test_an_interpreted_kernel_is_refused_by_name() -> None:
    import torch

    calls = layer_calls(Device("sm_90", 132), 64, 64, 64, 8, torch.bfloat16, backend="fused")
    launch = calls.launches[0]
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_launch(launch, "sm_90")
