"""Every kernel compiles for GPUs that are not here: no spills, memory within the card's limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from fastbound.kernels.launch import Launch

from benchmarks.static import compile_report
from benchmarks.static.compile_report import launches
from fastbound.dispatch.device import Device
from fastbound.performance import compilation, inspection
from fastbound.performance.compilation import TARGETS, compile_launch, faults, target_of
from fastbound.performance.inspection import Compiled, SteadyLoop, kernel_name, steady_loop
from fastbound.performance.recorder import layer_calls
from fastbound.truth.formula import ACTIVATIONS

LAYER = {"factors", "thin", "descriptor", "pointer", "reduce", "finish_both", "finish", "keep"}
PRODUCT = {"adapt", "contract"}
BLOCK = {"activate", "activate_backward"}
# One of each kind in full, of the others what differs there; the command itself takes them all.
THOROUGH = ("sm_80", "sm_90", "gfx942")
OTHERS = {
    "sm_86": ("fp16", "32"),
    "sm_89": ("bf16", "64"),
    "sm_100": ("bf16", "16"),
    "sm_120": ("fp16", "64"),
    "gfx90a": ("bf16", "32"),
    "gfx1100": ("bf16", "64"),
}


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
    ("target", "kernel", "rank", "shape"),
    [
        ("sm_90", "descriptor", "16", "8192 tokens"),
        ("gfx942", "finish", "16", "131072 tokens"),
        pytest.param("sm_80", "thin", "16", "8192 tokens", marks=pytest.mark.slow),
        pytest.param("gfx1100", "activate_backward", "32", "odd", marks=pytest.mark.slow),
    ],
)
def test_a_kernel_compiles_without_faults(
    target: str, kernel: str, rank: str, shape: str, repository: Path, tmp_path: Path
) -> None:
    options = ("--target", target, "--dtype", "bf16", "--rank", rank, "--shape", shape)
    rows = compiled(repository, tmp_path, *options, "--activation", "silu", "--kernel", kernel)
    assert {row["kernel"] for row in rows} == {kernel}
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", THOROUGH)
def test_every_activation_compiles_without_faults(
    target: str, repository: Path, tmp_path: Path
) -> None:
    options = ("--target", target, "--dtype", "bf16", "--rank", "16", "--activation", *ACTIVATIONS)
    own = ("--shape", "8192 tokens", "odd", "--kernel", *sorted(BLOCK))
    rows = compiled(repository, tmp_path, *options, *own)
    directions = {"activate": "forward", "activate_backward": "backward"}
    assert {(row["kernel"], row["pass"]) for row in rows} == {
        (kernel, f"{kind} {activation} block, {directions[kernel]}")
        for kernel in BLOCK
        for kind in ("gated", "plain")
        for activation in ACTIVATIONS
    }
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "rank"),
    [
        *((target, "bf16", rank) for target in THOROUGH for rank in ("16", "64")),
        ("sm_90", "fp16", "16"),  # the same kernels and one more
    ],
)
def test_every_kernel_compiles_without_faults(
    target: str, dtype: str, rank: str, repository: Path, tmp_path: Path
) -> None:
    options = ("--target", target, "--dtype", dtype, "--rank", rank, "--activation", "silu")
    rows = compiled(repository, tmp_path, *options, "--shape", "8192 tokens", "odd")
    expected = LAYER | PRODUCT | BLOCK | ({"narrow"} if dtype == "fp16" else set())
    assert {row["kernel"] for row in rows} == expected - (
        {"descriptor"} if target != "sm_90" else set()
    )
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", OTHERS)
def test_tall_kernels_compile_without_faults_on_other_cards(
    target: str, repository: Path, tmp_path: Path
) -> None:
    dtype, rank = OTHERS[target]
    options = ("--target", target, "--dtype", dtype, "--rank", rank, "--shape", "8192 tokens")
    gemm = "descriptor" if TARGETS[target].device.has_descriptors else "pointer"
    rows = compiled(repository, tmp_path, *options, "--kernel", gemm, "reduce", "thin")
    assert {row["kernel"] for row in rows} == {gemm, "reduce", "thin"}
    check(rows)


def test_every_target_is_compiled_thoroughly_or_in_part() -> None:
    assert {*THOROUGH, *OTHERS} == set(TARGETS)


def test_a_device_is_compiled_for_as_it_describes_itself_listed_or_not() -> None:
    asked = Device("sm_90", 114, 200_000)
    assert target_of(asked).device == asked and target_of(asked).shared_limit == 200_000
    for name, like in (("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx1201", "gfx1100")):
        device = Device(name, 48)
        expected = TARGETS[like]
        found = target_of(device)
        assert found == replace(expected, arch=found.arch, device=device)
        assert str(found.arch) in name
    with pytest.raises(ValueError, match="sm_75 has no matrix units"):
        target_of(Device("sm_75", 40))
    with pytest.raises(KeyError, match="sm_75"):
        target_of("sm_75")


def test_the_report_lists_what_a_call_launches() -> None:
    """At 512 rows K is cut, and the sum of S's parts is a kernel of its own."""

    def named(shape: str) -> list[tuple[str, str]]:
        found = launches("sm_90", "bf16", 16, shape, ())
        return [(kernel_name(launch), call) for call, launch in found]

    assert ("finish", "layer, forward") in named("512 tokens")
    many = named("8192 tokens")
    assert ("finish", "layer, forward") not in many
    assert ("pointer", "split layer with dropout, backward") in many
    assert {kernel for kernel, _ in many} == LAYER | PRODUCT | BLOCK


