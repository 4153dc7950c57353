"""`fastbound lab`: its flags become a grid; `grid` does the work."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.files import writing
from fastbound.unlearning.data.rows import authors, load_rows
from fastbound.unlearning.evaluation.tofu import load_public
from fastbound.unlearning.lab.cell import CellConfig
from fastbound.unlearning.lab.grid import (
    MARKER,
    PRETRAINED_ADAPTERS,
    PRETRAINED_CELL,
    PRETRAINED_RATES,
    Grid,
    read_cells,
    read_models,
    run_grid,
)
from fastbound.unlearning.lab.plots import draw
from fastbound.unlearning.lab.subject import Pretrained
from fastbound.unlearning.lab.summary import SMALL, kept_of, lines_of, ranges_of, table_of
from fastbound.unlearning.runs.folder import finite, write_json

_QUICK_RATES = (1e-3, 1e-2, 1e-1)
_QUICK_SEEDS = 2
_QUICK_STEPS = 150


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags ask for, and print the table.

    Raises:
        InputError: rows, settings or output folder cannot be used.
    """

    if (arguments.forget is None) != (arguments.retain is None):
        raise InputError("give --forget and --retain together, or neither")
    if arguments.model is None and arguments.general is not None:
        raise InputError("--general is knowledge of a pretrained model: give --model")
    if arguments.model is not None and arguments.forget is None:
        raise InputError("--model needs --forget and --retain, the rows that it knows")
    if arguments.model is not None and arguments.quick:
        raise InputError(
            "--quick shortens the map of the tiny model, which has no --model: leave one of them "
            "out; --lr, --seeds and --steps make a pretrained model's map smaller"
        )
    grid = _grid(arguments)
    general = [] if arguments.general is None else load_public(arguments.general)
    forget = load_rows(arguments.forget or authors("forget"))
    retain = load_rows(arguments.retain or authors("retain"))
    output = Path(arguments.output)
    with writing(output), arguments.keeping_config(output, MARKER, _options(grid)):
        run_grid(
            forget,
            retain,
            grid,
            output,
            workers=arguments.workers,
            general=general,
            resume=arguments.resume,
        )
        _report(arguments, grid, {"forget": len(forget), "retain": len(retain)}, output)
    return 0


def _report(
    arguments: argparse.Namespace,
    grid: Grid,
    rows: dict[str, int],
    output: Path,
) -> None:
    """Report on all finished cells of the folder: this grid's, then those of earlier grids."""
    finished = read_cells(output)
    own = [cell.key for cell in grid.cells()]
    models = read_models(output)
    uniform = math.log(max(each["vocabulary"] for each in models.values()))
    cells = [  # a map from before the cells held their target had the one target
        {"forget_target": uniform, **finished[key]}
        for key in (*own, *sorted(finished.keys() - set(own)))
    ]
    before = {
        name: statistics.fmean(each[name] for each in models.values())
        for name in ("utility", "accuracy")
    }
    standard = SMALL if arguments.model is None else kept_of(before)
    lines = lines_of(cells)
    write_json(
        output / "summary.json",
        finite(
            {
                "rows": rows,
                "grid": dataclasses.asdict(grid),
                "models": models,
                "seconds": round(sum(cell["seconds"] for cell in cells), 1),
                "standard": dataclasses.asdict(standard),
                "ranges": ranges_of(lines, standard),
                "lines": [dataclasses.asdict(line) for line in lines],
            }
        ),
    )
    draw(cells, output, standard)
    measure = standard.measure
    print(
        f"{measure} on the retain rows ({before[measure]:.3f} before; {standard.least:.3f} holds), "
        f"mean ± standard deviation over seeds\n"
    )
    print(f"{table_of(lines, standard)}\n\n* a seed did not forget")
    if any(line.stopped for line in lines):
        print("! a seed broke off on a number that is not finite")
    print(f"Written to {output}: cells.jsonl, summary.json, utility.png, size.png, gradient.png")


def _grid(arguments: argparse.Namespace) -> Any:

    given: dict[str, Any] = {}
    if arguments.quick:
        given = {
            "rates": _QUICK_RATES,
            "seeds": _QUICK_SEEDS,
            "cell": CellConfig(steps=_QUICK_STEPS),
        }
    if arguments.model is not None:
        given["model"] = Pretrained(arguments.model)
        given["adapters"] = PRETRAINED_ADAPTERS
        given["rates"] = PRETRAINED_RATES
        given["ranks"] = (16,)
        given["seeds"] = 3
        given["cell"] = PRETRAINED_CELL
    if arguments.adapters is not None:
        given["adapters"] = _list("--adapters", arguments.adapters, str)
    if arguments.lr is not None:
        given["rates"] = _list("--lr", arguments.lr, float)
    if arguments.ranks is not None:
        given["ranks"] = _list("--ranks", arguments.ranks, int)
    if arguments.seeds is not None:
        given["seeds"] = arguments.seeds
    cell = given.get("cell", CellConfig())
    changed = {
        name: getattr(arguments, name)
        for name in ("steps", "batch_size", "max_length", "dtype", "eval_rows")
        if getattr(arguments, name) is not None
    }
    return Grid(**{**given, "cell": dataclasses.replace(cell, **changed)})


def _options(grid: Grid) -> dict[str, Any]:
    """The grid as options by which `_grid` makes it again, whatever the defaults are then."""
    lists = {"adapters": grid.adapters, "lr": grid.rates, "ranks": grid.ranks}
    return {
        **{name: ",".join(map(str, values)) for name, values in lists.items()},
        "seeds": grid.seeds,
        **dataclasses.asdict(grid.cell),
    }


def _list(flag: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:

    try:
        values = tuple(kind(each.strip()) for each in text.split(",") if each.strip())
    except ValueError:
        raise InputError(f"{flag} must be numbers separated by commas, got {text!r}") from None
    if not values:
        raise InputError(f"{flag} is empty: give at least one, or leave it out")
    return values
