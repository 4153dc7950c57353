"""Rows as tables and plots, and two saved runs compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import compare, plots
from benchmarks.report.rows import BenchmarkRow, ratio_table, read
from benchmarks.rivals.competitors import (
    BLOCK_COMPETITORS,
    LAYER_COMPETITORS,
    PRODUCT_COMPETITORS,
)
from fastbound.figures import within_reach
from fastbound.performance.profiling.report import NAMES, colour


def row(competitor: str, median: float, spread: float = 0.0) -> dict[str, Any]:
    info = {"model": "m", "projection": "p", "M": 1, "K": 2, "N": 3, "rank": 4}
    info |= {"dtype": "bfloat16", "direction": "forward", "competitor": competitor}
    stats = {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread)}
    return {
        **info,
        "path": "",
        "saved_bytes": 0,
        "peak_bytes": None,
        **stats,
        "min": 1,
        "rounds": 3,
    }


def pytest_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As pytest-benchmark saves it."""
    stats = ("median", "q1", "q3", "min", "rounds")
    benchmarks = [
        {
            "extra_info": {k: v for k, v in r.items() if k not in stats},
            "stats": {k: v for k, v in r.items() if k in stats},
        }
        for r in rows
    ]
    saved = {"machine_info": {"fastbound": {"device": "d"}}, "commit_info": {}}
    path.write_text(json.dumps({**saved, "benchmarks": benchmarks}))
    return path


@pytest.mark.parametrize(
    ("slower", "spread", "status"),
    [(1.02, 0.0, 0), (1.04, 0.0, 1), (1.04, 0.02, 0), (1.06, 0.02, 1), (0.5, 0.0, 0)],
)
def test_worse_means_more_than_three_per_cent_beyond_the_spread(
    tmp_path: Path, slower: float, spread: float, status: int
) -> None:
    """The spread here is that of the competitor alone: half its interquartile range."""
    before = pytest_json(tmp_path / "a.json", [row("frozen", 1.0), row("fused", 1.1)])
    after = [row("frozen", 2.0), row("fused", 2.2 * slower, spread)]  # another clock, same ratio
    assert compare.main([str(before), str(pytest_json(tmp_path / "b.json", after))]) == status


def test_files_that_cannot_be_compared_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = pytest_json(tmp_path / "good.json", [row("frozen", 1.0), row("fused", 1.1)])
    other = [{**r, "M": 2} for r in (row("frozen", 1.0), row("fused", 1.1))]
    apart = pytest_json(tmp_path / "apart.json", other)
    alone = pytest_json(tmp_path / "alone.json", [row("fused", 1.1)])
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for path, said in (
        (apart, "no ratio in common"),
        (alone, "alone.json holds no ratio"),
        (damaged, "damaged.json cannot be read as JSON"),
        (tmp_path / "none.json", "none.json cannot be read"),
    ):
        assert compare.main([str(good), str(path)]) == 2
        assert said in capsys.readouterr().err


def test_ratios_are_of_medians() -> None:
    table = ratio_table(
        [
            BenchmarkRow(**row("frozen", 2.0)),
            BenchmarkRow(**row("fused", 2.5)),
            BenchmarkRow(**row("peft_fp32", 5.0)),
        ]
    )
    fused = next(line for line in table.splitlines() if line.startswith("| fused"))
    cells = [cell.strip() for cell in fused.strip("|").split("|")]
    assert cells[4:7] == ["1.250", "2.000", "-"]  # x frozen, peft_fp32 / it, peft_bf16 / it


def test_time_is_not_plotted_without_a_floor(tmp_path: Path) -> None:
    assert plots.draw("a device", [BenchmarkRow(**row("fused", 2.0))], tmp_path, "x") == [
        tmp_path / "x-saved.png"
    ]


def test_every_competitor_has_a_name_and_a_colour_of_its_own() -> None:
    competitors = (*LAYER_COMPETITORS, *BLOCK_COMPETITORS, *PRODUCT_COMPETITORS)
    names = {competitor.name for competitor in competitors}
    assert names <= set(NAMES)
    assert len({NAMES[name] for name in names}) == len({colour(name) for name in names}) == 12


def test_one_outlier_does_not_set_the_axis() -> None:
    assert within_reach([1.0, 1.1, 2.7, 14.0]) == 2.7
    assert within_reach([1.0, 1.2, 1.4]) == 1.4
    assert within_reach([5.0]) == 5.0


def test_a_smoke_run_says_so_in_the_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: titles.append(figure.get_suptitle())
    )
    for model in ("tiny", "tiny-gated", "llama-1k"):
        plots.draw(
            "a device", [BenchmarkRow(**{**row("fused", 2.0), "model": model})], tmp_path, "x"
        )
    assert [plots.SMOKE in title for title in titles] == [True, True, False]


def test_report_names_a_file_that_is_not_a_saved_run(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"other\.json does not look like JSON saved by"):
        read(path)