def gemm(target: str) -> Launch:
    """A layer's forward GEMM on descriptors, as recorded."""
    sizes = (8192, 14336, 4096, 16, torch.bfloat16)
    calls = layer_calls(TARGETS[target].device, *sizes, backend="fused")
    return next(launch for launch in calls.launches if kernel_name(launch) == "descriptor")


CLEAN = inspection.count("") | {"UTMALDG": 2, "UTMASTG": 1}
HOPPER = Compiled(154, 0, 213_016, CLEAN | {"HGMMA": 4}, SteadyLoop(1, 4, 88))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"spills": 3}, ["3 spills"]),
        ({"shared": 300_000}, ["300000 bytes of shared memory, above the limit of 232448"]),
        ({"instructions": CLEAN}, ["no HGMMA"]),
        ({"instructions": CLEAN | {"HMMA": 4}}, ["no HGMMA"]),
        ({"instructions": {**CLEAN, "HGMMA": 4, "UTMALDG": 0}}, ["no TMA load or store"]),
        ({"loop": None}, ["no loop over matrix products"]),
        ({"loop": SteadyLoop(0, 4, 88)}, ["the loop waits for its own matrix products"]),
        ({"loop": SteadyLoop(1, 2, 88)}, ["only 2 loads ahead of the loop for 3 stages"]),
        (
            {"warnings": ("C7515",)},
            ["ptxas makes the matrix products wait for one another (C7515)"],
        ),
    ],
)
def test_faults_of_a_hopper_gemm_are_found(changes: dict[str, Any], expected: list[str]) -> None:
    assert list(faults(gemm("sm_90"), replace(HOPPER, **changes), "sm_90")) == expected


def test_a_blackwell_gemm_must_leave_its_accumulator_where_it_is() -> None:
    loop = SteadyLoop(None, 4, 88)
    sound = replace(HOPPER, instructions=CLEAN | {"UTCMMA": 4}, loop=loop)
    assert list(faults(gemm("sm_100"), sound, "sm_100")) == []
    there_and_back = replace(sound, loop=replace(loop, round_trips=1))
    (fault,) = faults(gemm("sm_100"), there_and_back, "sm_100")
    assert "leaves tensor memory" in fault
    assert list(faults(gemm("sm_100"), replace(sound, instructions=CLEAN), "sm_100")) == [
        "no UTCMMA"
    ]


