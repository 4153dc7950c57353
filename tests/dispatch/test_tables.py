"""Tables of measured plans: the nearest entry answers; a file that cannot be used is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastbound.kernels.tiles import GemmTile, Tile
from hypothesis import given
from hypothesis import strategies as st

import fastbound
from fastbound.dispatch import tables as plan_tables
from fastbound.dispatch.device import Device, describe
from fastbound.dispatch.entries import FORMS, BlockEntry, Entry
from fastbound.dispatch.plan import plan_for, plan_key
from fastbound.dispatch.tables import PlanTable, find_table, read_table, software, write_table
from tests.support.models import Gated
from tests.support.plans import planned

HOPPER = Device("sm_90", 132)
GEMM = GemmTile(128, 128, 64, 8, 4, descriptors=True)
GEMM_T = GemmTile(256, 128, 64, 8, 4, descriptors=True, stores=4)
ENTRY = Entry(
    N=14336,
    K=4096,
    M=8192,
    R=16,
    dtype="bfloat16",
    strategy="split",
    gemm=GEMM,
    gemm_t=GEMM_T,
    thin=Tile(32, 256, 4, 3),
    reduce=Tile(64, 128, 4, 3),
    origin="measured 2026-01-02 on a card",
)
BLOCK = BlockEntry(
    N=14336,
    M=8192,
    R=16,
    dtype="bfloat16",
    form="gated silu",
    activate=Tile(64, 64, 4, 3),
    gated=Tile(32, 32, 8, 1),
    origin="measured 2026-01-03 on a card",
)
TABLE = PlanTable("sm_90", "a card", 132, (ENTRY,), versions=software(), blocks=(BLOCK,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a sound table of sm_90."""
    write_table(tmp_path / "sm_90.json", TABLE)
    return tmp_path


def damage(folder: Path, change: Callable[[Any], Any]) -> Path:
    path = folder / "sm_90.json"
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))
    return path


def test_a_table_is_read_as_it_was_written(folder: Path) -> None:
    path = folder / "sm_90.json"
    table = read_table(path)
    assert table.entries == (ENTRY,) and table.blocks == (BLOCK,)
    assert (table.architecture, table.device, table.multiprocessors) == ("sm_90", "a card", 132)
    assert table.versions == software()


def test_an_entry_decides_strategy_and_tiles_and_says_where_from(folder: Path) -> None:
    table = read_table(folder / "sm_90.json")
    chosen = planned(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, table=table)
    default = planned(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16)
    assert chosen.strategy == "split" and not chosen.candidates
    assert default.candidates == ("split", "torch", "fused")
    assert chosen.tiles is not None and default.tiles is not None
    assert chosen.tiles == replace(
        default.tiles,
        gemm=ENTRY.gemm,
        gemm_t=ENTRY.gemm_t,
        thin=ENTRY.thin,
        reduce=ENTRY.reduce,
    )
    assert "measured 2026-01-02 on a card: N 14336, K 4096, 8192 rows" in chosen.reason
    assert str(folder / "sm_90.json") in chosen.reason


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"M": 5000}, True),
        ({"K": 64}, True),  # no matter to its passes
        ({"N": 11008, "M": 4096}, True),
        ({"M": 1024}, False),
        ({"N": 14335}, False),
        ({"rank": 16}, False),
        ({"rank": 64}, False),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float32}, False),
        ({"form": "plain silu"}, False),
        ({"form": "gated gelu"}, False),
        ({"form": None}, False),
    ],
)
def test_a_block_takes_its_own_two_tiles_from_an_entry_of_its_form(
    change: dict[str, Any], found: bool, folder: Path
) -> None:
    """A block of rank 16 looks a layer of rank 32 up, of which this table has none."""
    asked = {"M": 8192, "N": 14336, "K": 4096, "rank": 32, "dtype": torch.bfloat16}
    asked = {**asked, "form": "gated silu", **change}
    table = read_table(folder / "sm_90.json")
    default = planned(HOPPER, **asked, backend="fused").tiles
    for backend in ("auto", "fused"):
        chosen = planned(HOPPER, **asked, backend=backend, table=table)
        assert default is not None and chosen.tiles is not None
        own = f"; activate and gated measured 2026-01-03 on a card: {BLOCK}, in {table.path}"
        assert chosen.reason.endswith(own) is found
        if found:
            expected = replace(default, activate=BLOCK.activate, gated=BLOCK.gated)
            assert chosen.tiles == expected
        else:
            kept = (chosen.tiles.activate, chosen.tiles.gated)
            assert kept == (default.activate, default.gated)


