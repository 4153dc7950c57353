"""Saved benchmarks as a Markdown table and plots, and files of gpu_check as the README's tables.

pytest benchmarks/ --benchmark-only --benchmark-json run.json
python -m benchmarks.report run.json [another.json ...] --output DIR
python -m benchmarks.report benchmarks/results/ --output DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.plots import draw
from benchmarks.report.readme import read_checks, readme_section
from benchmarks.report.rows import markdown, read


def write_report(path: Path, output: Path) -> Path:
    """Read one saved file, write its Markdown and PNG files into `output`, return the Markdown."""
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


if __name__ == "__main__":
    sys.exit(main())
