"""`lr="auto"`: the rate that each layer's bound calls for, and what a run says of it."""

from __future__ import annotations

import json
import math

import pytest
import torch

import fastbound
from fastbound.unlearning import InputError, UnlearnConfig
from fastbound.unlearning.demo.demo import Demonstration
from fastbound.unlearning.training.adapters import attach
from fastbound.unlearning.training.rates import HIGHEST, LORA, PHASE, auto_rate, parameter_groups

FAST = {"epochs": 2, "batch_size": 3, "rank": 2, "device": "cpu", "early_stop": False}


@pytest.mark.parametrize("form", ["factors", "product"])
@pytest.mark.parametrize("bound", [2e-4, 3e-3])
def test_a_step_moves_the_phase_by_the_stated_amount_at_most(new_model, bound, form):
    config = UnlearnConfig(bound=bound, form=form, rank=4, alpha=8.0)
    adapter = attach(new_model(), config, 4)
    groups = parameter_groups(adapter, config)
    rate = groups[0]["lr"]
    assert [group["lr"] for group in groups] == [rate] and rate < HIGHEST
    assert rate == pytest.approx(PHASE * math.sqrt(bound / 8.0), rel=0.05)
    layers = [m for m in adapter.model.modules() if isinstance(m, fastbound.BoundedAdapter)]
    before = [layer.A.detach().clone() for layer in layers]
    for parameter in (p for group in groups for p in group["params"]):
        parameter.grad = torch.randn(parameter.shape)
    torch.optim.AdamW(groups, weight_decay=0.0).step()
    for layer, A in zip(layers, before, strict=True):
        moved = float((layer.A.detach() - A).abs().max()) / math.sqrt(layer.bound / layer.alpha)
        assert moved == pytest.approx(PHASE, rel=0.06)


def test_every_factor_is_in_one_group_and_layers_of_like_bounds_share_it(new_model):
    config = UnlearnConfig(bound="0.01*spectral", rank=4)
    adapter = attach(new_model(), config, 4)
    groups = parameter_groups(adapter, config)
    rates = [group["lr"] for group in groups]
    assert rates == sorted(set(rates), reverse=True)
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in adapter.model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)


def test_a_bound_too_wide_to_act_takes_the_highest_rate_and_lora_its_own(new_model):
    assert auto_rate(alpha=8.0, bound=8.0) == HIGHEST
    config = UnlearnConfig(adapter="lora", rank=4)
    assert [g["lr"] for g in parameter_groups(attach(new_model(), config, 4), config)] == [LORA]


def test_a_number_is_the_rate_of_all_layers(new_model):
    config = UnlearnConfig(bound="0.01*spectral", rank=4, lr=0.02)
    (group,) = parameter_groups(attach(new_model(), config, 4), config)
    assert group["lr"] == 0.02


def test_a_run_at_auto_logs_and_keeps_the_highest_rate(unlearn_rows, tmp_path):
    result = unlearn_rows(UnlearnConfig(bound=1e-3, **FAST), output=tmp_path / "run")
    assert result.config.lr == "auto"
    assert result.lr == auto_rate(alpha=2.0, bound=1e-3) == 8.9e-3
    log = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert max(line["lr"] for line in log if line["event"] == "step") == result.lr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["lr"] == result.lr


def test_a_run_at_auto_resumes_to_the_same_bits(unlearn_rows, new_model, tmp_path):
    config = UnlearnConfig(bound="0.05*spectral", **{**FAST, "epochs": 4}, checkpoint_every=2)
    whole = unlearn_rows(config, output=tmp_path / "whole")
    folder = tmp_path / "cut"
    unlearn_rows(config, output=folder)
    (folder / "result.json").unlink()
    resumed = unlearn_rows(config, output=folder, resume=True)
    assert resumed.history == whole.history and resumed.lr == whole.lr


@pytest.mark.parametrize("value", ["fast", 0.0, math.nan, None])
def test_what_is_no_rate_is_refused(value):
    with pytest.raises(InputError, match='lr, unless "auto", must be positive and finite, got'):
        UnlearnConfig(lr=value)


def test_the_demonstration_needs_a_number():
    with pytest.raises(InputError, match='give lr a number, not "auto"'):
        Demonstration(UnlearnConfig()).runs()