def listing(*instructions: str) -> str:
    lines = [f"        /*{16 * i:04x}*/    {text} ;" for i, text in enumerate(instructions)]
    return "\n".join(lines)


LOAD, BACK = "UTMALDG.2D [UR8], [UR4]", "@P0 BRA 0x{:x}"


def test_a_loop_that_waits_for_all_it_started_is_told_from_one_that_runs_ahead() -> None:
    product = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24"
    ahead = [LOAD] * 4
    running = [product, "WARPGROUP.DEPBAR.LE gsb0, 0x1", LOAD, LOAD, BACK.format(64)]
    waiting = [LOAD, LOAD, product, "WARPGROUP.DEPBAR.LE gsb0, 0x0", BACK.format(0)]
    flat = [*running[:-1], "WARPGROUP.DEPBAR.LE gsb0, 0x0", "UTMASTG.2D [UR8], [UR4]", running[-1]]
    serialised = [product, "WARPGROUP.DEPBAR.LE gsb0, 0x0", *running]
    assert steady_loop(listing(*ahead, *running)) == SteadyLoop(1, 4, 5)
    assert steady_loop(listing(*ahead, *flat)) == SteadyLoop(1, 4, 7)
    assert steady_loop(listing(*ahead, *serialised)) == SteadyLoop(0, 4, 7)
    assert steady_loop(listing(*waiting)) == SteadyLoop(0, 0, 5)
    assert steady_loop(listing(*ahead)) is None


def test_an_accumulator_that_leaves_blackwells_tensor_memory_is_counted() -> None:
    product = "UTCHMMA gdesc[UR8], gdesc[UR16], tmem[UR43], tmem[UR40], idesc[UR41], UPT"
    store, load = "STTM.x128 tmem[UR50], RZ", "LDTM.x128 R4, tmem[UR6]"
    staying = [store, LOAD, LOAD, LOAD, LOAD, product, load, BACK.format(48)]
    leaving = [store, LOAD, LOAD, store, product, load, BACK.format(16)]
    assert steady_loop(listing(*staying)) == SteadyLoop(None, 2, 5)
    assert steady_loop(listing(*leaving)) == SteadyLoop(None, 0, 6, 1)


@pytest.mark.parametrize(
    ("loads", "stores", "spills"), [(0, 0, 0), (0, 6, 0), (1, 2, 3), (4, 0, 4)]
)
def test_what_is_stored_and_never_loaded_is_no_spill(loads: int, stores: int, spills: int) -> None:
    counts = inspection.count("LDL R1, [R2] ;\n" * loads + "STL [R1], R2 ;\n" * stores)
    assert inspection.local_traffic(counts) == spills


def test_a_loop_of_tensor_cores_that_wait_by_themselves_has_loads_ahead_alone() -> None:
    body = ["HMMA.16816.F32.BF16 R4, R8, R12, R4", LOAD, LOAD, BACK.format(64)]
    assert steady_loop(listing(*[LOAD] * 4, *body)) == SteadyLoop(None, 4, 4)


def test_what_the_compiler_refuses_is_a_fault_of_that_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(launch: Launch, target: str) -> Compiled:
        raise RuntimeError("first line\nno such layout")

    monkeypatch.setattr(compile_report, "compile_launch", refuse)
    rows = compile_report.compile_one(ONE)
    assert rows and all("no such layout" in row.faults[0] for row in rows)


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


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are not interpreted here"
)
def test_an_interpreted_kernel_is_refused_by_name() -> None:
    calls = layer_calls(Device("sm_90", 132), 64, 64, 64, 8, torch.bfloat16, backend="fused")
    launch = calls.launches[0]
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_launch(launch, "sm_90")


