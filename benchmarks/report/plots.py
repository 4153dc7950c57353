"""The plots of a report: time over the floor, and bytes saved for backward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.rows import MIB, BenchmarkRow
from fastbound.figures import new_figure, save_figure, within_reach
from fastbound.performance.profiling.report import NAMES, colour

SMOKE = "smoke run on tiny sizes: it shows that the benchmarks run, and compares nothing"


def draw(device: str, rows: Sequence[BenchmarkRow], output: Path, stem: str) -> list[Path]:
    """Write `<stem>-time.png` and `<stem>-saved.png` into `output` and return their paths.

    The first shows the cases that have a frozen layer to compare with, and is left out if none has.
    """
    with_floor = {(row.case, row.direction) for row in rows if row.competitor == "frozen"}
    compared = [row for row in rows if (row.case, row.direction) in with_floor]
    paths = []
    if compared:
        paths.append(output / f"{stem}-time.png")
        _time_over_floor(device, compared, paths[-1])
    paths.append(output / f"{stem}-saved.png")
    _saved_bytes(device, rows, paths[-1])
    return paths


def _unique(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _time_over_floor(device: str, rows: Sequence[BenchmarkRow], path: Path) -> None:
    """A row of panels per shape, a column per direction; the line at 1 is the frozen layer."""
    shapes = _unique([row.shape for row in rows])
    directions = _unique([row.direction for row in rows])
    several = len({row.M for row in rows}) > 1
    figure, panels = new_figure(
        len(shapes),
        len(directions),
        (5.6 * len(directions), (3.2 if several else 2.6) * len(shapes)),
        grid=None,
    )
    for i, shape in enumerate(shapes):
        for j, direction in enumerate(directions):
            members = [row for row in rows if (row.shape, row.direction) == (shape, direction)]
            floor = {row.M: row.median for row in members if row.competitor == "frozen"}
            axes = panels[i][j]
            if not members:
                axes.set_axis_off()
                continue
            axes.set_title(f"{shape}\n{direction}", fontsize=9)
            (_lines_over_tokens if several else _bars)(axes, members, floor)
    if several:
        handles: dict[str, Any] = {}
        for axes in panels.flat:
            found, names = axes.get_legend_handles_labels()
            handles.update(zip(names, found, strict=True))
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8
        )
    _entitle(figure, f"Time over that of the frozen layer or block, {device}", rows)
    save_figure(figure, path)


def _entitle(figure: Any, title: str, rows: Sequence[BenchmarkRow]) -> None:
    """The title, which says so when the sizes are those of a smoke run."""
    smoke = all(row.model.startswith("tiny") for row in rows)
    figure.suptitle(f"{title}\n{SMOKE}" if smoke else title, fontsize=10)


def _lines_over_tokens(axes: Any, rows: Sequence[BenchmarkRow], floor: dict[int, float]) -> None:
    for name in _unique([row.competitor for row in rows]):
        points = sorted((row for row in rows if row.competitor == name), key=lambda row: row.M)
        tokens = [row.M for row in points]
        ratios = [row.median / floor[row.M] for row in points]
        below = [(row.median - row.q1) / floor[row.M] for row in points]
        above = [(row.q3 - row.median) / floor[row.M] for row in points]
        axes.errorbar(
            tokens,
            ratios,
            (below, above),
            color=colour(name),
            label=NAMES.get(name, name),
            marker="o",
            ms=3,
            lw=1.4,
        )
    # From the medians: neither a disturbed quartile nor one slow competitor flattens every line.
    ratios = [row.median / floor[row.M] for row in rows]
    low, high = min(ratios), within_reach(ratios)
    top = high + 0.2 * (high - low) + 0.02
    axes.set_ylim(low - 0.1 * (high - low) - 0.02, top)
    beyond: dict[int, int] = {}
    for row in rows:
        if row.median / floor[row.M] > top:
            depth = beyond[row.M] = beyond.get(row.M, -1) + 1
            axes.annotate(
                f"↑ {row.median / floor[row.M]:.1f}",
                (row.M, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, -2 - 9 * depth),
                textcoords="offset points",
                ha="center",
                va="top",
                color=colour(row.competitor),
                fontsize=8,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(floor), [str(M) for M in sorted(floor)])
    axes.minorticks_off()
    axes.set_xlabel("tokens M")
    axes.set_ylabel("time / frozen")
    axes.grid(axis="y", alpha=0.3)


def _bars(axes: Any, rows: Sequence[BenchmarkRow], floor: dict[int, float]) -> None:
    names = [NAMES.get(row.competitor, row.competitor) for row in rows]
    ratios = [row.median / floor[row.M] for row in rows]
    below = [(row.median - row.q1) / floor[row.M] for row in rows]
    above = [(row.q3 - row.median) / floor[row.M] for row in rows]
    colours = [colour(row.competitor) for row in rows]
    end = within_reach([r + a for r, a in zip(ratios, above, strict=True)])
    axes.barh(names, ratios, color=colours, xerr=(below, above), error_kw={"ecolor": "#555555"})
    for place, (row, ratio, more) in enumerate(zip(rows, ratios, above, strict=True)):
        cut = ratio + more > end
        axes.annotate(
            f"{'→ ' if ratio > end else ''}{ratio:.2f}  ({row.median * 1e3:.2f} ms)",
            (end * 1.02 if cut else ratio + more, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if cut else None,
        )
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.set_xlim(0, end * 1.65)
    axes.invert_yaxis()
    axes.set_xlabel("time / frozen")


def _saved_bytes(device: str, rows: Sequence[BenchmarkRow], path: Path) -> None:
    """Bytes per token: one panel per shape, at its largest number of tokens."""
    shapes = _unique([row.shape for row in rows])
    figure, panels = new_figure(len(shapes), 1, (7.0, 2.4 * len(shapes)), grid=None)
    for shape, (axes,) in zip(shapes, panels, strict=True):
        members = [row for row in rows if row.shape == shape]
        M = max(row.M for row in members)
        saved = {row.competitor: row.saved_bytes for row in members if row.M == M}
        names = [NAMES.get(name, name) for name in saved]
        bars = axes.barh(names, [n / MIB for n in saved.values()], color=list(map(colour, saved)))
        axes.bar_label(bars, [f"{n / MIB:.3g}" for n in saved.values()], padding=4, fontsize=8)
        axes.set_xlim(0, max(max(saved.values()), 1) / MIB * 1.15)
        axes.invert_yaxis()
        axes.set_title(f"{shape}, M={M}", fontsize=9)
        axes.set_xlabel("MiB, without parameters")
    _entitle(figure, f"Memory kept for backward, {device}", rows)
    save_figure(figure, path)
