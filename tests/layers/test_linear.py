"""FusedBoundedLinear and its adapter as users hold them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fastbound import BoundedAdapter, BoundedOverBase, FusedBoundedLinear
from tests.support.models import Gated, fused


def adapted(layer: nn.Module | None = None, rank: int = 4, **kwargs: object) -> FusedBoundedLinear:
    """A layer whose adapter is not zero."""
    torch.manual_seed(0)
    bounded = FusedBoundedLinear.from_linear(layer or nn.Linear(24, 40), rank, **kwargs)
    nn.init.normal_(bounded.adapter.B)
    return bounded


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(40, 24)


LAYERS = {
    "Linear": lambda: nn.Linear(24, 40),
    "Linear without bias": lambda: nn.Linear(24, 40, bias=False),
    "Conv1D": conv1d,
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
class TestFromLinear:
    def test_shares_the_parameters_and_starts_equal(self, make) -> None:
        layer = make()
        bounded = FusedBoundedLinear.from_linear(layer, 4)
        assert bounded.weight is layer.weight and bounded.bias is layer.bias
        assert not bounded.weight.requires_grad
        x = torch.randn(3, 5, 24)
        torch.testing.assert_close(bounded(x), layer(x))

    def test_trains_only_the_factors(self, make) -> None:
        bounded = adapted(make())
        bounded(torch.randn(5, 24)).square().sum().backward()
        trained = {name for name, p in bounded.named_parameters() if p.grad is not None}
        assert trained == {"adapter.A", "adapter.B"}

    def test_merge_gives_the_original_class_with_the_same_output(self, make) -> None:
        layer = make()
        before = copy.deepcopy(layer.state_dict())
        bounded = adapted(layer)
        merged = bounded.to_linear()
        assert type(merged) is type(layer)
        x = torch.randn(7, 24)
        torch.testing.assert_close(merged(x), bounded(x), rtol=1e-5, atol=1e-4)
        assert merged.weight is not layer.weight
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())

    def test_unmerged_gives_the_frozen_layer_back(self, make) -> None:
        layer = make()
        plain = adapted(layer).to_linear(merge=False)
        assert type(plain) is type(layer) and plain.weight is layer.weight


class TestBound:
    @pytest.mark.parametrize(
        ("alpha", "bound", "scaling", "omega"),
        [
            (None, None, 1.0, 1.0),
            (16.0, None, 4.0, 1.0),
            (None, 0.25, 0.0625, 4.0),
            (16.0, 4.0, 1.0, 2.0),
        ],
    )
    def test_scaling_and_omega(self, alpha, bound, scaling, omega) -> None:
        layer = FusedBoundedLinear(24, 40, 4, alpha=alpha, bound=bound)
        assert (layer.scaling, layer.omega) == (scaling, omega)
        assert layer.bound == (layer.alpha if bound is None else bound)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("bound", "factor"), [("4*rms", 4), ("2*rms", 2), (" 0.5 * rms", 0.5)])
    def test_a_multiple_of_the_rms_of_the_weight(
        self, bound: str, factor: float, dtype: torch.dtype
    ) -> None:
        layer = FusedBoundedLinear(24, 40, 4, bound=bound, dtype=dtype)
        rms = layer.weight.double().square().mean().sqrt().item()
        assert math.isclose(layer.bound, factor * rms, rel_tol=1e-6)

    @pytest.mark.parametrize("size", [0.1, 10.0, 1e4])
    def test_no_entry_of_delta_weight_exceeds_it(self, size: float) -> None:
        layer = FusedBoundedLinear(64, 96, 8, bound=0.03)
        nn.init.normal_(layer.adapter.A, std=size)
        nn.init.normal_(layer.adapter.B, std=size)
        delta = layer.delta_weight()
        assert delta.shape == (96, 64) and delta.dtype is torch.float32
        assert delta.abs().max() <= 0.03 * (1 + 1e-6)
        nn.init.constant_(layer.adapter.A, math.pi / 2 / layer.omega)
        nn.init.constant_(layer.adapter.B, math.pi / 2 / layer.omega)
        assert layer.delta_weight().max() > 0.03 * (1 - 1e-5)

    def test_slope_at_zero_is_that_of_lora(self) -> None:
        layer = adapted(alpha=8.0, bound=0.5)
        with torch.no_grad():
            layer.adapter.A.mul_(1e-3)
            layer.adapter.B.mul_(1e-3)
        lora = 8.0 / 4 * layer.adapter.B @ layer.adapter.A
        assert (layer.delta_weight() - lora).norm() < 1e-4 * lora.norm()

    def test_delta_weight_is_what_the_forward_adds(self) -> None:
        layer = adapted(bound=0.4)
        x = torch.randn(9, 24)
        expected = nn.functional.linear(x, layer.weight + layer.delta_weight(), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_adds_in_fp32_and_rounds_once(self, dtype: torch.dtype) -> None:
        layer = adapted(nn.Linear(24, 40, dtype=dtype), bound=0.1)
        expected = (layer.weight.double() + layer.adapter.delta_weight().double()).float()
        assert torch.equal(layer.to_linear().weight, expected.to(dtype))


class TestState:
    def test_state_dict_carries_the_bound(self) -> None:
        source = adapted(nn.Linear(24, 40), bound="auto")
        target = FusedBoundedLinear(24, 40, 4)
        target.load_state_dict(source.state_dict())
        assert (target.alpha, target.bound) == (source.alpha, source.bound)
        x = torch.randn(3, 24)
        assert torch.equal(target(x), source(x))

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_are_equal_and_separate(self, copier) -> None:
        source = adapted(bound=0.3)
        twin = copier(source)
        x = torch.randn(3, 24)
        assert torch.equal(twin(x), source(x))
        nn.init.zeros_(twin.adapter.B)
        assert not torch.equal(twin(x), source(x))

    def test_factors_keep_their_own_dtype(self) -> None:
        layer = FusedBoundedLinear(24, 40, 4, dtype=torch.bfloat16)
        assert layer.weight.dtype is torch.bfloat16
        assert layer.adapter.A.dtype is layer.adapter.B.dtype is torch.float32
        half = FusedBoundedLinear(24, 40, 4, adapter_dtype=torch.bfloat16)
        assert half.adapter.A.dtype is torch.bfloat16 and half.weight.dtype is torch.float32


def test_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = adapted()
    x = torch.randn(5, 24, requires_grad=True)

    def gradients(call) -> list[torch.Tensor]:
        return list(torch.autograd.grad(call(x).square().sum(), [x, *layer.adapter.parameters()]))

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank must be >= 1, got 0"),
            ({"rank": 2.5}, "rank must be an integer, got 2.5"),
            ({"alpha": 0.0}, "alpha must be positive and finite, got 0"),
            ({"alpha": float("inf")}, "alpha must be positive and finite, got inf"),
            ({"bound": -1.0}, "bound must be positive and finite, got -1"),
            ({"bound": float("nan")}, "bound must be positive and finite, got nan"),
            ({"bound": "tight"}, '"auto" or a positive multiple such as ".*", got .tight'),
            ({"bound": "0*rms"}, "got '0.rms'"),
            ({"bound": "0*spectral"}, "got '0.spectral'"),
            ({"bound": "nan*spectral"}, "got 'nan.spectral'"),
            ({"bound": "spectral"}, "got 'spectral'"),
            ({"bound": "inf*rms"}, "got 'inf.rms'"),
            ({"bound": "2*max"}, "got '2.max'"),
            ({"backend": "cuda"}, "unknown backend 'cuda'"),
            ({"adapter_dtype": torch.int8}, "adapter_dtype must be a floating dtype"),
        ],
    )
    def test_settings(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            FusedBoundedLinear(24, 40, **settings)
        layer = nn.Linear(24, 40)
        with pytest.raises(ValueError, match=message):
            FusedBoundedLinear.from_linear(layer, **settings)
        assert layer.weight.requires_grad, "a refused layer was frozen"

    def test_other_classes_are_refused(self) -> None:
        class Quantised(nn.Linear):
            pass

        with pytest.raises(TypeError, match=r"expected nn\.Linear or transformers Conv1D, got"):
            FusedBoundedLinear.from_linear(Quantised(2, 2))
        with pytest.raises(TypeError, match="got Conv2d"):
            FusedBoundedLinear.from_linear(nn.Conv2d(1, 1, 1))

    def test_auto_needs_a_weight(self) -> None:
        layer = nn.Linear(2, 2)
        nn.init.zeros_(layer.weight)
        with pytest.raises(ValueError, match="finite, non-zero weight, got one of RMS 0"):
            FusedBoundedLinear.from_linear(layer, 1, bound="auto")
        assert layer.weight.requires_grad, "a refused layer was frozen"
        with pytest.raises(ValueError, match="meta device"):
            FusedBoundedLinear.from_linear(nn.Linear(2, 2, device="meta"), 1, bound="auto")

    def test_an_adapter_by_itself_has_no_auto_bound(self) -> None:
        with pytest.raises(ValueError, match=r"a bound in units of W needs a layer"):
            BoundedAdapter(2, 2, 1, bound="auto")

    def test_a_weight_on_meta_is_named_when_it_runs(self) -> None:
        layer = FusedBoundedLinear(4, 4, 1, device="meta")
        with pytest.raises(ValueError, match="weight is on meta"):
            layer(torch.randn(2, 4))


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
def test_an_activation_in_place_may_follow(shape: tuple[int, ...]) -> None:
    layer = FusedBoundedLinear(5, 3, rank=2)
    torch.relu_(layer(torch.randn(shape))).sum().backward()
    assert layer.adapter.B.grad.abs().max() > 0


@pytest.mark.parametrize("fuse", [False, True], ids=["layer", "block"])
def test_vmap_over_x_is_more_rows(fuse: bool) -> None:
    """As docs/precision.md and docs/training.md say; with dropout it raises."""
    module = fused(Gated) if fuse else adapted(nn.Linear(6, 10))
    x = torch.randn(4, 3, 6)
    torch.testing.assert_close(torch.func.vmap(module)(x), module(x))
    torch.testing.assert_close(
        torch.func.grad(lambda x: module(x).square().sum())(x),
        torch.autograd.grad(module(y := x.clone().requires_grad_()).square().sum(), y)[0],
    )
    dropping = adapted(nn.Linear(6, 10), dropout=0.5)
    with pytest.raises(ValueError, match="vmap with dropout is not supported"):
        torch.func.vmap(dropping, randomness="different")(x)


def test_vmap_over_a_base_raises() -> None:
    layer = BoundedOverBase.from_linear(nn.Linear(6, 10), 4)
    with pytest.raises(ValueError, match=r"torch\.func\.vmap .* is not supported"):
        torch.func.vmap(layer)(torch.randn(4, 3, 6))
