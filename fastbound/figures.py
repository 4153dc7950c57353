"""Matplotlib figures that need no display: panels in one common style, written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastbound.files import replace_files


def new_figure(
    rows: int, columns: int, size: tuple[float, float], *, grid: float | None = 0.25
) -> tuple[Any, Any]:
    """A figure of `size` inches and its panels `[rows, columns]`.

    The panels have a grid of opacity ``grid`` and a frame on the left and bottom only. With
    ``grid=None`` they have no grid and a whole frame.
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
    """Write the figure to `path` as a PNG."""
    replace_files({path: lambda part: figure.savefig(part, format="png", dpi=dpi)})
