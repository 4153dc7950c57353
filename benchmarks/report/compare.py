"""Whether one saved run is slower: `python -m benchmarks.report.compare BEFORE.json AFTER.json`.

Compares ratios, never times: a layer over the frozen layer of its own run, and of a gpu_check file
also a kernel over the ceilings of its own run, and every length of its profiles. Exit status 1
where a ratio grew by more than 3 % beyond the spread, 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.rows import BenchmarkRow, markdown_table, read

TOLERANCE = 0.03


@dataclass(frozen=True)
class Point:
    """A ratio, and its spread: half the interquartile ranges of both its parts, relative."""

    ratio: float
    spread: float


@dataclass(frozen=True)
class Comparison:
    """One ratio in both files; ``allowed`` is the largest factor that passes."""

    name: str
    before: float
    after: float
    allowed: float

    @property
    def factor(self) -> float:
        return self.after / self.before

    @property
    def worse(self) -> bool:
        return not self.factor <= self.allowed


def points(path: Path) -> dict[str, Point]:
    """Every ratio of a file of pytest-benchmark or of gpu_check.

    Raises:
        ValueError: the file is neither, or holds no ratio.
    """
    try:
        saved = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if isinstance(saved, dict) and str(saved.get("format", "")).startswith("fastbound gpu_check"):
        found = dict(_of_check(saved))
    else:
        found = dict(_of_rows(read(path)[1]))
    if not found:
        raise ValueError(f"{path} holds no ratio: was the frozen layer, or every layer, left out?")
    return found


def compare(before: Mapping[str, Point], after: Mapping[str, Point]) -> list[Comparison]:
    """What both have, in the order of ``before``."""
    return [
        Comparison(
            name,
            point.ratio,
            after[name].ratio,
            1 + TOLERANCE + max(point.spread, after[name].spread),
        )
        for name, point in before.items()
        if name in after
    ]


def _of_rows(rows: Sequence[BenchmarkRow]) -> Iterator[tuple[str, Point]]:
    floors = {(row.case, row.direction): row for row in rows if row.competitor == "frozen"}
    for row in rows:
        floor = floors.get((row.case, row.direction))
        if floor is None or row is floor:
            continue
        spread = _half_range(row.q1, row.median, row.q3)
        spread += _half_range(floor.q1, floor.median, floor.q3)
        name = f"{row.case}, {row.direction}, {row.competitor} / frozen"
        yield name, Point(row.median / floor.median, spread)


def _of_check(saved: Mapping[str, Any]) -> Iterator[tuple[str, Point]]:
    measured = saved.get("benchmark", {})
    yield from _of_rows([BenchmarkRow(**row) for row in measured.get("rows", [])])
    for kernel in measured.get("kernels", []):
        if kernel["ceiling"]:
            name = f"{kernel['shape']}, M={kernel['M']}, {kernel['kernel']} / ceiling"
            spread = _half_range(kernel["q1"], kernel["median"], kernel["q3"])
            yield name, Point(kernel["median"] / kernel["ceiling"], spread)

    for report in saved.get("profile", {}).get("reports", []):
        yield from _of_profile(report)


def _of_profile(report: Mapping[str, Any]) -> Iterator[tuple[str, Point]]:
    reached = [point for point in report["points"] if point["over_floor"] is not None]
    floors = {p["tokens"]: p for p in reached if p["variant"] == "frozen"}
    for point in reached:
        if point["variant"] != "frozen":
            name = f"profile of {report['model']}.{point['place']}, M={point['tokens']}"
            pair = (point, floors[point["tokens"]])
            spread = sum(_half_range(p["q1"], p["median"], p["q3"]) for p in pair)
            yield f"{name}, {point['variant']} / frozen", Point(point["over_floor"], spread)


def _half_range(q1: float, median: float, q3: float) -> float:
    return (q3 - q1) / median / 2


def table(comparisons: Sequence[Comparison]) -> str:
    lines = [
        [
            c.name,
            f"{c.before:.3f}",
            f"{c.after:.3f}",
            f"{c.factor:.3f}",
            f"{c.allowed:.3f}",
            "WORSE" if c.worse else "",
        ]
        for c in comparisons
    ]
    return markdown_table(["ratio", "before", "after", "factor", "allowed", ""], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.compare", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    try:
        before, after = points(options.before), points(options.after)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    comparisons = compare(before, after)
    if not comparisons:
        print(f"{options.before} and {options.after} have no ratio in common", file=sys.stderr)
        return 2
    print(table(comparisons))
    alone = len(before) + len(after) - 2 * len(comparisons)
    worse = [c for c in comparisons if c.worse]
    print(f"{len(comparisons)} compared, {alone} in one file only, {len(worse)} worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
