"""The picture of an evaluation: two panels side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastbound.figures import new_figure, save_figure

BLUE, RED, GREY = "#0b6e99", "#c4511d", "0.45"
# Below a panel, where it covers nothing.
LEGEND: dict[str, Any] = {
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.16),
    "ncols": 3,
    "fontsize": "small",
    "frameon": False,
}


@contextlib.contextmanager
def picture(path: Path) -> Iterator[tuple[Any, Any]]:
    """Yield two panels to draw on, and write them to `path` at the end."""
    figure, (panels,) = new_figure(1, 2, (10, 4))
    for panel in panels:
        panel.set_axisbelow(True)
    yield panels
    save_figure(figure, path)
