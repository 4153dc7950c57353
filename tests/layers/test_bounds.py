"""A bound in units of a layer's weight, and what it guarantees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastbound
from fastbound import FusedBoundedLinear
from fastbound.layers.bounds import bound_of_weight, spectral_norm, weight_bound


def spectrum(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix of these singular values."""
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator)).Q
        for size in (rows, columns)
    )
    return left @ torch.diag(values) @ right.T


WEIGHTS = {
    "normal": lambda: torch.randn(512, 512, generator=torch.Generator().manual_seed(0)),
    "wide": lambda: torch.randn(64, 900, generator=torch.Generator().manual_seed(0)),
    "one row": lambda: torch.linspace(-1, 1, 40).view(1, 40),
    "rank 1": lambda: torch.ones(30, 20),
    "all alike": lambda: torch.eye(100),
    "two alike": lambda: spectrum(torch.tensor([3.0, 3.0, 1.0]), 70, 50),
    "falling": lambda: spectrum(100 / torch.arange(1.0, 41.0), 80, 60),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_largest_singular_value_from_below_to_one_percent(kind: str, dtype: torch.dtype):
    weight = WEIGHTS[kind]().to(dtype)
    exact = float(torch.linalg.matrix_norm(weight.double(), 2))
    for form in (weight, weight.T, weight.repeat_interleave(2, dim=1)[:, ::2]):
        assert 0.99 * exact <= spectral_norm(form) <= exact * (1 + 1e-5)


def test_no_random_number_of_the_callers_is_drawn_and_every_time_is_alike():
    weight = WEIGHTS["normal"]()
    torch.manual_seed(3)
    first = spectral_norm(weight)
    after = torch.rand(4)
    torch.manual_seed(5)
    assert spectral_norm(weight) == first
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(4))


def test_generators_of_other_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    FusedBoundedLinear.from_linear(nn.Linear(64, 96), rank=4)
    assert seeded == []


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (7, 300)])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("c", [0.1, 0.5, 2.0])
def test_a_saturated_change_stays_within_c_times_the_weight(shape, rank: int, c: float):
    N, K = shape
    layer = FusedBoundedLinear(K, N, rank, bound=f"{c}*spectral")
    for factor in (layer.adapter.A, layer.adapter.B):
        nn.init.constant_(factor, math.pi / 2 / layer.omega)  # every sine is 1
    delta, weight = layer.delta_weight(), layer.weight.detach()
    assert delta.abs().min() > layer.bound * (1 - 1e-5), "the adapter is not saturated"
    norm, largest = torch.linalg.matrix_norm(delta), torch.linalg.matrix_norm(weight, 2)
    assert c * largest * 0.99 <= norm <= c * largest * (1 + 1e-5)
    assert torch.linalg.matrix_norm(delta, 2) <= c * largest * (1 + 1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_how_far_the_bound_is_used_is_told_without_the_change_itself(rank: int):
    layer = FusedBoundedLinear(24, 40, rank, bound="0.5*spectral")
    assert layer.adapter.bound_in_use() == 0.0
    nn.init.normal_(layer.adapter.A, std=0.3)
    nn.init.normal_(layer.adapter.B, std=0.3)
    used = layer.delta_weight().double().square().mean().sqrt() / layer.bound
    assert layer.adapter.bound_in_use() == pytest.approx(float(used), rel=1e-5)
    (row,) = fastbound.explain(layer)
    assert row.bound == layer.bound and row.bound_in_use == layer.adapter.bound_in_use()
    assert f"bound {layer.bound:.3g} per entry of ΔW, {float(used):.0%} in use" in str(
        fastbound.explain(layer)
    )
    for factor in (layer.adapter.A, layer.adapter.B):
        nn.init.constant_(factor, math.pi / 2 / layer.omega)
    assert layer.adapter.bound_in_use() == pytest.approx(1.0)


def test_where_factors_have_no_memory_the_use_is_not_told():
    layer = FusedBoundedLinear(24, 40, 2, bound=0.1, device="meta")
    (row,) = fastbound.explain(layer)
    assert (row.bound, row.bound_in_use) == (0.1, None) and "in use" not in str(
        fastbound.explain(layer)
    )


def test_conv1d_and_its_transposed_linear_have_one_bound():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(40, 24)
    linear = nn.Linear(24, 40)
    linear.weight.data.copy_(conv.weight.T)
    one, two = (
        FusedBoundedLinear.from_linear(each, 4, bound="0.5*spectral") for each in (conv, linear)
    )
    assert math.isclose(one.bound, two.bound, rel_tol=1e-4)


def test_each_layer_of_a_model_has_its_own_and_keeps_it_in_the_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
    model[2].weight.data.mul_(10)
    bases = [spectral_norm(model[i].weight) / math.sqrt(24 * 40) for i in (0, 2)]
    fastbound.inject(model, 2, bound="0.5*spectral", target_modules=["0", "2"])
    assert [model[i].bound for i in (0, 2)] == pytest.approx([0.5 * b for b in bases])
    fastbound.save_adapter(model, tmp_path / "adapter")
    other = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
    fastbound.load_adapter(other, tmp_path / "adapter")
    assert [other[i].bound for i in (0, 2)] == [model[i].bound for i in (0, 2)]


@pytest.mark.parametrize("unit", ["spectral", "rms"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_without_a_scale_is_refused(unit: str, value: float):
    weight = torch.zeros(6, 4)
    weight[0, 0] = value
    with pytest.raises(ValueError, match="finite, non-zero weight"):
        bound_of_weight(f"2*{unit}", weight)


def test_a_weight_on_meta_is_refused():
    with pytest.raises(ValueError, match="on the meta device: load it first"):
        bound_of_weight("0.5*spectral", torch.empty(4, 4, device="meta"))


def test_auto_is_a_multiple_like_any_other():
    assert weight_bound("auto") == weight_bound("0.5*spectral")
    assert weight_bound(" 0.5 * spectral") == (0.5, "spectral")
