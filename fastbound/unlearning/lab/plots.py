"""The map as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbound.figures import new_figure, save_figure
from fastbound.unlearning.lab.summary import SMALL, Standard

Cells = Sequence[Mapping[str, Any]]
PICTURES = ("utility.png", "size.png", "gradient.png")


def draw(cells: Cells, folder: Path, standard: Standard = SMALL) -> None:
    """Write utility.png, size.png and gradient.png."""
    _against_rate(cells, standard, folder / PICTURES[0])
    sizes = {"largest_delta": "largest |ΔW| of any entry", "delta_norm": "‖ΔW‖ of all layers"}
    _against_steps(cells, sizes, folder / PICTURES[1])
    _against_steps(cells, {"gradient_norm": "gradient norm"}, folder / PICTURES[2])


def _against_rate(cells: Cells, standard: Standard, path: Path) -> None:
    """The standard's measure and retain loss: mean over seeds, band from lowest to highest."""
    figure, axes = new_figure(1, 2, (11, 5))
    for axis, name, label in zip(
        axes[0],
        (standard.measure, "retain_loss"),
        (f"{standard.measure} on retain rows", "retain loss, nats per token"),
        strict=True,
    ):
        for label_of, group, style in _groups(cells):
            rates = sorted({cell["lr"] for cell in group})
            values = [[cell[name] for cell in group if cell["lr"] == lr] for lr in rates]
            _band(axis, rates, values, statistics.fmean, label_of, style)
        axis.set(xscale="log", xlabel="learning rate", ylabel=label)
    axes[0][0].axhline(standard.least, color="0.4", linestyle=":", linewidth=1)
    _finish(figure, axes, path)


def _against_steps(cells: Cells, names: Mapping[str, str], path: Path) -> None:
    """One column a rate (lowest, middle, highest), one row a quantity: median and band of seeds."""
    rates = sorted({cell["lr"] for cell in cells})
    chosen = sorted({rates[0], rates[len(rates) // 2], rates[-1]})
    figure, axes = new_figure(len(names), len(chosen), (3.9 * len(chosen), 0.9 + 3.2 * len(names)))
    for row, (name, label) in enumerate(names.items()):
        for axis, lr in zip(axes[row], chosen, strict=True):
            for label_of, group, style in _groups([c for c in cells if c["lr"] == lr]):
                steps = sorted({line["step"] for cell in group for line in cell["history"]})
                values = [
                    [line[name] for c in group for line in c["history"] if line["step"] == step]
                    for step in steps
                ]
                _band(axis, steps, values, statistics.median, label_of, style)
            axis.set(yscale="log", title=f"lr {lr:g}", xlabel="step")
        axes[row][0].set_ylabel(label)
    _finish(figure, axes, path)


def _groups(cells: Cells) -> Iterator[tuple[str, Cells, dict[str, Any]]]:
    """Label, cells and line style of each adapter and rank: unbounded dashed, bounded whole."""
    from matplotlib import colormaps

    ranks = {cell["rank"] for cell in cells}
    keys = list(dict.fromkeys((cell["adapter"], cell["rank"]) for cell in cells))
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, (adapter, rank) in enumerate(keys):
        group = [c for c in cells if (c["adapter"], c["rank"]) == (adapter, rank)]
        style = {
            "color": colours[i % len(colours)],
            "linestyle": "-" if "@" in adapter else (0, (4, 1.5)),
        }
        yield adapter + (f", rank {rank}" if len(ranks) > 1 else ""), group, style


def _band(
    axis: Any,
    x: Sequence[float],
    values: Sequence[Sequence[float]],
    middle: Any,
    label: str,
    style: Mapping[str, Any],
) -> None:
    axis.plot(x, [middle(each) for each in values], label=label, linewidth=1.6, **style)
    low, high = [min(each) for each in values], [max(each) for each in values]
    axis.fill_between(x, low, high, color=style["color"], alpha=0.1, linewidth=0)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save_figure(figure, path, dpi=100)
