"""`fastbound.parameter_groups`: the rate that each layer's bound calls for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastbound
from fastbound.layers.rates import HIGHEST, PHASE, auto_rate


def blocks(**settings) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24), nn.Linear(24, 24))
    fastbound.inject(model, 4, target_modules=["0", "2"], **settings)
    return model


@pytest.mark.parametrize("form", ["factors", "product"])
@pytest.mark.parametrize("bound", [2e-4, 3e-3])
def test_a_step_of_adamw_moves_the_phase_by_the_stated_amount(form: str, bound: float):
    model = blocks(alpha=8.0, bound=bound, form=form)
    (group,) = fastbound.parameter_groups(model)
    assert group["lr"] == pytest.approx(PHASE * math.sqrt(bound / 8.0), rel=0.05)
    assert group["lr"] < HIGHEST
    before = [model[i].adapter.A.detach().clone() for i in (0, 2)]
    for parameter in group["params"]:
        parameter.grad = torch.randn(parameter.shape)
    torch.optim.AdamW([group], weight_decay=0.0).step()
    for i, A in zip((0, 2), before, strict=True):
        moved = (model[i].adapter.A.detach() - A).abs().max() * math.sqrt(8.0 / bound)
        assert float(moved) == pytest.approx(PHASE, rel=0.06)


def test_every_factor_is_in_one_group_highest_rate_first():
    model = blocks(bound=1e-4)
    model[0].adapter.bound /= 4  # half the rate
    groups = fastbound.parameter_groups(model)
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert groups[0]["lr"] == pytest.approx(2 * groups[1]["lr"], rel=0.1)
    assert groups[0]["params"] == [model[2].adapter.A, model[2].adapter.B]


def test_a_bound_too_wide_to_act_takes_the_highest_rate():
    assert auto_rate(alpha=8.0, bound=8.0) == HIGHEST


def test_other_trained_parameters_have_a_rate_of_their_own():
    model = blocks(bound=3e-3)
    model[3].requires_grad_(True)
    model[0].adapter.A.requires_grad_(False)
    *_, others = fastbound.parameter_groups(model, others=2e-4)
    assert others == {"params": [model[3].weight, model[3].bias], "lr": 2e-4}
    grouped = {p for group in fastbound.parameter_groups(model) for p in group["params"]}
    assert grouped == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("adapt", [fastbound.inject, None])
def test_peft_and_fastbound_get_the_same_rates(adapt):
    from peft import get_peft_model

    settings = {"bound": "0.005*spectral", "target_modules": ["0"]}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40))
    if adapt is None:
        model = get_peft_model(model, fastbound.BoundedConfig(r=4, **settings))
    else:
        adapt(model, 4, **settings)
    (group,) = fastbound.parameter_groups(model)
    assert group["lr"] == auto_rate(4.0, 0.005 * _spectral_unit())


def _spectral_unit() -> float:
    torch.manual_seed(0)
    weight = nn.Linear(24, 40).weight
    return torch.linalg.matrix_norm(weight, 2).item() / weight.numel() ** 0.5


@pytest.mark.parametrize(
    ("model", "others", "message"),
    [
        (nn.Linear(2, 2), 1e-3, "the Linear holds no bounded adapter: call fastbound.inject"),
        (nn.Linear(2, 2), 0.0, "others must be positive and finite, got 0.0"),
        (nn.Linear(2, 2), math.nan, "others must be positive and finite, got nan"),
    ],
)
def test_what_has_no_rates_is_refused(model: nn.Module, others: float, message: str):
    with pytest.raises(ValueError, match=message):
        fastbound.parameter_groups(model, others)