ONE = ("sm_90", "bf16", 16, ["8192 tokens"], (), ["descriptor"])
COMMAND = ["--target", "sm_90", "--dtype", "bf16", "--rank", "16", "--shape", "8192 tokens"]


class InThisProcess:
    """Stands for the pool, so that a test sees what is compiled."""

    def __init__(self, max_workers: int | None = None) -> None:
        self.map = map

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that the command asks the compiler for, in order."""
    made: list[str] = []

    def compile_launch(launch: Launch, target: str) -> Compiled:
        made.append(kernel_name(launch))
        return HOPPER

    monkeypatch.setattr(compile_report, "compile_launch", compile_launch)
    monkeypatch.setattr(compile_report, "ProcessPoolExecutor", InThisProcess)
    return made


def test_a_report_goes_on_with_the_rows_it_has(tmp_path: Path, asked: list[str]) -> None:
    path = tmp_path / "report.json"
    options = [*COMMAND, "--json", str(path), "--kernel"]
    compile_report.main([*options, "descriptor"])
    before, compiled_before = json.loads(path.read_text()), len(asked)
    compile_report.main([*options, "descriptor", "thin"])
    after = json.loads(path.read_text())
    assert compiled_before and set(asked[compiled_before:]) == {"thin"}
    assert [row for row in after if row["kernel"] == "descriptor"] == before
    compile_report.main([*options, "reduce"])
    kept = json.loads(path.read_text())
    assert kept[: len(after)] == after and {row["kernel"] for row in kept[len(after) :]} == {
        "reduce"
    }


@pytest.mark.parametrize(
    "change",
    [{"triton": "3.0"}, {"binary": "0" * 16}, {"registers": 0}],
    ids=["another Triton", "other sources", "did not compile"],
)
def test_a_row_that_may_have_changed_is_compiled_again(
    change: dict[str, Any], tmp_path: Path, asked: list[str]
) -> None:
    path = tmp_path / "report.json"
    options = [*COMMAND, "--json", str(path), "--kernel", "descriptor"]
    compile_report.main(options)
    rows, first = json.loads(path.read_text()), len(asked)
    path.write_text(json.dumps([row | change for row in rows]))
    compile_report.main(options)
    assert len(asked) == 2 * first and json.loads(path.read_text()) == rows


def test_the_faults_of_a_kept_row_are_judged_anew(tmp_path: Path, asked: list[str]) -> None:
    path = tmp_path / "report.json"
    options = [*COMMAND, "--json", str(path), "--kernel", "descriptor"]
    compile_report.main(options)
    rows, first = json.loads(path.read_text()), len(asked)
    path.write_text(json.dumps([row | {"spills": 7, "faults": []} for row in rows]))
    assert compile_report.main(options) == 1 and len(asked) == first
    assert all("7 spills" in row["faults"] for row in json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("content", "message"),
    [("[{", "is no compile report"), ('{"rows": []}', "not a list of rows"), ("[1]", "not a list")],
)
def test_a_file_that_is_no_report_is_refused_before_any_work_and_kept(
    content: str,
    message: str,
    tmp_path: Path,
    asked: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        compile_report.main([*COMMAND, "--json", str(path)])
    said = capsys.readouterr().err
    assert str(path) in said and message in said and "name another file" in said
    assert not asked and path.read_text() == content


def test_a_folder_that_does_not_exist_is_named_before_any_work(
    tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compile_report.main([*COMMAND, "--json", str(tmp_path / "none" / "report.json")])
    assert "create it first" in capsys.readouterr().err and not asked


@pytest.mark.parametrize("rank", [16, 64])
def test_all_kernels_of_strided_operands_are_in_the_report(rank: int) -> None:
    """Neither a reduction nor a thin product has the tile that aligned operands take."""
    found = launches("sm_90", "bf16", rank, "8192 tokens", ())
    strided = [kernel_name(one) for call, one in found if "strided operands" in call]
    assert {"thin", "pointer", "reduce"} <= set(strided)
