"""The finished cells in numbers: one line per adapter and rate, and the range where each holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

_MEASURED = (
    "utility",
    "probability",
    "accuracy",
    "truth_ratio",
    "retain_loss",
    "forget_loss",
    "forget_accuracy",
    "largest_delta",
    "delta_norm",
    "largest_gradient_norm",
    "bound_in_use",
    "general",
    "end_step",
)


@dataclass(frozen=True)
class Standard:
    """When an adapter holds: every seed forgets, none breaks off, and the mean of `measure` is at
    least `least`.

    With a mean below `collapsed` an adapter counts as collapsed.
    """

    measure: str
    least: float
    collapsed: float

    def holds(self, line: Line) -> bool:
        whole = line.forgotten == line.seeds and not line.stopped
        return whole and line.mean[self.measure] >= self.least


SMALL = Standard("utility", 0.45, 0.15)


def kept_of(before: Mapping[str, float]) -> Standard:
    """For a pretrained model: 95 % of the answer tokens it had right before; collapsed: half."""
    return Standard("accuracy", 0.95 * before["accuracy"], 0.5 * before["accuracy"])


@dataclass(frozen=True)
class Line:
    """All seeds of one adapter at one rank and rate.

    Attributes:
        mean, spread: of each measured quantity over seeds; the spread is the standard deviation,
            0 for one seed.
        lowest_utility: of any seed.
        forgotten: seeds whose forget loss is at least `forget_target` of their cell.
        stopped: seeds whose loss or gradient stopped being finite.
    """

    adapter: str
    rank: int
    lr: float
    seeds: int
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    lowest_utility: float
    forgotten: int
    stopped: int


def lines_of(cells: Sequence[Mapping[str, Any]]) -> list[Line]:
    """One line per (adapter, rank, rate), by rank and rate, else in the order of the cells."""
    groups: dict[tuple[str, int, float], list[Mapping[str, Any]]] = {}
    for cell in sorted(cells, key=itemgetter("rank", "lr")):
        groups.setdefault((cell["adapter"], cell["rank"], cell["lr"]), []).append(cell)
    lines = []
    for (adapter, rank, lr), group in groups.items():
        names = [name for name in _MEASURED if name in group[0]]
        values = {name: [cell[name] for cell in group] for name in names}
        lines.append(
            Line(
                adapter,
                rank,
                lr,
                seeds=len(group),
                mean={name: statistics.fmean(each) for name, each in values.items()},
                spread={name: _spread(each) for name, each in values.items()},
                lowest_utility=min(values["utility"]),
                forgotten=sum(cell["forget_loss"] >= cell["forget_target"] for cell in group),
                stopped=sum(cell["stopped"] is not None for cell in group),
            )
        )
    return lines


def _spread(values: Sequence[float]) -> float:
    """The standard deviation: 0 for one value, NaN where a run broke off with one that is."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def ranges_of(lines: Sequence[Line], standard: Standard = SMALL) -> list[dict[str, Any]]:
    """For each adapter and rank, the longest run of the map's rates at which it holds.

    `fold` is the last rate of the run over the first, 1 for a single rate, 0 for none;
    `collapsed` are the rates at which the mean is below that of the standard.
    """
    by_adapter: dict[tuple[str, int], list[Line]] = {}
    for line in lines:
        by_adapter.setdefault((line.adapter, line.rank), []).append(line)
    found = []
    rates = sorted({line.lr for line in lines})
    for (adapter, rank), group in by_adapter.items():
        best: list[float] = []
        run: list[float] = []
        at = {line.lr: line for line in group}
        for lr in rates:
            run = [*run, lr] if lr in at and standard.holds(at[lr]) else []
            best = max(best, run, key=len)
        found.append(
            {
                "adapter": adapter,
                "rank": rank,
                "holds_from": best[0] if best else None,
                "holds_to": best[-1] if best else None,
                "fold": round(best[-1] / best[0], 6) if best else 0,
                "collapsed": [
                    li.lr for li in group if li.mean[standard.measure] < standard.collapsed
                ],
            }
        )
    return found


def table_of(lines: Sequence[Line], standard: Standard = SMALL) -> str:
    """Markdown: the standard's measure, mean ± spread over seeds, for each adapter and rate.

    `*` marks rates at which a seed did not forget, `!` those at which one broke off on a number
    that is not finite. Where the lines are of different numbers of seeds, each says its own in
    brackets.
    """
    rates = sorted({line.lr for line in lines})
    ranks, counts = {line.rank for line in lines}, {line.seeds for line in lines}
    head = ["adapter", *(f"lr {lr:g}" for lr in rates), "holds over"]
    rows = []
    for found in ranges_of(lines, standard):
        name = found["adapter"] + (f", rank {found['rank']}" if len(ranks) > 1 else "")
        row = [name]
        for lr in rates:
            row += [
                f"{line.mean[standard.measure]:.3f}"
                + (f" ± {line.spread[standard.measure]:.3f}" if line.seeds > 1 else "")
                + ("*" if line.forgotten < line.seeds else "")
                + ("!" if line.stopped else "")
                + (f" ({line.seeds})" if len(counts) > 1 else "")
                for line in lines
                if (line.adapter, line.rank, line.lr) == (found["adapter"], found["rank"], lr)
            ] or ["-"]
        low, high = found["holds_from"], found["holds_to"]
        row.append("-" if low is None else f"{low:g} to {high:g}" if high > low else f"{low:g}")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
