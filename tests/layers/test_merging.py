"""A merge that would write what is not finite is refused by name, and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastbound
from fastbound import FusedBoundedLinear, FusedBoundedMLP
from fastbound.layers.over_base import BoundedOverBase


class Own(nn.Linear):
    """A subclass whose call is nn.Linear's, so it is adapted over."""


def saturate(layer: FusedBoundedLinear) -> None:
    """Every entry of ΔW at the bound."""
    for factor in (layer.adapter.A, layer.adapter.B):
        nn.init.constant_(factor, math.pi / 2 / layer.omega)


@pytest.mark.parametrize("kind", [nn.Linear, Own])
def test_a_sum_beyond_the_dtype_is_refused_by_the_layer(kind) -> None:
    size, bound = 60_000.0, 20_000.0
    base = kind(8, 8).half()
    nn.init.constant_(base.weight, size)
    make = FusedBoundedLinear if kind is nn.Linear else BoundedOverBase
    layer = make.from_linear(base, rank=1, bound=bound)
    assert layer.merge_obstacle() is None  # ΔW is zero yet
    saturate(layer)
    with pytest.raises(
        ValueError, match=r"W \+ ΔW is not finite in torch.float16.* merge it in a wider"
    ):
        layer.to_linear()
    assert layer.to_linear(merge=False).weight.eq(size).all()


def test_a_model_is_merged_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).half()
    nn.init.constant_(model[1].weight, 60_000.0)
    fastbound.inject(model, 1, bound=20_000.0, target_modules=["0", "1"])
    nn.init.normal_(model[0].adapter.B)
    saturate(model[1])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'1' cannot be merged: W \+ ΔW is not finite"):
        fastbound.merge(model)
    assert all(isinstance(layer, FusedBoundedLinear) for layer in model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_blocks_projection_is_named(tiny_model) -> None:
    block = FusedBoundedMLP.from_mlp(tiny_model("llama").model.layers[0].mlp.half(), 1, bound=5e4)
    down = block.down_proj
    nn.init.constant_(down.weight, 60_000.0)
    saturate(down)
    with pytest.raises(ValueError, match="down_proj cannot be merged: W"):
        block.to_mlp()
    assert block.down_proj is down


def test_a_weight_that_is_broken_itself_is_told_from_an_adapter_that_is() -> None:
    layer = FusedBoundedLinear(8, 8, rank=2)
    layer.weight.data[3, 4] = math.nan
    with pytest.raises(ValueError, match="its weight itself holds a NaN or an infinity"):
        layer.to_linear()
    layer.weight.data[3, 4] = 0.0
    layer.adapter.B.data[1, 1] = math.inf
    with pytest.raises(ValueError, match=r"its adapter\.B holds a NaN or an infinity"):
        layer.to_linear()


def test_a_conv1d_merges_in_its_own_layout() -> None:
    layer = FusedBoundedLinear.from_linear(Conv1D(6, 4), 2)
    assert layer.to_linear().weight.shape == (4, 6)
