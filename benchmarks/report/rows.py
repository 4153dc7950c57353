"""Saved benchmarks as a Markdown table and plots, and files of gpu_check as the README's tables.

pytest benchmarks/ --benchmark-only --benchmark-json run.json
python -m benchmarks.report run.json [another.json ...] --output DIR
python -m benchmarks.report benchmarks/results/ --output DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class Row:
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
    def of(cls, extra_info: Mapping[str, Any], stats: Mapping[str, Any]) -> Row:
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


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Machine facts and rows of one file that `--benchmark-json` or `--benchmark-save` wrote.

    Raises:
        ValueError: the file is not such a file, or holds no row of these benchmarks.
    """
    try:
        saved = json.loads(path.read_text())
        machine = {**saved["machine_info"]["fastbound"], "commit": saved["commit_info"].get("id")}
        rows = [
            Row.of(bench["extra_info"], bench["stats"])
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


def ratio_table(rows: Sequence[Row]) -> str:
    """Per case and direction: medians, spread, and ratios to the floor and to both PEFT forms."""
    sections = []
    for (case, direction), group in groupby(rows, key=lambda row: (row.case, row.direction)):
        members = {row.competitor: row for row in group}
        sections.append(f"{case}, {direction}\n\n" + _one_table(members))
    return "\n\n".join(sections)


def _one_table(members: Mapping[str, Row]) -> str:
    head = (
        "competitor",
        "median ms",
        "IQR",
        "min ms",
        "x frozen",
        "peft_fp32 / it",
        "peft_bf16 / it",
        "saved MiB",
        "peak MiB",
        "path",
    )

    def ratio(over: str | Row, under: str | Row) -> str:
        top, bottom = (members.get(x) if isinstance(x, str) else x for x in (over, under))
        return "-" if top is None or bottom is None else f"{top.median / bottom.median:.3f}"

    lines = [
        (
            row.competitor,
            f"{row.median * 1e3:.3f}",
            f"{(row.q3 - row.q1) / row.median:.0%}",
            f"{row.min * 1e3:.3f}",
            ratio(row, "frozen"),
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


def markdown(machine: Mapping[str, Any], rows: Sequence[Row], plots: Sequence[Path]) -> str:
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


def write_report(path: Path, output: Path) -> Path:
    """Read one saved file, write its Markdown and PNG files into `output`, return the Markdown."""
    from benchmarks.report.plots import draw

    machine, rows = read(path)
    output.mkdir(parents=True, exist_ok=True)
    target = output / f"{path.stem}.md"
    plots = draw(machine["device"], rows, output, path.stem)
    target.write_text(markdown(machine, rows, plots))
    return target


def write_readme_tables(folder: Path, output: Path) -> Path:
    """`gpu.md` in `output`, from every gpu_check file of a folder; others are named and left out.

    Raises:
        ValueError: the folder holds no such file.
    """
    from benchmarks.report.readme import read_checks, readme_section

    found, refused = read_checks([folder])
    for path, reason in refused.items():
        print(f"{path} left out: {reason}", file=sys.stderr)
    if not found:
        raise ValueError(f"{folder} holds no file of gpu_check")
    output.mkdir(parents=True, exist_ok=True)
    target = output / "gpu.md"
    target.write_text("\n\n".join(map(readme_section, found.values())) + "\n")
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "saved",
        nargs="+",
        type=Path,
        help="JSON files saved by pytest-benchmark, or folders of gpu_check files",
    )
    parser.add_argument("--output", type=Path, default=Path(), help="folder (default: this one)")
    options = parser.parse_args(arguments)
    try:
        for path in options.saved:
            write = write_readme_tables if path.is_dir() else write_report
            print(write(path, options.output))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0
