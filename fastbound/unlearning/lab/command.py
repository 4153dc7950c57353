"""`fastbound lab`: a grid from its flags; the work is in `grid`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.output import writing
from fastbound.unlearning.data.rows import authors, load_rows
from fastbound.unlearning.lab.cell import CellConfig
from fastbound.unlearning.lab.grid import Grid, read_models, run_grid
from fastbound.unlearning.lab.plots import draw
from fastbound.unlearning.lab.summary import lines_of, ranges_of, table_of
from fastbound.unlearning.runs.folder import write_json

_QUICK_RATES = (1e-3, 1e-2, 1e-1)
_QUICK_SEEDS = 2
_QUICK_STEPS = 150


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; the table goes to standard output.

    Raises:
        InputError: rows, settings or output folder cannot be used.
    """

    if (arguments.forget is None) != (arguments.retain is None):
        raise InputError("give --forget and --retain together, or neither")
    grid = _grid(arguments)
    forget = load_rows(arguments.forget or authors("forget"))
    retain = load_rows(arguments.retain or authors("retain"))
    output = Path(arguments.output)
    with writing(output):
        return _map(arguments, grid, forget, retain, output)


def _map(arguments: argparse.Namespace, grid: Grid, forget: Any, retain: Any, output: Path) -> int:
    cells = run_grid(
        forget, retain, grid, output, workers=arguments.workers, resume=arguments.resume
    )
    models = read_models(output)
    lines = lines_of(cells, max(each["vocabulary"] for each in models.values()))
    write_json(
        output / "summary.json",
        {
            "rows": {"forget": len(forget), "retain": len(retain)},
            "grid": dataclasses.asdict(grid),
            "models": models,
            "seconds": round(sum(cell["seconds"] for cell in cells), 1),
            "ranges": ranges_of(lines),
            "lines": [dataclasses.asdict(line) for line in lines],
        },
    )
    draw(cells, output)
    before = sum(each["utility"] for each in models.values()) / len(models)
    print(f"utility on the retain rows ({before:.3f} before), mean ± sd of {grid.seeds} seeds\n")
    print(f"{table_of(lines)}\n\n* a seed did not forget")
    print(f"Written to {output}: cells.jsonl, summary.json, utility.png, size.png, gradient.png")
    return 0


def _grid(arguments: argparse.Namespace) -> Any:

    given: dict[str, Any] = {}
    if arguments.quick:
        given = {
            "rates": _QUICK_RATES,
            "seeds": _QUICK_SEEDS,
            "cell": CellConfig(steps=_QUICK_STEPS),
        }
    if arguments.adapters is not None:
        given["adapters"] = _list("--adapters", arguments.adapters, str)
    if arguments.lr is not None:
        given["rates"] = _list("--lr", arguments.lr, float)
    if arguments.ranks is not None:
        given["ranks"] = _list("--ranks", arguments.ranks, int)
    if arguments.seeds is not None:
        given["seeds"] = arguments.seeds
    if arguments.steps is not None:
        given["cell"] = CellConfig(steps=arguments.steps)
    return Grid(**given)


def _list(flag: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:

    try:
        values = tuple(kind(each.strip()) for each in text.split(",") if each.strip())
    except ValueError:
        raise InputError(f"{flag} must be numbers separated by commas, got {text!r}") from None
    if not values:
        raise InputError(f"{flag} is empty: give at least one, or leave it out")
    return values
