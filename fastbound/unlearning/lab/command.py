"""`fastbound lab`: flags to settings, and nothing else; the work is in `grid`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELP = "map which adapter keeps a small model whole at which learning rate"
DESCRIPTION = """\
Trains one small model a seed until it knows its rows, then forgets some of them by gradient
difference with every adapter at every learning rate, and draws what is left: utility and retain
loss against the rate, the size of the change and the gradient norm against steps.
"""
EPILOG = """\
An adapter is lora, lora-clamp (factors within 1), lora-clip (gradient norm within 1), or sine, tanh
or product with its bound: sine@4 is bounded by 4 x RMS(W), sine@alpha by alpha. All have the slope
of LoRA. With +ranks behind it (sine@4+ranks) the same parameters are spread over layers by
gradients, as --rank auto of unlearn does. One process a core. The output folder gets cells.jsonl,
summary.json, utility.png, size.png and gradient.png; --resume goes on with it, also with more
adapters, rates, ranks or seeds.
"""

_QUICK_RATES = (1e-3, 1e-2, 1e-1)
_QUICK_SEEDS = 2
_QUICK_STEPS = 150


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every default that is None here is the grid's own."""
    rows = parser.add_argument_group("rows (default: those that the package ships)")
    rows.add_argument("--forget", metavar="FILE", help="rows to forget, as of fastbound unlearn")
    rows.add_argument("--retain", metavar="FILE", help="rows to keep")

    grid = parser.add_argument_group("grid, each a list separated by commas")
    grid.add_argument("--adapters", metavar="LIST", help="see below (nine of them)")
    grid.add_argument("--lr", metavar="LIST", help="rates (0.001,0.003,0.01,0.03,0.1)")
    grid.add_argument("--ranks", metavar="LIST", help="ranks (8)")
    grid.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (5)")
    grid.add_argument("--steps", type=int, metavar="N", help="steps a cell (300)")
    grid.add_argument("--quick", action="store_true", help="3 rates, 2 seeds, 150 steps")

    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", default="lab", help="output folder (lab)")
    run.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")
    run.add_argument("--resume", action="store_true", help="go on with the one in --output")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; the table goes to standard output.

    Raises:
        InputError: rows, settings or output folder cannot be used.
    """
    from fastbound.errors import InputError
    from fastbound.unlearning.data.rows import authors, load_rows
    from fastbound.unlearning.lab.grid import read_models, run_grid
    from fastbound.unlearning.lab.plots import draw
    from fastbound.unlearning.lab.summary import lines_of, ranges_of, table_of
    from fastbound.unlearning.runs.folder import write_json

    if (arguments.forget is None) != (arguments.retain is None):
        raise InputError("give --forget and --retain together, or neither")
    grid = _grid(arguments)
    forget = load_rows(arguments.forget or authors("forget"))
    retain = load_rows(arguments.retain or authors("retain"))
    output = Path(arguments.output)
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
    from fastbound.unlearning.lab.cell import CellConfig
    from fastbound.unlearning.lab.grid import Grid

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
    from fastbound.errors import InputError

    try:
        values = tuple(kind(each.strip()) for each in text.split(",") if each.strip())
    except ValueError:
        raise InputError(f"{flag} must be numbers separated by commas, got {text!r}") from None
    if not values:
        raise InputError(f"{flag} is empty: give at least one, or leave it out")
    return values
