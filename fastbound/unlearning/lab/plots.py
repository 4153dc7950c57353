"""The map as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbound.figures import adapter_colour, label_ends, new_figure, save_figure
from fastbound.unlearning.lab.names import parse_adapter
from fastbound.unlearning.lab.summary import SMALL, Standard

Cells = Sequence[Mapping[str, Any]]
PICTURES = ("utility.png", "size.png", "gradient.png")
_MOST = 6  # lines that are all drawn alike; of more, LoRA and the bounded ones stand out
_MEASURES = {
    "utility": "utility on the retain rows",
    "accuracy": "share of the retained answers' tokens still right",
}


def draw(cells: Cells, folder: Path, standard: Standard = SMALL) -> None:
    """Write utility.png, size.png and gradient.png.

    A dotted line is what counts as kept, or each `forget_target` of the cells; where a seed did not
    reach its own, the mark is open.
    """
    _against_rate(cells, standard, folder / PICTURES[0])
    sizes = {
        "largest_delta": "largest |ΔW| of any entry",
        "delta_norm": "Frobenius norm of all ΔW",
    }
    _against_steps(cells, sizes, folder / PICTURES[1])
    _against_steps(cells, {"gradient_norm": "gradient norm"}, folder / PICTURES[2])


def _against_rate(cells: Cells, standard: Standard, path: Path) -> None:
    """What is kept and what is forgotten: mean over seeds, band from the lowest to the highest."""
    common = _common(cells)
    figure, axes = new_figure(1, 2, (13, 4.8))
    panels = (
        (standard.measure, "What is kept", _MEASURES[standard.measure]),
        (
            "forget_loss",
            "What is forgotten (open mark: not by every seed)",
            "forget loss, nats per token",
        ),
    )
    for axis, (name, title, label) in zip(axes[0], panels, strict=True):
        for group, style in _groups(cells, common):
            rates = sorted({cell["lr"] for cell in group})
            values = [[cell[name] for cell in group if cell["lr"] == lr] for lr in rates]
            _band(axis, rates, values, statistics.fmean, style)
            for lr, each in zip(rates, values, strict=True):
                at_rate = [cell for cell in group if cell["lr"] == lr]
                missed = any(cell["forget_loss"] < cell["forget_target"] for cell in at_rate)
                face = "white" if missed else style["color"]
                axis.plot(
                    lr,
                    statistics.fmean(each),
                    marker="o",
                    color=style["color"],
                    markerfacecolor=face,
                    markersize=4 if style["linewidth"] > 1 else 3,
                    zorder=3,
                )
        axis.set(xscale="log", xlabel="learning rate", ylabel=label, title=title)
        rates = sorted({cell["lr"] for cell in cells})
        axis.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axis.minorticks_off()
    _threshold(axes[0][0], standard.least, "counts as kept")
    axes[0][0].set_ylim(bottom=0)
    for target in sorted({cell["forget_target"] for cell in cells}):
        _threshold(axes[0][1], target, "counts as forgotten")
    for axis in axes[0]:
        label_ends(axis)
    _say(figure, common)
    save_figure(figure, path, dpi=100)


def _threshold(axis: Any, height: float, text: str) -> None:
    axis.axhline(height, color="0.35", linestyle=":", linewidth=1, label=text)


def _against_steps(cells: Cells, names: Mapping[str, str], path: Path) -> None:
    """One column for the lowest, middle and highest rate, one row for each quantity.

    The lines are medians over seeds, the bands go from the lowest to the highest.
    """
    common = _common(cells)
    rates = sorted({cell["lr"] for cell in cells})
    chosen = sorted({rates[0], rates[len(rates) // 2], rates[-1]})
    size = (3.6 * len(chosen) + 2.4, 0.6 + 3.2 * len(names))
    figure, axes = new_figure(len(names), len(chosen), size)
    for row, (name, label) in enumerate(names.items()):
        for axis, lr in zip(axes[row], chosen, strict=True):
            for group, style in _groups([cell for cell in cells if cell["lr"] == lr], common):
                steps = sorted({line["step"] for cell in group for line in cell["history"]})
                values = [
                    [line[name] for c in group for line in c["history"] if line["step"] == step]
                    for step in steps
                ]
                _band(axis, steps, values, statistics.median, style)
            axis.set(yscale="log", title=f"learning rate {lr:g}", xlabel="step")
        axes[row][0].set_ylabel(label)
        label_ends(axes[row][-1])
    _say(figure, common)
    save_figure(figure, path, dpi=100)


def _common(cells: Cells) -> list[str]:
    """The remarks that all adapters share, where there are several: they stand above the panels."""
    adapters = [parse_adapter(each) for each in dict.fromkeys(cell["adapter"] for cell in cells)]
    if len(adapters) < 2:
        return []
    first, *others = adapters
    return [each for each in first.remarks if all(each in other.remarks for other in others)]


def _say(figure: Any, common: Sequence[str]) -> None:
    if common:
        figure.suptitle(f"All adapters: {', '.join(common)}", fontsize=9)


def _groups(cells: Cells, common: Sequence[str]) -> Iterator[tuple[Cells, dict[str, Any]]]:
    """Cells and line style of each adapter and rank; of one kind the later ones are lighter.

    Labels leave out what is common to all.
    """
    ranks = {cell["rank"] for cell in cells}
    keys = list(dict.fromkeys((cell["adapter"], cell["rank"]) for cell in cells))
    kinds = [parse_adapter(adapter).kind for adapter, _ in keys]
    for i, (adapter, rank) in enumerate(keys):
        group = [c for c in cells if (c["adapter"], c["rank"]) == (adapter, rank)]
        parsed = parse_adapter(adapter)
        prominent = len(keys) <= _MOST or parsed.kind in ("lora", "sine")
        label = [parsed.label, *(each for each in parsed.remarks if each not in common)]
        if len(ranks) > 1:
            label.append(f"rank {rank}")
        lighter = 0.5 * kinds[:i].count(parsed.kind) / max(1, kinds.count(parsed.kind) - 1)
        yield (
            group,
            {
                "color": adapter_colour(adapter, lighter),
                "linestyle": "-" if parsed.bounded else (0, (4, 1.5)),
                "linewidth": 1.9 if prominent else 0.9,
                "label": ", ".join(label),
            },
        )


def _band(
    axis: Any,
    x: Sequence[float],
    values: Sequence[Sequence[float]],
    middle: Any,
    style: Mapping[str, Any],
) -> None:
    axis.plot(x, [middle(each) for each in values], **style)
    if style["linewidth"] > 1:
        low, high = [min(each) for each in values], [max(each) for each in values]
        axis.fill_between(x, low, high, color=style["color"], alpha=0.1, linewidth=0)
