"""Every kernel compiles for GPUs that are not here: no spills, memory within the card's limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from fastbound.kernels.launch import Launch

from benchmarks.static.compile_report import faults
from fastbound.performance import compilation
from fastbound.performance.compilation import TARGETS, Compiled, compile_launch, layer_launches

KERNELS = {
    "factors", "thin", "gemm forward", "gemm dx", "reduce dy", "reduce x",
    "finish dS, dB", "finish dA",
    "keep bits", "thin dropout", "gemm dx dropout", "reduce x dropout",
    "block thin", "block gemm dx", "block reduce x", "block finish dS", "block finish dA",
}  # fmt: skip
ACTIVATE = {f"{k} {a}" for k in ("activate", "activate backward") for a in ("silu", "gelu", "relu",
    "gelu_tanh", "silu plain", "gelu plain", "relu plain", "gelu_tanh plain")}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_kernel_compiles_without_faults(dtype: str, repository: Path, tmp_path: Path) -> None:
    """In a process of its own: here the kernels may be interpreted."""
    out = tmp_path / "report.json"
    ranks = ["16", "64"] if dtype == "bf16" else ["16"]
    command = [sys.executable, "-m", "benchmarks.static.compile_report", "--dtype", dtype]
    command += ["--shape", "8192 tokens", "odd", "--rank", *ranks, "--json", str(out)]
    if dtype == "fp16":
        command += ["--activation", "silu"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    rows = json.loads(out.read_text())["rows"]
    activate = ACTIVATE if dtype == "bf16" else {k for k in ACTIVATE if "silu" in k}
    expected = {(t, k) for t in TARGETS for k in KERNELS | activate}
    assert {(r["target"], r["kernel"]) for r in rows} == expected
    gemms = [r for r in rows if r["target"] == "sm_90" and r["shape"] != "odd"]
    gemms = [r for r in gemms if r["kernel"].startswith("gemm")]
    for row in gemms:
        assert row["compiled"]["instructions"]["HGMMA"] > 0
        assert row["compiled"]["instructions"]["UTMALDG"] > 0


def test_faults_are_found() -> None:
    clean = {"HMMA": 0, "HGMMA": 4, "UTMALDG": 2, "UTMASTG": 1, "LDL": 0, "STL": 0, "v_mfma": 0}

    def found(**changes: int) -> list[str]:
        figures = {"registers": 100, "spills": 0, "shared": 1000}
        figures |= {k: v for k, v in changes.items() if k in figures}
        counts = clean | {k: v for k, v in changes.items() if k in clean}
        compiled = Compiled(**figures, instructions=counts)
        return list(faults("sm_90", "bf16", "8192 tokens", "gemm forward", compiled))

    assert found() == []
    assert found(spills=3) == ["3 spills"]
    assert found(shared=300_000) == ["300000 bytes of shared memory for 232448"]
    assert found(HGMMA=0) == ["no HMMA or HGMMA", "no HGMMA"]
    assert found(UTMALDG=0) == ["no TMA load or store"]


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

    launch = layer_launches("sm_90", 64, 64, 64, 8, torch.bfloat16)["thin"]
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_launch(launch, "sm_90")
