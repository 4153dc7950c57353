"""Matplotlib figures that need no display: one common style, one colour per adapter."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbound.files import replace_files

# One colour per adapter in every picture of the project. These are the colours of Okabe and Ito,
# which stay apart for colour-blind readers and in grey. Bounded adapters are warm, LoRA is blue.
ADAPTER_COLOURS = {
    "frozen": "#000000",
    "bounded": "#D55E00",
    "fused": "#D55E00",
    "sine": "#D55E00",
    "tanh": "#CC79A7",
    "product": "#E69F00",
    "lora": "#0072B2",
    "peft_fp32": "#0072B2",
    "peft_bf16": "#56B4E9",
    "lora-clamp": "#009E73",
    "lora-clip": "#56B4E9",
    "lora-decay": "#666666",
}
OTHER_COLOUR = "#999999"
_LINE = 0.055  # height of a label, as a share of its panel
QUICK = "shortened run (--quick): it shows that the command works and compares nothing"


def adapter_colour(name: str, lighter: float = 0.0) -> str:
    """The colour of an adapter, as `#rrggbb`.

    Args:
        name: a key of `ADAPTER_COLOURS`, or one followed by its bound or ranks, such as
            "sine@0.5*spectral" or "lora+ranks". An unknown name is grey.
        lighter: how far the colour is mixed with white, from 0 to 1, which tells several settings
            of one adapter apart in the same picture.
    """
    base = ADAPTER_COLOURS.get(name.partition("@")[0].partition("+")[0], OTHER_COLOUR)
    parts = (int(base[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * lighter):02X}" for part in parts)


def mark_quick(figure: Any) -> None:
    """Write above the panels of a figure that its data come from a shortened run."""
    figure.suptitle(QUICK, fontsize=9, color="#AA0000")


def label_ends(panel: Any) -> None:
    """Write the label of each line at its right end, in its colour, in place of a legend.

    Call it last: it moves labels that would overlap apart, at the limits that the panel then has.
    """
    panel.get_ylim()  # brings the limits up to date
    ends = []
    for line in panel.get_lines():
        values = line.get_ydata()
        if len(values) and not line.get_label().startswith("_"):
            point = panel.transData.transform((1.0, values[-1]))
            height = float(panel.transAxes.inverted().transform(point)[1])
            ends.append((min(1.0, max(0.0, height)), line))
    ends.sort(key=lambda end: end[0])
    heights: list[float] = []
    for height, _ in ends:
        heights.append(max(height, heights[-1] + _LINE) if heights else height)
    highest = 1.0
    for (_, line), height in zip(reversed(ends), reversed(heights), strict=True):
        height = min(height, highest)
        highest = height - _LINE
        style = {"color": line.get_color(), "va": "center", "fontsize": 9}
        panel.text(1.02, height, line.get_label(), transform=panel.transAxes, **style)


def within_reach(values: Sequence[float], times: float = 3.0) -> float:
    """The largest of the values that is at most `times` their median.

    An axis that ends there is not set by one outlier; a picture names what lies beyond it.
    """
    middle = statistics.median(values)
    return max(value for value in values if value <= max(times * middle, min(values)))


def new_figure(
    rows: int, columns: int, size: tuple[float, float], *, grid: float | None = 0.25
) -> tuple[Any, Any]:
    """A figure and its panels `[rows, columns]`.

    Args:
        size: width and height in inches.
        grid: opacity of the grid lines; the frame then has only its left and lower edge. None
            draws no grid and the whole frame.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in () if grid is None else panels.flat:
        panel.grid(alpha=grid)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save_figure(figure: Any, path: Path, *, dpi: int = 130) -> None:
    """Write the figure to `path` as a PNG, whole or not at all."""
    replace_files({path: lambda part: figure.savefig(part, format="png", dpi=dpi)})
