"""The numbers an adapter is made with and loads: refused by name where nothing can be computed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import fastbound
from fastbound import BoundedAdapter, BoundedOverBase, FusedBoundedLinear, FusedBoundedMLP
from tests.support.models import Gated

MAKERS = {
    "adapter": lambda **settings: BoundedAdapter(6, 10, **settings),
    "layer": lambda **settings: FusedBoundedLinear(6, 10, **settings),
    "over a base": lambda **settings: BoundedOverBase.from_linear(nn.Linear(6, 10), **settings),
    "block": lambda **settings: FusedBoundedMLP.from_mlp(Gated(), **settings),
    "model": lambda **settings: fastbound.inject(
        nn.Sequential(nn.Linear(6, 10)), target_modules=["0"], **settings
    ),
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"rank": 2.0}, r"rank must be an integer, got 2\.0"),
        ({"rank": True}, "rank must be an integer, got True"),
        ({"rank": np.bool_(True)}, "rank must be an integer"),
        ({"rank": 10**6}, r"rank 1000000.* is out of proportion: the weight is \[N, K\] = "),
        ({"rank": 10**5000}, r"rank must be below 2\^31"),
        ({"alpha": 10**5000}, "alpha must be positive and finite, got an integer beyond 1e308"),
        ({"alpha": math.nan}, "alpha must be positive and finite, got nan"),
        ({"alpha": torch.ones(2)}, "alpha must be positive and finite"),
        ({"alpha": 1e300}, r"alpha must lie between 1e-12 and 1e\+12.* got 1e\+300"),
        ({"alpha": 1e300, "bound": 1.0}, "alpha must lie between"),
        ({"bound": 1e-300}, "bound must lie between .* got 1e-300"),
        ({"bound": 1e300}, "bound must lie between"),
        ({"alpha": 5e-324, "bound": 1e300}, "alpha must lie between"),
        ({"bound": math.inf}, "bound must be positive and finite, got inf"),
        ({"bound": np.float32("nan")}, "bound must be positive and finite"),
        ({"bound": True}, "bound must be positive and finite, got True"),
        ({"dropout": math.nan}, "dropout must be a number with 0 <= dropout < 1, got nan"),
        ({"dropout": "0.1"}, "dropout must be a number"),
        ({"dropout": True}, "dropout must be a number"),
        ({"adapter_dtype": "float32"}, "adapter_dtype must be a floating dtype.*got 'float32'"),
        ({"adapter_dtype": torch.float8_e4m3fn}, "adapter_dtype must be a floating dtype"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype must be a floating dtype"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
@pytest.mark.parametrize("kind", MAKERS)
def test_what_nothing_can_be_computed_with_is_refused_by_name(kind, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        MAKERS[kind](**{"rank": 2, **settings})


def test_numpys_and_torchs_scalars_are_pythons_numbers() -> None:
    adapter = BoundedAdapter(
        6, 10, np.int64(3), alpha=np.float32(2.0), bound=torch.tensor(0.5), dropout=np.float32(0.25)
    )
    numbers = (adapter.rank, adapter.alpha, adapter.bound, adapter.dropout)
    assert [type(n) for n in numbers] == [int, float, float, float]
    assert json.loads(json.dumps(numbers)) == [3, 2.0, 0.5, 0.25]


@pytest.mark.parametrize("rank", [6, 40, 128])
def test_a_rank_above_the_layers_own_is_taken_within_reason(rank: int) -> None:
    layer = FusedBoundedLinear(6, 10, rank)
    assert layer(torch.randn(3, 6)).shape == (3, 10)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.tensor([1.0, math.nan]).double(), "bound must be positive and finite, got nan"),
        (torch.tensor([math.inf, 1.0]).double(), "alpha must be positive and finite, got inf"),
        (torch.tensor([1.0, -1.0]).double(), r"bound must be positive and finite, got -1\.0"),
        (torch.tensor([1.0, 1e-300], dtype=torch.float64), "bound must lie between"),
        (torch.tensor([1.0]).double(), "must be a tensor of two numbers, alpha and bound"),
        (torch.tensor([1, 1]), "must be a tensor of two numbers, alpha and bound"),
        ("1, 1", "must be a tensor of two numbers, alpha and bound"),
        (None, "must be a tensor of two numbers, alpha and bound"),
    ],
)
def test_a_loaded_state_that_is_no_alpha_and_bound_is_refused_by_the_layers_name(
    state, message
) -> None:
    model = nn.Sequential(FusedBoundedLinear(6, 10, 2, bound=0.5))
    content = dict(model.state_dict())
    content["0.adapter._extra_state"] = state
    content["0.adapter.B"] = torch.ones(10, 2)
    with pytest.raises(ValueError, match=rf"'0\.adapter': .*{message}"):
        model.load_state_dict(content)
    adapter = model[0].adapter
    assert (adapter.alpha, adapter.bound) == (2.0, 0.5) and not adapter.B.any()
    with pytest.raises(ValueError, match=message):
        adapter.set_extra_state(state)


@pytest.mark.parametrize("bound", ["auto", "0.5*rms", "0.5*spectral"])
def test_a_bound_in_units_of_a_weight_of_zeros_names_the_layer(bound: str) -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(ValueError, match=r"1: .*weight"):
        fastbound.inject(model, 2, bound=bound, target_modules=["0", "1"])
    assert type(model[0]) is type(model[1]) is nn.Linear


def test_a_bound_that_a_tiny_weight_makes_too_small_is_refused() -> None:
    layer = nn.Linear(6, 10)
    nn.init.constant_(layer.weight, 1e-17)
    with pytest.raises(ValueError, match="bound must lie between"):
        FusedBoundedLinear.from_linear(layer, 2, bound="1e-15*rms")
