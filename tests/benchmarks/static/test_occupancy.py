"""What the compiled passes cost per element, and how the command reads it off their listings."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from benchmarks.static.occupancy import PASSES, innermost, main, programs_of
from tests.support.uninterpreted import printed

# In a process of its own: here the kernels may be interpreted.
_PRINT = """
import json, sys
from benchmarks.static.occupancy import measured, passes_of
found = [measured(one, sys.argv[1]) for one in passes_of(sys.argv[1], 8192, 16)]
print(json.dumps({p.name: [p.loop._asdict(), p.programs, p.in_flight] for p in found}))
"""


@cache
def compiled(target: str, repository: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(_PRINT, target, repository=repository))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_activation_is_computed_once_per_element(target: str, repository: Path) -> None:
    """One exponential and one reciprocal, in either direction: as often as without adapters."""
    found = compiled(target, repository)
    backward, *_ = found["gated: activate backward"]
    assert backward["special"] == 2
    assert backward["instructions"] < 1.7
    forward, *_ = found["gated: activate"]
    assert forward["special"] == 2
    assert forward["instructions"] < 0.7


@pytest.mark.slow
def test_tall_tensors_come_in_wide_asynchronous_copies(repository: Path) -> None:
    """Sizes that the compiler is not told (do_not_specialize) must not cost it the alignment."""
    found = compiled("sm_90", repository)
    for name in ("gated: activate backward", "reduce", "thin"):
        loop, programs, in_flight = found[name]
        assert loop["wide_copies"] >= 6, name
        # What 3.35 TB/s take in 700 ns, from each of 132 multiprocessors: 17 KiB.
        assert programs >= 1 and in_flight >= 17 * 1024, name


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2] ;
        /*0020*/                   MUFU.EX2 R5, R4 ;
        /*0030*/                   FMUL R5, R5, R4 ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   EXIT ;
"""
AMD = """
.LBB0_1:
\ts_add_u32 s0, s0, 1
.LBB0_2:
\tv_exp_f32_e32 v1, v1
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\ts_cbranch_scc1 .LBB0_2
\ts_cbranch_vccnz .LBB0_1
\ts_endpgm
"""


def test_the_innermost_loop_is_read_off_a_listing() -> None:
    assert [t.split()[0] for t in innermost(SASS, "cuda")] == ["MUFU.EX2", "FMUL", "@P0"]
    assert [t.split()[0] for t in innermost(AMD, "hip")] == [
        "v_exp_f32_e32",
        "global_load_dwordx4",
        "s_cbranch_scc1",
    ]
    assert innermost("        /*0000*/                   EXIT ;", "cuda") == []


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 210, 49_152, 8, 1),  # registers
        ("sm_90", 64, 200_000, 4, 1),  # shared memory
        ("sm_90", 32, 1_024, 8, 8),  # 64 warps
        ("sm_80", 204, 25_600, 4, 2),
        ("gfx942", 204, 7_168, 4, 2),
        ("gfx942", 84, 40_000, 4, 1),
    ],
)
def test_programs_per_multiprocessor(
    target: str, registers: int, shared: int, warps: int, programs: int
) -> None:
    assert programs_of(target, registers, shared, warps) == programs


@pytest.mark.parametrize("name", PASSES)
def test_the_share_at_work_is_shown_for_every_token_count_and_width(name: str) -> None:
    rows = [line.split("|")[2:-1] for line in PASSES[name]("sm_90").splitlines()[2:]]
    assert [len(row) for row in rows] == [6] * 6
    shares = [float(cell.split(",")[2]) for row in rows for cell in row]
    assert all(0.7 <= share <= 1 for share in shares)


def test_tokens_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tokens", "0"])
    assert "--tokens must be >= 1, got 0" in capsys.readouterr().err
