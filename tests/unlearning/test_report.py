"""What the table says of a run: how it ended and which step is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbound.figures import QUICK, adapter_colour
from fastbound.unlearning.runs import report
from fastbound.unlearning.runs.report import Run, outcome, table


def score(loss: float) -> dict[str, float]:
    return {"loss": loss, "accuracy": 0.5, "exact": 0.0, "rows": 3}


def run_of(
    losses: dict[int, tuple[float, float]],
    kept: int,
    stopped: str,
    adapter: str = "bounded",
    lr: float = 0.01,
) -> Run:
    """A run with (forget, retain) losses by step."""
    history = [
        {"step": step, "forget": score(forget), "retain": score(retain)}
        for step, (forget, retain) in losses.items()
    ]
    settings = {"adapter": adapter, "lr": lr, "seed": 0, "losses": None}
    result = {
        "config": settings, "history": history, "kept": kept, "stopped": stopped,
        "forget_target": 5.0, "lr": lr, "largest_delta": 0.1, "bound": 0.2, "bound_in_use": 0.3,
        "seconds_per_step": 0.1,
        "ranks": None, "cross_entropy": {"form": "whole", "reason": "r", "logits_bytes": None},
    }  # fmt: skip
    steps = [
        {"step": step, "forget_loss": forget, "retain_loss": retain, "largest_delta": 0.1}
        for step, (forget, retain) in losses.items()
    ]
    return Run(Path("run"), result, steps)


@pytest.mark.parametrize(
    ("losses", "kept", "stopped", "said"),
    [
        (
            {0: (0.1, 0.1), 4: (6.0, 0.15)},
            4,
            "forget_target",
            "ended: forgotten, and the rest kept",
        ),
        ({0: (0.1, 0.1), 4: (6.0, 0.9), 8: (7.0, 0.5)}, 8, "all steps", ""),
        ({0: (0.1, 0.1), 4: (6.0, 0.5), 8: (7.0, 0.9)}, 4, "all steps", "the best of 8 steps"),
        ({0: (0.1, 0.1), 8: (2.0, 0.2)}, 8, "all steps", "not forgotten"),
        (
            {0: (0.1, 0.1), 4: (6.0, 0.5), 8: (7.0, 9.0)},
            4,
            "retain_limit",
            "ended at step 8 by retain_limit (step 4 is the best)",
        ),
        (
            {0: (0.1, 0.1), 4: (1.0, 9.0)},
            4,
            "retain_limit",
            "ended at step 4 by retain_limit, not forgotten",
        ),
    ],
)
def test_the_line_of_a_run_says_how_it_ended_and_scores_what_is_kept(losses, kept, stopped, said):
    (line,) = [line for line in table([run_of(losses, kept, stopped)]) if "bounded" in line]
    forget, retain = losses[kept]
    assert f"{forget:8.3f}" in line and f"{retain:8.3f}" in line
    assert line.split("0.100")[-1].strip() == said
    assert f" {kept:6} " in line


FOUR = [
    run_of({0: (0.1, 0.1), 4: (6.0, 0.2)}, 4, "all steps", adapter, lr)
    for lr in (0.01, 0.1)
    for adapter in ("bounded", "lora")
]


def test_the_outcome_comes_first_and_compares_the_adapters_at_the_higher_rate():
    FOUR[3].kept["retain"]["accuracy"] = 0.25
    lines = outcome(FOUR)
    assert [line.split("  ")[1].strip() for line in lines[1:6]] == [
        "before",
        "bounded, learning rate 0.01",
        "LoRA, learning rate 0.01",
        "bounded, learning rate 0.1",
        "LoRA, learning rate 0.1",
    ]
    assert lines[-1] == (
        "At the learning rate 0.1 the bounded adapter keeps 50.0% and LoRA 25.0% of the answer "
        "tokens of the retain rows."
    )


def test_the_outcome_of_a_single_run_compares_nothing():
    *_, after = outcome([run_of({0: (0.1, 0.1), 4: (2.0, 0.2)}, 4, "all steps")])
    assert "not forgotten" in after


@pytest.mark.parametrize("ceiling", [None, 21.6])
def test_a_ceiling_is_told(ceiling):
    run = run_of({0: (0.1, 0.1), 4: (6.0, 0.2)}, 4, "all steps")
    run.result["forget_ceiling"] = ceiling
    told = "Gradient ascent pushed each token up to a loss of 21.6, no further."
    assert (told in table([run])) == (ceiling is not None)


def test_a_model_too_small_to_time_has_no_column_of_seconds():
    for timed in (True, False):
        lines = table(FOUR, timed=timed)
        assert any("s/step" in line for line in lines) == timed
        rows = [line for line in lines if line.startswith(("bounded ", "lora "))]
        assert [" 0.100 " in row for row in rows] == [timed] * 4


@pytest.mark.parametrize("quick", [False, True])
def test_the_picture_names_its_runs_and_gives_an_adapter_one_colour(tmp_path, monkeypatch, quick):
    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    report.draw(tmp_path / "curves.png", FOUR, quick=quick)
    (figure,) = drawn
    (legend,) = figure.legends
    colours = {
        text.get_text(): handle.get_color()
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert set(colours) == {run.label for run in FOUR}
    assert all(
        colour == adapter_colour("lora" if name.startswith("LoRA") else "bounded")
        for name, colour in colours.items()
    )
    assert [axis.get_title().partition(":")[0] for axis in figure.axes] == [
        "Rows to forget",
        "Rows to keep",
        "How far the weights have moved",
    ]
    assert (figure.get_suptitle() == QUICK) == quick