def test_a_block_without_an_entry_near_says_that_its_own_tiles_are_the_defaults(
    folder: Path,
) -> None:
    path = folder / "sm_90.json"
    write_table(path, replace(TABLE, entries=(replace(ENTRY, R=32),), blocks=()))
    asked = (8192, 14336, 4096, 32, torch.bfloat16)
    chosen = planned(HOPPER, *asked, table=read_table(path), form="gated silu")
    assert chosen.reason.startswith("measured 2026-01-02 on a card: N 14336")
    assert f"; activate and gated by default: no similar block in {path}" in chosen.reason
    assert "gated" not in planned(HOPPER, *asked, table=read_table(path)).reason


def test_the_nearest_block_answers() -> None:
    far = replace(BLOCK, M=2048, activate=Tile(16, 64, 4, 1))
    table = replace(TABLE, blocks=(far, BLOCK))
    asked = (14336, 4096, 32, torch.bfloat16, "fused", "gated silu")
    for M, entry in ((8192, BLOCK), (2000, far)):
        chosen = planned(HOPPER, M, *asked, table=table).tiles
        assert chosen is not None and chosen.activate == entry.activate


def test_a_path_asked_for_by_name_takes_the_measured_tiles() -> None:
    chosen = planned(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, "fused", table=TABLE)
    assert chosen.strategy == "fused"
    assert chosen.tiles is not None and (chosen.tiles.gemm, chosen.tiles.gemm_t) == (GEMM, GEMM_T)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"M": 5000}, True),  # in the bucket of 8192
        ({"N": 11008, "K": 4096}, True),
        ({"M": 2048}, True),
        ({"M": 1}, False),
        ({"N": 1024}, False),
        ({"rank": 32}, False),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float32}, False),
        ({"N": 14335}, False),
    ],
)
def test_only_shapes_near_an_entry_are_answered_by_it(change: dict[str, Any], found: bool) -> None:
    asked = {"M": 8192, "N": 14336, "K": 4096, "rank": 16, "dtype": torch.bfloat16, **change}
    assert ("measured" in planned(HOPPER, **asked, table=TABLE).reason) is found


def test_the_nearest_of_several_entries_answers() -> None:
    far = replace(ENTRY, M=2048, strategy="torch")
    table = PlanTable("sm_90", "a card", 132, (far, ENTRY))
    asked = (14336, 4096, 16, torch.bfloat16)
    assert planned(HOPPER, 8192, *asked, table=table).strategy == "split"
    few = planned(HOPPER, 1500, *asked, table=table)
    assert (few.strategy, few.tiles) == ("torch", None)


tiles_of_any_size = st.builds(
    Tile, *(st.sampled_from([16, 64, 512]),) * 2, st.sampled_from([4, 8]), st.integers(1, 5)
)


