"""Tables of measured plans: the nearest entry answers; a file that cannot be used is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastbound.kernels.tiles import GemmTile, Tile
from hypothesis import given
from hypothesis import strategies as st

import fastbound
from fastbound import plan_tables
from fastbound.plan import Device, describe, plan, plan_for
from fastbound.plan_tables import (
    Entry,
    PlanTable,
    find_table,
    read_table,
    software,
    write_table,
)

HOPPER = Device("sm_90", 132)
GEMM = GemmTile(128, 128, 64, 8, 4, descriptors=True)
GEMM_T = GemmTile(256, 128, 64, 8, 3, descriptors=True)
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
TABLE = PlanTable("sm_90", "a card", 132, (ENTRY,), versions=software())


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
    assert table.entries == (ENTRY,)
    assert (table.architecture, table.device, table.multiprocessors) == ("sm_90", "a card", 132)
    assert table.versions == software()


def test_an_entry_decides_strategy_and_tiles_and_says_where_from(folder: Path) -> None:
    table = read_table(folder / "sm_90.json")
    chosen = plan(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, table=table)
    default = plan(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16)
    assert chosen.strategy == "split" and default.strategy == "fused"
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


def test_a_path_asked_for_by_name_takes_the_measured_tiles() -> None:
    chosen = plan(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, "fused", TABLE)
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
    assert ("measured" in plan(HOPPER, **asked, table=TABLE).reason) is found


def test_the_nearest_of_several_entries_answers() -> None:
    far = replace(ENTRY, M=2048, strategy="torch")
    table = PlanTable("sm_90", "a card", 132, (far, ENTRY))
    asked = (14336, 4096, 16, torch.bfloat16)
    assert plan(HOPPER, 8192, *asked, table=table).strategy == "split"
    few = plan(HOPPER, 1500, *asked, table=table)
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
    architecture=st.sampled_from(["sm_80", "sm_90", "gfx942", "sm_999", "cpu", "interpreter"]),
    M=st.integers(0, 10**7),
    N=st.integers(1, 300_000),
    K=st.integers(1, 300_000),
    rank=st.integers(1, 512),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_shape_gets_a_plan_from_any_table(
    entries: list[Entry],
    architecture: str,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
) -> None:
    table = PlanTable(architecture, "a card", 100, tuple(entries), Path("table.json"))
    chosen = plan(Device(architecture, 100), M, N, K, rank, dtype, table=table)
    assert chosen.strategy in ("fused", "split", "torch") and chosen.reason
    assert (chosen.tiles is None) == (chosen.strategy == "torch")
    if chosen.tiles is not None:
        chosen_tiles = chosen.tiles
        tiles = [getattr(chosen_tiles, kind) for kind in ("gemm", "gemm_t", "thin", "reduce")]
        sizes = [size for t in tiles for name, size in asdict(t).items() if name[:5] == "block"]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def set_tile(name: str, key: str, value: Any) -> Callable[[Any], None]:
    return lambda content: content["entries"][0]["tiles"][name].update({key: value})


def set_entry(key: str, value: Any) -> Callable[[Any], None]:
    return lambda content: content["entries"][0].update({key: value})


DAMAGE = {
    "version": (lambda c: c.update(format="fastbound plan table 0"), "is of another version"),
    "a list": (lambda c: [c], "is of another version: format None"),
    "no entries": (lambda c: c.pop("entries") and None, "'entries' is missing"),
    "entry": (lambda c: c["entries"].append(7), "entry 7 is no object"),
    "odd block": (set_tile("thin", "block_m", 48), "thin tile: block_m 48"),
    "vast block": (set_tile("reduce", "block_n", 2048), "reduce tile: block_n 2048"),
    "no warps": (set_tile("gemm", "warps", 0), "gemm tile: warps 0"),
    "yes": (set_tile("gemm", "warps", True), "gemm tile: warps True"),
    "text": (set_tile("thin", "stages", "3"), "thin tile: stages '3'"),
    "unknown key": (set_tile("thin", "speed", 3), "thin tile has"),
    "strategy": (set_entry("strategy", "fast"), "strategy 'fast', not one of fused, split"),
    "dtype": (set_entry("dtype", "float32"), "dtype 'float32'"),
    "rows": (set_entry("M", 1000), "M 1000 of an entry"),
    "negative": (set_entry("K", -1), "K -1 of an entry"),
    "shared memory": (
        set_tile("gemm_t", "block_k", 512),
        "needs more shared memory than sm_90 has",
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
    chosen = plan(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, table=table)
    assert chosen.tiles == plan(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16).tiles
    assert chosen.reason.startswith("default tiles of sm_90 (plan table not used: ")
    assert message in chosen.reason


def test_a_file_that_is_no_json_is_damaged(folder: Path) -> None:
    (folder / "sm_90.json").write_text('{"format": "fastbound plan ')
    with pytest.raises(ValueError, match=r"sm_90\.json is damaged: no JSON"):
        read_table(folder / "sm_90.json")


def test_a_table_of_another_gpu_is_not_used(folder: Path) -> None:
    with pytest.warns(UserWarning, match="is of a card .*132 multiprocessors.* with 114"):
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
    chosen = plan(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, table=second)
    assert chosen.strategy == "split"
    assert str(folder) in chosen.reason and str(mine) in chosen.reason
    assert find_table("sm_80", 108, [mine, folder]) is None


def test_a_table_of_other_versions_is_used_and_they_are_said(folder: Path) -> None:
    write_table(folder / "sm_90.json", replace(TABLE, versions={"triton": "3.0.1"}))
    table = find_table("sm_90", 132, [folder])
    chosen = plan(HOPPER, 8192, 14336, 4096, 16, torch.bfloat16, table=table)
    assert chosen.strategy == "split"
    assert "(measured with triton 3.0.1, here is " in chosen.reason


def test_shipped_tables_are_sound() -> None:
    for path in plan_tables.SHIPPED.glob("*.json"):
        assert read_table(path).architecture == path.stem


def test_explain_prints_where_a_plan_comes_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lookup of a GPU, whole: from the file in the user's folder to the printed reason."""
    from fastbound import explanation, ops
    from fastbound import plan as plan_module

    small = PlanTable("sm_90", "a card", 132, (replace(ENTRY, N=256, K=64),))
    write_table(folder / "sm_90.json", small)
    monkeypatch.setattr(plan_tables, "user_folder", lambda: folder)
    for module in (explanation, plan_module):
        monkeypatch.setattr(module, "describe", lambda *device: HOPPER)
    caches = (plan_tables.table_for, plan_module._cached_plan, ops._planned)
    for cache in caches:
        cache.cache_clear()
    try:
        layer = fastbound.FusedBoundedLinear(64, 256, 16, dtype=torch.bfloat16)
        text = str(fastbound.explain(layer, tokens=8000))
        assert "split: measured 2026-01-02 on a card" in text
        assert str(folder / "sm_90.json") in text
        far = str(fastbound.explain(layer, tokens=8))
        assert "split: few rows: too few blocks of 128x256; default tiles of sm_90" in far
        assert f"nothing near in {folder / 'sm_90.json'}" in far
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_cpu_looks_for_no_table() -> None:
    assert describe("cpu").architecture in ("cpu", "interpreter")
    assert plan_for(torch.device("cpu"), 64, 64, 64, 8, torch.bfloat16).strategy == "torch"
