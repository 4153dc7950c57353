"""Rows of benchmarks: what one is, read from a saved file, and set as Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class BenchmarkRow:
    """One competitor on one case in one direction; seconds and bytes."""

    model: str
    projection: str
    M: int
    K: int
    N: int
    rank: int
    dtype: str
    direction: str
    competitor: str
    path: str
    saved_bytes: int
    peak_bytes: int | None
    median: float
    q1: float
    q3: float
    min: float
    rounds: int

    @classmethod
    def of(cls, extra_info: Mapping[str, Any], stats: Mapping[str, Any]) -> BenchmarkRow:
        """A row from what pytest-benchmark keeps of one test."""
        values = {**stats, **extra_info}
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def shape(self) -> str:
        return (
            f"{self.model}.{self.projection}, K={self.K}, N={self.N}, r={self.rank}, {self.dtype}"
        )

    @property
    def case(self) -> str:
        return f"{self.shape}, M={self.M}"


def read(path: Path) -> tuple[dict[str, Any], list[BenchmarkRow]]:
    """Machine facts and rows of one file that `--benchmark-json` or `--benchmark-save` wrote.

    Raises:
        ValueError: the file is not such a file, or holds no row of these benchmarks.
    """
    try:
        saved = json.loads(path.read_text())
        machine = {**saved["machine_info"]["fastbound"], "commit": saved["commit_info"].get("id")}
        rows = [
            BenchmarkRow.of(bench["extra_info"], bench["stats"])
            for bench in saved["benchmarks"]
            if "competitor" in bench["extra_info"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not look like JSON saved by `pytest benchmarks/`: {error!r}"
        ) from error
    if not rows:
        raise ValueError(
            f"{path} holds no layer's benchmark: were bench_linear.py and bench_mlp.py left out?"
        )
    return machine, rows


def ratio_table(rows: Sequence[BenchmarkRow]) -> str:
    """Per case and direction: medians, spread, and ratios to the floor and to both PEFT forms."""
    sections = []
    for (case, direction), group in groupby(rows, key=lambda row: (row.case, row.direction)):
        members = {row.competitor: row for row in group}
        sections.append(f"{case}, {direction}\n\n" + _one_table(members))
    return "\n\n".join(sections)


def _one_table(members: Mapping[str, BenchmarkRow]) -> str:
    head = (
        "competitor",
        "median ms",
        "IQR",
        "min ms",
        "x frozen",
        *(["x trained"] if "trained" in members else []),
        "peft_fp32 / it",
        "peft_bf16 / it",
        "saved MiB",
        "peak MiB",
        "path",
    )

    def ratio(over: str | BenchmarkRow, under: str | BenchmarkRow) -> str:
        top, bottom = (members.get(x) if isinstance(x, str) else x for x in (over, under))
        return "-" if top is None or bottom is None else f"{top.median / bottom.median:.3f}"

    lines = [
        (
            row.competitor,
            f"{row.median * 1e3:.3f}",
            f"{(row.q3 - row.q1) / row.median:.0%}",
            f"{row.min * 1e3:.3f}",
            ratio(row, "frozen"),
            *([ratio(row, "trained")] if "trained" in members else []),
            ratio("peft_fp32", row),
            ratio("peft_bf16", row),
            f"{row.saved_bytes / MIB:.2f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / MIB:.1f}",
            row.path,
        )
        for row in members.values()
    ]
    return markdown_table(head, lines)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too; numbers to the right."""
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    right = [all(line[i][:1] in "0123456789-" for line in lines) for i in range(len(head))]

    def text(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + (":" if to_right else "-")
        for width, to_right in zip(widths, right, strict=True)
    ]
    return "\n".join([text(head), text(rule), *map(text, lines)])


def markdown(
    machine: Mapping[str, Any], rows: Sequence[BenchmarkRow], plots: Sequence[Path]
) -> str:
    """The whole report of one file."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    lines = [f"# {machine['device']}", "", facts + ".", ""]
    lines += [
        f"Medians over {min(row.rounds for row in rows)} or more interleaved rounds. `x frozen` is "
        "the time over that of the bare layer without an adapter; `peft_fp32 / it` how many times "
        "as fast as PEFT's default it is.",
        "",
    ]
    lines += [f"![{plot.stem}]({plot.name})" for plot in plots]
    for (case, direction), group in groupby(rows, key=lambda row: (row.case, row.direction)):
        members = {row.competitor: row for row in group}
        lines += ["", f"## {case}, {direction}", "", _one_table(members)]
    return "\n".join(lines) + "\n"
