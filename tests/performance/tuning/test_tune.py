"""The tuner's choices, its table and its budget, with a bench that needs no GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="what is tuned are Triton's kernels")

from fastbound.kernels.tiles import GemmTile, Tile
from hypothesis import given
from hypothesis import strategies as st

from fastbound.cli import main
from fastbound.dispatch.defaults import Tiles, default_tiles
from fastbound.dispatch.device import Device
from fastbound.dispatch.entries import fits
from fastbound.dispatch.tables import find_table, read_table, software
from fastbound.operator.engine import Engine
from fastbound.operator.torch_engine import TorchEngine
from fastbound.performance.compilation import TARGETS
from fastbound.performance.passes import BLOCK_PASSES, LAYER_PASSES, PASSES, Candidate
from fastbound.performance.prediction import DATASHEET, datasheet_of
from fastbound.performance.shapes import Block, Shape, block_of, linear_shapes, parse_tokens
from fastbound.performance.tuning import bench as bench_module
from fastbound.performance.tuning import command
from fastbound.performance.tuning import tune as tuning
from fastbound.performance.tuning.bench import DeviceBench
from fastbound.performance.tuning.candidates import (
    COMPILED,
    KINDS,
    Machine,
    Point,
    points,
    shortlist,
)
from fastbound.performance.tuning.tile_model import tile_seconds
from fastbound.performance.tuning.tune import TIMED, Timings, best_strategy, start_table, tune
from fastbound.truth.operands import LayerOperands
from tests.support.plans import planned

HOPPER = Machine(Device("sm_90", 132), "a card", DATASHEET["h100"], {"torch": "1", "triton": "2"})
LLAMA = linear_shapes("llama-3-8b")
BLOCK = block_of("llama-3-8b")
TODO = points([*LLAMA, BLOCK], [8192, 1024], [16])
FORMS = (("silu", True), ("gelu_tanh", False))
LAYERS = [point for point in TODO if isinstance(point.shape, Shape)]


@dataclass
class FakeBench:
    """Answers from arithmetic; a step of it takes ``cost`` seconds of its own clock."""

    samples: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {"fused": [1.0] * 3, "split": [1.1] * 3, "torch": [1.2] * 3}
    )
    wrong: Mapping[str, str] = field(default_factory=dict)
    bad: str | None = None  # candidates whose text holds it do not compile
    fastest: str | None = None  # the first whose text holds it wins
    out_of_memory_at: int | None = None
    cost: float = 1.0
    now: float = 0.0
    swept: list[tuple[str, Point, tuple[Candidate, ...]]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def faults(
        self, names: Sequence[str], point: Point, chosen: Sequence[Candidate], deadline: float
    ) -> list[str | None]:
        return ["7 spills" if self.bad and self.bad in str(c) else None for c in chosen]

    def sweep(
        self, name: str, point: Point, chosen: Sequence[Candidate]
    ) -> Mapping[Candidate, float]:
        self.now += self.cost
        if self.out_of_memory_at == point.M:
            raise torch.OutOfMemoryError("no more")
        self.swept.append((name, point, tuple(chosen)))
        return {c: 0.5 if self.fastest and self.fastest in str(c) else 1.0 for c in chosen}

    def strategies(self, point: Point, tiles: Tiles) -> Timings:
        assert isinstance(point.shape, Shape)
        return Timings(self.samples, self.wrong)


def run(bench: FakeBench, path: Path, *, minutes: float = 100.0, resume: bool = False):
    table = start_table(path, HOPPER, resume=resume)
    return tune(TODO, bench, HOPPER, table, path, minutes=minutes, clock=bench.clock)


def test_the_table_is_what_dispatch_then_finds(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    tuned = run(FakeBench(fastest="256x128x64"), path)
    assert not tuned.failures and not tuned.not_reached
    assert read_table(path).entries == tuned.table.entries
    assert read_table(path).blocks == tuned.table.blocks
    assert len(tuned.table.entries) == len(LAYERS) == 4
    assert len(tuned.table.blocks) == len(TODO) - len(LAYERS) == 2
    table = find_table("sm_90", 132, [tmp_path])
    assert table is not None
    asked = (HOPPER.device, 8192, LLAMA[0].N, LLAMA[0].K, 16, torch.bfloat16)
    elsewhere = planned(*asked, table=table)  # of other software: its tiles, and the first call
    assert elsewhere.strategy == "split" and "fused" in elsewhere.candidates
    chosen = planned(*asked, table=replace(table, versions=software()))
    assert chosen.strategy == "fused" and "on a card" in chosen.reason
    assert not chosen.candidates
    assert chosen.tiles is not None
    assert str(chosen.tiles.gemm).startswith("256x128x64")
    assert str(chosen.tiles.gemm_t).startswith("256x128x64")
    default = default_tiles(HOPPER.device, 8192, 16, torch.bfloat16)
    assert (chosen.tiles.thin, chosen.tiles.reduce) == (default.thin, default.reduce)


def test_a_block_then_runs_with_its_own_tiles(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    run(FakeBench(fastest="64x128"), path)  # a tile of the forward's list alone
    run(FakeBench(fastest="32x32"), tmp_path / "other.json")  # and of the backward's
    asked = (8192, BLOCK.N, BLOCK.K, 32, torch.bfloat16, "fused")
    default = planned(HOPPER.device, *asked).tiles
    assert default is not None
    for name, kind, other in (("sm_90", "activate", "gated"), ("other", "gated", "activate")):
        table = read_table(tmp_path / f"{name}.json")
        chosen = planned(HOPPER.device, *asked, table=table, form="gated silu").tiles
        assert chosen is not None
        tile = str(getattr(chosen, kind))
        assert tile.startswith("64x128" if kind == "activate" else "32x32")
        assert getattr(chosen, other) == getattr(default, other)


def test_every_pass_is_timed_with_the_default_first(tmp_path: Path) -> None:
    bench = FakeBench()
    run(bench, tmp_path / "t.json")
    assert TODO[2].shape == BLOCK
    for at, passes in ((TODO[0], LAYER_PASSES), (TODO[2], BLOCK_PASSES)):
        assert [name for name, point, _ in bench.swept if point == at] == list(passes)
    for name, point, chosen in bench.swept:
        rank, form = (32, BLOCK.form) if point.shape == BLOCK else (16, None)
        asked = (point.M, point.shape.N, point.shape.K, rank, torch.bfloat16, "fused")
        dispatched = planned(HOPPER.device, *asked, form=form).tiles
        assert point.default_tiles(HOPPER.device, torch.bfloat16) == dispatched
        kind = next(kind for kind, names in point.kinds.items() if name in names)
        assert chosen[0].tile == getattr(dispatched, kind)
        assert len(chosen) == TIMED


def test_what_the_compiler_speaks_against_is_never_timed(tmp_path: Path) -> None:
    """The default neither, which then gives way to what compiles cleanly."""
    bench = FakeBench(bad="128x256x64")
    tuned = run(bench, tmp_path / "t.json")
    gemms = [c for name, _, chosen in bench.swept if name.startswith("gemm") for c in chosen]
    assert gemms and not any("128x256x64" in str(c) for c in gemms)
    default = default_tiles(HOPPER.device, 8192, 16, torch.bfloat16).gemm
    assert str(default).startswith("128x256x64")
    assert tuned.table.entries and not tuned.failures
    assert all(entry.gemm != default for entry in tuned.table.entries)


def test_a_pass_without_a_sound_tile_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    bench = FakeBench(bad="x")  # every tile has one in its size
    tuned = run(bench, tmp_path / "t.json")
    assert not bench.swept
    assert len(tuned.failures) == sum(len(point.kinds) for point in TODO)
    assert "gemm: no tile compiles cleanly, 128x256x64" in tuned.failures[0]
    assert len(tuned.table.entries) == len(LAYERS)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"fused": 1.0, "split": 1.1, "torch": 1.2}, "fused"),
        ({"fused": 1.0, "split": 1.0, "torch": 1.0}, "split"),
        ({"fused": 0.995, "split": 1.0}, "split"),
        ({"fused": 1.1, "split": 1.0, "torch": 0.9}, "torch"),
        ({"fused": 0.9, "split": 1.0, "torch": 0.895}, "fused"),
        ({"fused": 1.0, "torch": 1.0}, "fused"),
    ],
)
def test_split_gives_way_only_to_what_is_measured_faster(
    seconds: dict[str, float], expected: str
) -> None:
    assert best_strategy({name: [s] * 5 for name, s in seconds.items()}) == expected


def test_strategies_are_compared_within_a_round() -> None:
    slow_rounds = [1.0, 5.0, 1.0, 5.0, 9.0]
    samples = {"split": slow_rounds, "fused": [0.9 * s for s in slow_rounds]}
    assert best_strategy(samples) == "fused"


def test_a_strategy_with_a_wrong_result_is_not_chosen_and_said(tmp_path: Path) -> None:
    bench = FakeBench({"split": [1.0] * 3}, {"fused": "dA is off by 3.0e-01"})
    tuned = run(bench, tmp_path / "t.json")
    assert {entry.strategy for entry in tuned.table.entries} == {"split"}
    assert len(tuned.failures) == len(LAYERS)
    assert "llama-3-8b.gate_up at 8192 tokens, rank 16: fused: dA is off" in tuned.failures[0]


def test_the_budget_ends_it_with_what_it_has_and_resume_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    passes = sum(len(names) for names in KINDS.values())
    first = run(FakeBench(cost=60.0), path, minutes=passes + 2)
    assert len(read_table(path).entries) == 1
    assert first.not_reached == tuple(TODO[1:])
    bench = FakeBench()
    second = run(bench, path, resume=True)
    assert len(second.table.entries) == len(LAYERS) and not second.not_reached
    assert len(second.table.blocks) == len(TODO) - len(LAYERS)
    assert TODO[0] not in {point for _, point, _ in bench.swept}
    bench = FakeBench()
    assert run(bench, path, resume=True).table.blocks == second.table.blocks
    assert not bench.swept


def test_out_of_memory_leaves_a_shape_out_and_goes_on(tmp_path: Path) -> None:
    tuned = run(FakeBench(out_of_memory_at=8192), tmp_path / "t.json")
    assert {entry.M for entry in (*tuned.table.entries, *tuned.table.blocks)} == {1024}
    assert len(tuned.failures) == 3
    assert all("out of memory" in failure for failure in tuned.failures)


def test_progress_is_told_the_same_number_of_steps_whatever_happens(tmp_path: Path) -> None:
    path, said = tmp_path / "t.json", []
    for resume in (False, True):
        said.clear()
        table = start_table(path, HOPPER, resume=resume)
        tune(TODO, FakeBench(), HOPPER, table, path, minutes=1e3, step=said.append)
        assert len(said) == sum(point.steps for point in TODO) == 4 * 5 + 2 * 2


def test_a_table_that_is_there_is_only_touched_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    run(FakeBench(), path)
    with pytest.raises(ValueError, match=r"t\.json already exists: continue it with --resume"):
        start_table(path, HOPPER, resume=False)
    with pytest.raises(
        ValueError, match="measured with torch 1, triton 2, but installed are torch 9"
    ):
        start_table(path, replace(HOPPER, versions={"torch": "9"}), resume=True)
    other = replace(HOPPER, device=Device("sm_90", 114))
    with pytest.raises(ValueError, match="132 multiprocessors"):
        start_table(path, other, resume=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has another version"):
        start_table(path, HOPPER, resume=True)


def test_most_useful_first_and_nothing_twice() -> None:
    todo = points([*LLAMA, *LLAMA], parse_tokens("1000:16k"), [16, 32])
    assert sorted({p.M for p in todo}) == [1024, 2048, 4096, 8192, 16384]
    assert [p.M for p in todo[:2]] == [8192, 8192] and {p.M for p in todo[2:6]} == {4096, 16384}
    assert [p.rank for p in todo] == [16] * 10 + [32] * 10
    assert len(set(todo)) == len(todo)
    assert todo[0].shape == LLAMA[0]
    blocks = points([BLOCK, block_of("phi-1.5"), replace(BLOCK, K=99)], [8192], [16, 32, 64])
    assert [(str(p.shape), p.rank) for p in blocks] == [
        (f"{model}.mlp", rank) for rank in (16, 32, 64) for model in ("llama-3-8b", "phi-1.5")
    ]


def test_no_descriptors_are_tried_where_there_is_no_tma() -> None:
    ampere = replace(HOPPER, device=Device("sm_80", 108))
    for machine in (ampere, HOPPER):
        architecture = machine.device.architecture
        tiles = default_tiles(machine.device, 8192, 16, torch.bfloat16)
        found = [str(c) for c in shortlist(KINDS["gemm"], tiles, TODO[0], machine)]
        assert TIMED < len(found) <= COMPILED
        assert any("descriptors" in text for text in found) is (architecture == "sm_90")


def test_the_widest_hopper_tile_is_tried_with_three_stages_and_with_four_and_two_stores() -> None:
    point = Point(LLAMA[0], 8192, 16)
    tiles = point.default_tiles(HOPPER.device, torch.bfloat16)
    found = [str(c) for c in shortlist(KINDS["gemm"], tiles, point, HOPPER)]
    wide = "128x256x64, 8 warps, {} stages, descriptors"
    assert found[0] == wide.format(3)
    assert wide.format(4) + ", 2 stores" in found and wide.format(4) not in found


@pytest.mark.parametrize("target", TARGETS)
def test_only_tiles_that_can_fit_a_card_are_compiled_for_it(target: str) -> None:
    machine = replace(HOPPER, device=TARGETS[target].device)
    point = Point(LLAMA[0], 8192, 16)
    tiles = point.default_tiles(machine.device, torch.bfloat16)
    chosen = shortlist(KINDS["gemm"], tiles, point, machine)
    assert len(chosen) >= 5
    assert all(fits(c.tile, machine.device) for c in chosen if isinstance(c.tile, GemmTile))


@given(
    name=st.sampled_from(list(PASSES)),
    architecture=st.sampled_from(["sm_80", "sm_90", "gfx942", "sm_999"]),
    M=st.integers(0, 20).map(lambda n: 1 << n),
    N=st.integers(1, 300_000),
    K=st.integers(1, 300_000),
    rank=st.sampled_from([1, 16, 33, 64]),
)
def test_any_shape_has_a_shortlist_with_finite_times(
    name: str, architecture: str, M: int, N: int, K: int, rank: int
) -> None:
    machine = replace(HOPPER, device=Device(architecture, 100))
    R = max(16, 1 << (rank - 1).bit_length())
    shape: Shape | Block = Shape("m", "p", K, N)
    if name in BLOCK_PASSES:
        shape = Block("m", K, N, "gelu", gated=K % 2 == 0, bias=False)
    tiles = default_tiles(machine.device, M, R, torch.bfloat16)
    for candidate in shortlist([name], tiles, Point(shape, M, rank), machine):
        predicted = tile_seconds(name, candidate.tile, shape, M, R, machine.ceilings, 100)
        assert 0 < predicted < float("inf")


def test_the_model_prefers_large_tiles_for_many_rows_and_small_ones_for_few() -> None:
    def fastest(M: int) -> int:
        point = Point(LLAMA[1], M, 16)
        tiles = default_tiles(HOPPER.device, M, 16, torch.bfloat16)
        best = shortlist(KINDS["gemm"], tiles, point, HOPPER)[1].tile
        return best.block_m * best.block_n

    assert fastest(32768) > fastest(64)


def test_the_model_knows_what_narrow_tiles_of_a_block_cost() -> None:
    def seconds(name: str, rows: int, columns: int, block: Block = BLOCK, M: int = 8192) -> float:
        tile = Tile(rows, columns, 4, 2)
        return tile_seconds(name, tile, block, M, 16, DATASHEET["h100"], 132)

    backward, plain = "activate backward", block_of("phi-1.5")
    assert seconds(backward, 16, 16) > seconds(backward, 16, 32) > seconds(backward, 16, 64)
    assert seconds("activate", 16, 64) > seconds("activate", 64, 64)
    # Few rows fill the GPU all the same: a program takes a part of their columns.
    least = 3 * 2 * 512 * BLOCK.N / DATASHEET["h100"].bandwidth
    assert seconds("activate", 128, 64, M=512) < 1.5 * least
    # Never less than the tall tensors once: three and five of them, or two and three.
    one = 2 * 8192 / DATASHEET["h100"].bandwidth
    for block, forward, both in ((BLOCK, 3, 5), (plain, 2, 3)):
        assert seconds("activate", 32, 64, block) > forward * block.N * one
        assert seconds(backward, 16, 32, block) > both * block.N * one


def test_a_card_is_known_by_its_name() -> None:
    assert datasheet_of("NVIDIA H200") == DATASHEET["h200"]
    assert datasheet_of("NVIDIA A100-SXM4-80GB") == DATASHEET["a100-80gb"]


def test_a_strategy_that_a_card_refuses_leaves_the_others_to_be_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusal = "out of resource: shared memory, Required: 176144, Hardware limit: 101376"

    def answer(o: LayerOperands, engine: Engine, turn: int = 0) -> tuple[torch.Tensor, ...]:
        if not isinstance(engine, TorchEngine):
            raise RuntimeError(f"the kernel\n{refusal}")
        return forward_and_backward(o, engine, turn)

    forward_and_backward = bench_module._forward_and_backward
    monkeypatch.setattr(bench_module, "_forward_and_backward", answer)
    described = Device("interpreter", 4)
    bench = DeviceBench(torch.device("cpu"), described, torch.float32, rounds=2, workers=1)
    tiles = default_tiles(described, 32, 16, torch.float32)
    timings = bench.strategies(Point(Shape("tiny", "up", 64, 96), 32, 4), tiles)
    assert set(timings.samples) == {"torch"}
    assert dict(timings.faults) == dict.fromkeys(("fused", "split"), f"RuntimeError: {refusal}")


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here: see gpu_check"
)
def test_the_real_bench_measures_and_checks_through_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times mean nothing; launches, checks against fp64 and the table are the real ones."""
    monkeypatch.setattr(tuning, "TIMED", 2)
    described = Device("interpreter", 4)
    machine = replace(HOPPER, device=described)
    blocks = [Block("tiny", 64, 96, name, gated, False) for name, gated in FORMS]
    todo = points([Shape("tiny", "up", 64, 96), *blocks], [32], [4])
    bench = DeviceBench(torch.device("cpu"), described, torch.float32, rounds=2, workers=1)
    path = tmp_path / "t.json"
    table = start_table(path, machine, resume=False)
    tuned = tune(todo, bench, machine, table, path, minutes=5, dtype=torch.float32)
    assert not tuned.failures
    (entry,) = tuned.table.entries
    assert (entry.N, entry.K, entry.M, entry.R) == (96, 64, 32, 16)
    assert [block.form for block in tuned.table.blocks] == ["gated silu", "plain gelu_tanh"]
    tiles = default_tiles(described, 32, 16, torch.float32)
    assert set(bench.strategies(todo[0], tiles).samples) == {"fused", "split", "torch"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a GPU that torch sees"),
        (["--shapes", "llama-9"], "unknown model shape 'llama-9'; choose from gpt-neo-125m, phi"),
        (["--shapes", ","], "--shapes names no model"),
        (["--tokens", "8q"], "tokens '8q': '8q' is not a number of tokens"),
        (["--tokens", "8k:1k"], "runs backwards"),
        (["--ranks", "16,128"], "--ranks '16,128': give whole numbers from 1 to 64"),
        (["--dtype", "float32"], "--dtype must be one of bfloat16, float16; got 'float32'"),
        (["--budget-minutes", "0"], "--budget-minutes must be positive"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_candidate_report_names_a_pass_without_a_choice() -> None:
    from benchmarks.static import candidate_report as report

    todo = report.tasks("sm_90", 8192)
    assert {name for name, *_ in todo} == set(PASSES)
    only = report.tasks("sm_90", 8192, passes=["activate"])
    assert [task[0] for task in only] == ["activate"] * len(only)
    assert {task[2].form for task in only} == {"gated silu", "plain gelu_tanh"}
    rows = [
        report.Row("sm_90", 8192, name, str(candidate), i == 0, None, "7 spills" if i else None)
        for name in ("thin", "reduce x")
        for i, (_, candidate, *_) in enumerate(task for task in todo if task[0] == name)
    ]
    assert report.without_choice(rows) == ["sm_90, M=8192, thin", "sm_90, M=8192, reduce x"]
    rows[1] = rows[1]._replace(fault=None)
    assert report.without_choice(rows) == ["sm_90, M=8192, reduce x"]
    rows[0] = rows[0]._replace(fault="7 spills")
    assert report.without_choice(rows) == ["sm_90, M=8192, thin", "sm_90, M=8192, reduce x"]
    assert report.as_table(rows).count("7 spills") == len(rows) - 2


def test_the_command_tunes_resumes_and_leaves_what_dispatch_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything of it but the device."""
    bench = FakeBench()
    here = {
        "describe": lambda device: HOPPER.device,
        "user_folder": lambda: tmp_path / "plans",
        "DeviceBench": lambda *arguments, **settings: bench,
    }
    for name, stand_in in here.items():
        monkeypatch.setattr(command, name, stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    arguments = ["tune", "--shapes", "llama-3-8b", "--tokens", "8k", "--ranks", "16"]
    assert main(arguments) == 0
    path = tmp_path / "plans" / "sm_90.json"
    printed = capsys.readouterr().out
    assert f"a card: 3 shapes, at most 8 minutes, into {path}" in printed
    assert f"3 entries in {path}" in printed
    table = find_table("sm_90", 132, [tmp_path / "plans"])
    assert table is not None and not table.note
    assert {entry.strategy for entry in table.entries} == {"fused"}

    assert main(arguments) == 2
    assert "already exists: continue it with --resume" in capsys.readouterr().err
    bench.swept.clear()
    bench.wrong = {"fused": "y is off by 1.0e-01"}
    assert main([*arguments[:-1], "16,32", "--resume"]) == 1
    assert {point.rank for _, point, _ in bench.swept} == {32}
    printed = capsys.readouterr().out
    assert printed.count("FAILED llama-3-8b.") == 2
    assert f"6 entries in {path}" in printed
