"""What the table says of a run: how it ended and which step is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbound.unlearning.runs.report import Run, table


def score(loss: float) -> dict[str, float]:
    return {"loss": loss, "accuracy": 0.5, "exact": 0.0, "rows": 3}


def run_of(losses: dict[int, tuple[float, float]], kept: int, stopped: str) -> Run:
    """A run with (forget, retain) losses by step."""
    history = [
        {"step": step, "forget": score(forget), "retain": score(retain)}
        for step, (forget, retain) in losses.items()
    ]
    settings = {"adapter": "bounded", "lr": 0.01, "seed": 0, "losses": None}
    result = {
        "config": settings, "history": history, "kept": kept, "stopped": stopped,
        "forget_target": 5.0, "lr": 0.01, "largest_delta": 0.1, "bound": 0.2, "bound_in_use": 0.3,
        "seconds_per_step": 0.1,
        "ranks": None, "cross_entropy": {"form": "whole", "reason": "r", "logits_bytes": None},
    }  # fmt: skip
    return Run(Path("run"), result, [])


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
