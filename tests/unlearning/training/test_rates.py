"""`lr="auto"`: the rate that each layer's bound calls for, and what a run says of it."""

from __future__ import annotations

import json
import math

import pytest

from fastbound.layers.rates import auto_rate
from fastbound.unlearning import InputError, UnlearnConfig
from fastbound.unlearning.demo.demo import Demonstration
from fastbound.unlearning.training.adapters import LORA_RATE, attach
from fastbound.unlearning.training.step import Training

FAST = {"epochs": 2, "batch_size": 3, "rank": 2, "device": "cpu", "early_stop": False}


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"adapter": "lora"}, LORA_RATE),
        ({"adapter": "lora", "lr": 0.02}, 0.02),
        ({"bound": "0.01*spectral", "lr": 0.02}, 0.02),
        ({"bound": 8.0}, 0.01),
    ],
)
def test_a_number_and_lora_have_one_rate_for_all(new_model, settings, rate):
    adapter = attach(new_model(), UnlearnConfig(rank=4, **settings), 4)
    (group,) = adapter.parameter_groups()
    assert group["lr"] == rate
    assert group["params"] == [p for p in adapter.model.parameters() if p.requires_grad]


def test_a_run_at_auto_logs_and_keeps_the_highest_rate(unlearn_rows, tmp_path):
    result = unlearn_rows(UnlearnConfig(bound=1e-3, **FAST), output=tmp_path / "run")
    assert result.config.lr == "auto"
    assert result.lr == auto_rate(alpha=2.0, bound=1e-3) == 8.9e-3
    log = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert max(line["lr"] for line in log if line["event"] == "step") == result.lr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["lr"] == result.lr


def test_a_run_at_auto_resumes_to_the_same_numbers(unlearn_rows, tmp_path, monkeypatch):
    config = UnlearnConfig(bound="0.05*spectral", **FAST, checkpoint_every=1)
    whole = unlearn_rows(config, output=tmp_path / "whole")
    update, taken = Training.update, []

    def killed(training, losses):
        taken.append(losses)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return update(training, losses)

    monkeypatch.setattr(Training, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        unlearn_rows(config, output=tmp_path / "cut")
    monkeypatch.undo()
    resumed = unlearn_rows(config, output=tmp_path / "cut", resume=True)
    assert resumed.history == whole.history and resumed.lr == whole.lr


@pytest.mark.parametrize("value", ["fast", 0.0, math.nan, None])
def test_what_is_no_rate_is_refused(value):
    with pytest.raises(InputError, match='lr, unless "auto", must be positive and finite, got'):
        UnlearnConfig(lr=value)


def test_the_demonstration_needs_a_number():
    with pytest.raises(InputError, match='give lr a number, not "auto"'):
        Demonstration(UnlearnConfig())