@given(
    entries=st.lists(
        st.builds(
            Entry,
            *(st.integers(1, 300_000),) * 2,
            st.sampled_from([1, 64, 2**14]),
            st.sampled_from([16, 32, 64]),
            st.sampled_from(["bfloat16", "float16"]),
            st.sampled_from(["fused", "split", "torch"]),
            st.just(GEMM),
            st.just(GEMM_T),
            tiles_of_any_size,
            tiles_of_any_size,
            st.just("default"),
        ),
        max_size=4,
    ),
    blocks=st.lists(
        st.builds(
            BlockEntry,
            st.integers(1, 300_000),
            st.sampled_from([1, 64, 2**14]),
            st.sampled_from([16, 32]),
            st.sampled_from(["bfloat16", "float16"]),
            st.sampled_from(FORMS),
            tiles_of_any_size,
            tiles_of_any_size,
            st.just("default"),
        ),
        max_size=4,
    ),
    form=st.sampled_from([None, *FORMS]),
    architecture=st.sampled_from(["sm_80", "sm_90", "gfx942", "sm_999", "cpu", "interpreter"]),
    M=st.integers(0, 10**7),
    N=st.integers(1, 300_000),
    K=st.integers(1, 300_000),
    rank=st.integers(1, 512),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_shape_gets_a_plan_from_any_table(
    entries: list[Entry],
    blocks: list[BlockEntry],
    form: str | None,
    architecture: str,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
) -> None:
    table = PlanTable(architecture, "a card", 100, tuple(entries), Path("table.json"))
    table = replace(table, blocks=tuple(blocks))
    chosen = planned(Device(architecture, 100), M, N, K, rank, dtype, table=table, form=form)
    assert chosen.strategy in ("fused", "split", "torch") and chosen.reason
    assert (chosen.tiles is None) == (chosen.strategy == "torch")
    if chosen.tiles is not None:
        chosen_tiles = chosen.tiles
        tiles = [getattr(chosen_tiles, kind) for kind in asdict(chosen_tiles)]
        sizes = [size for t in tiles for name, size in asdict(t).items() if name[:5] == "block"]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def set_tile(name: str, key: str, value: Any, kind: str = "entries") -> Callable[[Any], None]:
    return lambda content: content[kind][0]["tiles"][name].update({key: value})


def set_entry(key: str, value: Any, kind: str = "entries") -> Callable[[Any], None]:
    return lambda content: content[kind][0].update({key: value})


DAMAGE = {
    "version": (lambda c: c.update(format="fastbound plan table 0"), "has another version"),
    "a list": (lambda c: [c], "has another version: format None"),
    "no entries": (lambda c: c.pop("entries") and None, "'entries' is missing"),
    "entry": (lambda c: c["entries"].append(7), "entry 7 is not an object"),
    "odd block": (set_tile("thin", "block_m", 48), "thin tile: block_m 48"),
    "vast block": (set_tile("reduce", "block_n", 2048), "reduce tile: block_n 2048"),
    "no warps": (set_tile("gemm", "warps", 0), "gemm tile: warps 0"),
    "stores": (set_tile("gemm", "stores", 3), "gemm tile: stores 3"),
    "yes": (set_tile("gemm", "warps", True), "gemm tile: warps True"),
    "text": (set_tile("thin", "stages", "3"), "thin tile: stages '3'"),
    "unknown key": (set_tile("thin", "speed", 3), "thin tile has"),
    "strategy": (set_entry("strategy", "fast"), "strategy is 'fast', not one of fused, split"),
    "dtype": (set_entry("dtype", "float32"), "dtype is 'float32'"),
    "rows": (set_entry("M", 1000), "M is 1000: sizes are positive"),
    "negative": (set_entry("K", -1), "K is -1: sizes are positive"),
    "shared memory": (
        set_tile("gemm_t", "block_k", 512),
        "needs more shared memory than sm_90 has",
    ),
    "no blocks": (lambda c: c.pop("blocks") and None, "'blocks' is missing"),
    "block": (lambda c: c["blocks"].append("x"), "entry 'x' is not an object"),
    "block without tiles": (lambda c: c["blocks"][0].pop("tiles") and None, "'tiles' is missing"),
    "one tile": (lambda c: c["blocks"][0]["tiles"].pop("gated") and None, "'gated' is missing"),
    "odd step": (set_tile("gated", "block_n", 24, "blocks"), "gated tile: block_n 24"),
    "no stages": (set_tile("activate", "stages", 0, "blocks"), "activate tile: stages 0"),
    "form": (set_entry("form", "gated swish", "blocks"), "form is 'gated swish', not one of gated"),
    "block rank": (set_entry("R", 24, "blocks"), "R is 24: sizes are positive"),
    "parts": (
        lambda c: c["entries"][0]["tiles"]["gemm"].update(descriptors=False, stores=2),
        "stores above 1 requires descriptors",
    ),
    "descriptors": (lambda c: c.update(architecture="sm_80"), "sm_80 has no tensor descriptors"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_table_is_named_and_the_default_used(
    folder: Path, change: Callable[[Any], Any], message: str
) -> None:
    path = damage(folder, change)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_table(path)
    assert str(path) in str(raised.value)
    with pytest.warns(UserWarning, match="plan table not used"):
        table = find_table("sm_90", 132, [folder])
    assert table is not None
    chosen = planned(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, table=table)
    assert chosen.tiles == planned(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16).tiles
    assert chosen.reason.startswith("default tiles of sm_90 (plan table not used: ")
    assert message in chosen.reason


def test_a_file_that_is_no_json_is_damaged(folder: Path) -> None:
    (folder / "sm_90.json").write_text('{"format": "fastbound plan ')
    with pytest.raises(ValueError, match=r"sm_90\.json is damaged: not JSON"):
        read_table(folder / "sm_90.json")


def test_a_table_of_another_gpu_is_not_used(folder: Path) -> None:
    with pytest.warns(UserWarning, match="was measured on a card .*132 multiprocessors.* with 114"):
        table = find_table("sm_90", 114, [folder])
    assert table is not None and not table.entries


def test_the_first_folder_goes_before_and_a_damaged_one_gives_way(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mine = tmp_path_factory.mktemp("mine")
    own = PlanTable("sm_90", "a card", 132, (replace(ENTRY, strategy="fused"),))
    write_table(mine / "sm_90.json", own)
    first = find_table("sm_90", 132, [mine, folder])
    assert first is not None and first.entries[0].strategy == "fused" and not first.note
    (mine / "sm_90.json").write_text("")
    with pytest.warns(UserWarning):
        second = find_table("sm_90", 132, [mine, folder])
    assert second is not None
    chosen = planned(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, table=second)
    assert chosen.strategy == "split"
    assert str(folder) in chosen.reason and str(mine) in chosen.reason
    assert find_table("sm_80", 108, [mine, folder]) is None


def test_a_table_of_other_versions_is_used_and_they_are_said(folder: Path) -> None:
    write_table(folder / "sm_90.json", replace(TABLE, versions={"triton": "3.0.1"}))
    table = find_table("sm_90", 132, [folder])
    chosen = planned(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, table=table)
    assert chosen.strategy == "split"
    assert "(measured with triton 3.0.1, installed is " in chosen.reason


def test_shipped_tables_are_sound() -> None:
    for path in plan_tables.SHIPPED.glob("*.json"):
        assert read_table(path).architecture == path.stem


@pytest.fixture
def explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """What `explain` prints with a table in the user's folder, on its GPU: the lookup, whole."""
    from fastbound.dispatch import plan as plan_module
    from fastbound.models import explanation
    from fastbound.operator.engine import forget

    monkeypatch.setattr(plan_tables, "user_folder", lambda: folder)
    fastbound.set_planning("measured")
    for module in (explanation, plan_module):
        monkeypatch.setattr(module, "describe", lambda *device: HOPPER)

    def text(table: PlanTable, module: torch.nn.Module, tokens: int) -> str:
        write_table(folder / "sm_90.json", table)
        forget()
        return str(fastbound.explain(module, tokens=tokens))

    yield text
    fastbound.set_planning("fixed")


def test_explain_prints_where_a_plan_comes_from(
    folder: Path, explained: Callable[..., str]
) -> None:
    small = PlanTable("sm_90", "a card", 132, (replace(ENTRY, N=256, K=64),))
    layer = fastbound.FusedBoundedLinear(64, 256, 16, dtype=torch.bfloat16)
    text = explained(small, layer, 8000)
    assert "split: measured 2026-01-02 on a card" in text
    assert str(folder / "sm_90.json") in text
    assert "gated" not in text
    far = explained(small, layer, 8)
    assert "split: few rows: below 512 nothing is timed; default tiles of sm_90" in far
    assert f"no similar shape in {folder / 'sm_90.json'}" in far


def test_explain_prints_the_tiles_of_a_block_and_where_they_come_from(
    explained: Callable[..., str],
) -> None:
    entry = replace(ENTRY, N=256, K=64, R=32, strategy="fused")
    table = replace(TABLE, entries=(entry,), blocks=(replace(BLOCK, N=256),))
    block = fastbound.FusedBoundedMLP.from_mlp(Gated(K=64, N=256).bfloat16(), rank=16)
    text = explained(table, block, 8000)
    assert "in its block, split: a fused GEMM would fill" in text
    assert "; measured 2026-01-02 on a card: N 256, K 64, 8192 rows" in text
    assert "activate and gated measured 2026-01-03 on a card: gated silu, N 256, 8192 rows" in text
    for line in (f"thin     {ENTRY.thin}", f"activate {BLOCK.activate}", f"gated    {BLOCK.gated}"):
        assert f"\n  {line}" in text
    default = explained(replace(table, blocks=()), block, 8000)
    assert "activate and gated by default: no similar block in" in default
    assert "\n  gated    64x64, 8 warps, 2 stages" in default


def test_a_cpu_looks_for_no_table() -> None:
    assert describe(torch.device("cpu")).architecture in ("cpu", "interpreter")
    assert (
        plan_for(plan_key(torch.device("cpu"), 64, 64, 64, 8, torch.bfloat16)).strategy == "torch"
    )
