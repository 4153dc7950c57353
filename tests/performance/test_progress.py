"""Progress: a bar on a terminal, a line now and then elsewhere, nothing at all where not wanted."""

from __future__ import annotations

import sys

import pytest

from fastbound.performance import progress as module
from fastbound.performance.progress import progress


def advance(steps: int, **options: bool) -> None:
    with progress(steps, "unlearning", "step", **options) as bar:
        for step in range(steps):
            bar.set_postfix_str(f"loss {step}")
            bar.update()


@pytest.fixture
def seconds(monkeypatch):
    """A clock that moves on by so much at every look."""

    class Clock:
        now, pace = 0.0, 0.0

        def monotonic(self) -> float:
            self.now += self.pace
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_elsewhere_than_on_a_terminal_it_is_one_line_at_the_end(capsys, seconds):
    advance(1000)
    assert capsys.readouterr().err == "unlearning: 1000 of 1000 steps in 0 s, loss 999\n"


def test_a_long_run_says_a_line_now_and_then(capsys, seconds):
    seconds.pace = module.EVERY / 10
    advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 12 and lines[0].startswith("unlearning: 1")
    assert all(line.startswith("unlearning: ") and "\r" not in line for line in lines)


def test_an_unknown_total_and_a_single_unit_read_as_words(capsys, seconds):
    with progress(None, "learning", "epoch") as bar:
        bar.update()
    assert capsys.readouterr().err == "learning: 1 epoch in 0 s\n"


@pytest.mark.parametrize("options", [{"shown": False}, {"nested": True}])
def test_what_is_not_shown_or_part_of_another_is_silent(capsys, seconds, options):
    advance(5, **options)
    assert capsys.readouterr().err == ""


def test_an_interruption_leaves_the_last_state_on_a_line_of_its_own(capsys, seconds):
    with pytest.raises(KeyboardInterrupt), progress(9, "unlearning", "step") as bar:
        bar.update(4)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "unlearning: 4 of 9 steps in 0 s\n"


def test_on_a_terminal_it_is_a_bar_that_ends_its_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt), progress(9, "unlearning", "step") as bar:
        bar.update(4)
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert "\r" in said and "4/9" in said and said.endswith("\n")
