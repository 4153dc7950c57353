"""Pictures: one colour per adapter, and what marks a shortened run."""

from __future__ import annotations

import pytest

from fastbound.figures import (
    ADAPTER_COLOURS,
    OTHER_COLOUR,
    QUICK,
    adapter_colour,
    mark_quick,
    new_figure,
)


@pytest.mark.parametrize("name", ["sine", "sine@0.5*spectral", "sine@4+ranks", "bounded", "fused"])
def test_a_bounded_adapter_has_one_colour_under_every_name(name):
    assert adapter_colour(name) == "#D55E00"


@pytest.mark.parametrize("name", ["lora", "lora+ranks", "peft_fp32"])
def test_lora_has_one_colour_under_every_name(name):
    assert adapter_colour(name) == "#0072B2"


def test_a_lighter_shade_is_nearer_to_white_and_an_unknown_name_is_grey():
    assert adapter_colour("frozen", 0.5) == "#808080"
    assert adapter_colour("lora", 1.0) == "#FFFFFF"
    assert adapter_colour("dora") == OTHER_COLOUR
    assert OTHER_COLOUR not in ADAPTER_COLOURS.values()


def test_a_shortened_run_says_so_in_its_picture_and_covers_nothing():
    figure, panels = new_figure(1, 1, (6, 3))
    panels[0][0].plot([1, 2], [3, 4], label="a")
    figure.legend(loc="outside lower center")
    mark_quick(figure)
    figure.canvas.draw()
    boxes = [each.get_window_extent() for each in (*figure.legends, panels[0][0])]
    (mark,) = figure.findobj(lambda each: getattr(each, "get_text", str)() == QUICK)
    assert all(not mark.get_window_extent().overlaps(box) for box in boxes)
