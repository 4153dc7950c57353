"""Adapter dropout: what its mask is, that every product takes the same one, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastbound
from fastbound import bounded_linear
from fastbound.operator import dropout
from fastbound.performance.memory import saved_bytes
from fastbound.truth import formula
from fastbound.truth.exactness import assert_as_exact_as_the_formula
from fastbound.truth.operands import LayerOperands, layer_operands, run
from tests.support.models import Gated

pytestmark = pytest.mark.usefixtures("interpreted_bf16")
BACKENDS = ["torch", "split", "fused", "reference"]
P = 0.3


def mask(M: int, K: int, p: float, seed: int = 0) -> Tensor:
    return dropout.keep_mask(dropout.keep_bits(torch.tensor([seed]), M, K, p), K)


def dropped(o: LayerOperands, p: float, seed: int) -> Callable[..., Tensor]:
    """The formula with the mask of the next call after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    M, K = o.x.reshape(-1, o.x.shape[-1]).shape
    bits = dropout.keep_bits(dropout.draw_seed(o.x.device), M, K, p)
    keep = dropout.keep_mask(bits, K).view(o.x.shape)

    def masked(x: Tensor, *, scaling: float, **operands: Any) -> Tensor:
        scaling /= dropout.keep_rate(p)
        return formula.bounded_linear(x, scaling=scaling, keep=keep, **operands)

    return masked


def seeded(seed: int, *arguments: Tensor, **settings: object) -> Tensor:
    torch.manual_seed(seed)
    return bounded_linear(*arguments, **settings)


class TestMask:
    @pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
    def test_keeps_one_minus_p_in_all_and_in_every_row_and_column(self, p: float) -> None:
        M, K = 1500, 1024
        kept = mask(M, K, p).double()
        rate, variance = dropout.keep_rate(p), p * (1 - p)
        assert abs(rate - (1 - p)) <= 0.5 / dropout.LEVELS
        assert abs(kept.mean() - rate) < 5 * (variance / (M * K)) ** 0.5
        for axis, size in ((0, M), (1, K)):
            spread = kept.mean(axis).var() / (variance / size)
            assert abs(spread - 1) < 5 * (2 / kept.shape[1 - axis]) ** 0.5, "not binomial"

    def test_elements_are_independent_of_their_neighbours_and_of_other_seeds(self) -> None:
        M, K = 1500, 1024
        a = mask(M, K, 0.5).double() * 2 - 1
        others = [mask(M, K, 0.5, seed).double() * 2 - 1 for seed in (1, 2**32, 2**62)]
        shifts = [(i, j) for i in (0, 1, 2, 8) for j in (*range(1, 9), 16, 32)]
        pairs = [a * torch.roll(a, shift, (0, 1)) for shift in [(1, 0), (2, 0), *shifts]]
        for product in [*pairs, *(a * other for other in others)]:
            assert abs(product.mean()) < 5 / (M * K) ** 0.5

    def test_is_philox_as_published(self) -> None:
        """Random123's known answer, seven rounds of zeros: 16 bits at a time, by the threshold."""
        words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
        halves = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16)]
        for place, half in enumerate(halves):
            assert mask(1, 8, half / dropout.LEVELS)[0, place]
            assert not mask(1, 8, (half + 1) / dropout.LEVELS)[0, place]

    def test_does_not_depend_on_how_many_rows_are_made_at_once(self, monkeypatch) -> None:
        whole = mask(37, 50, P)
        monkeypatch.setattr(dropout, "_CHUNK", 40)
        assert torch.equal(whole, mask(37, 50, P))
        assert torch.equal(whole[:9], mask(9, 50, P))

    @pytest.mark.interpreted
    @pytest.mark.parametrize("shape", [(1, 1), (37, 31), (33, 64), (200, 97)])
    def test_the_kernel_makes_the_same_bits(self, shape: tuple[int, int]) -> None:
        from fastbound.kernels.dropout import keep_bits

        for seed in (0, 123_456_789_012_345):
            arguments = (torch.tensor([seed]), *shape, dropout.threshold(P), dropout.ROUNDS)
            bytes_ = keep_bits(*arguments).view(torch.uint8)
            assert torch.equal(dropout.keep_mask(bytes_, shape[1]), mask(*shape, P, seed))

    def test_no_rows(self) -> None:
        assert mask(0, 9, P).shape == (0, 9)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_every_gradient_take_one_mask(backend: str, dtype: torch.dtype) -> None:
    """On sizes of more than one tile; the torch path's rows are more than it masks at once."""
    shape, N = ((2, 70, 136), 72) if backend in ("split", "fused") else ((2, 300, 65), 40)
    o = layer_operands(shape, N, 5, dtype)
    formula = dropped(o, P, seed=4)
    ours = partial(seeded, 4, dropout=P, backend=backend)
    assert_as_exact_as_the_formula(o, ours, formula)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["split", "fused"])
def test_odd_sizes_and_wide_ranks(backend: str) -> None:
    o = layer_operands((71, 67), 35, 40, torch.float32)
    formula = dropped(o, 0.5, seed=1)
    assert_as_exact_as_the_formula(o, partial(seeded, 1, dropout=0.5, backend=backend), formula)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_call_draws_from_the_default_generator(backend: str) -> None:
    o = layer_operands((40, 32), 24, 4, torch.float32)
    function = partial(bounded_linear, dropout=P, backend=backend)
    torch.manual_seed(9)
    first, other = run(o, function), run(o, function)
    torch.manual_seed(9)
    again = run(o, function)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["y"], other["y"])


def test_the_mean_over_calls_is_the_operator_without_dropout() -> None:
    o = layer_operands((6, 16), 12, 4, torch.float64).to(torch.float64)
    ys = torch.stack([run(o, partial(bounded_linear, dropout=P))["y"] for _ in range(1500)])
    error = (ys.mean(0) - run(o, bounded_linear)["y"]).abs()
    assert (error < 5.5 * ys.std(0) / 1500**0.5).all()


def test_gradcheck_in_fp64() -> None:
    o = layer_operands((5, 9), 7, 3, torch.float64, adapter_dtype=torch.float64)
    weight = o.weight.double()
    inputs = [t.double().requires_grad_() for t in (o.x, o.A, o.B, o.bias)]

    def function(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return seeded(3, x, weight, A, B, bias, scaling=0.7, omega=1.3, dropout=P)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_saves_a_seed_and_no_mask(backend: str) -> None:
    M, K, N = 128, 96, 256
    o = layer_operands((M, K), N, 16, torch.bfloat16, bias=False)
    x, A, B = (t.requires_grad_() for t in (o.x, o.A, o.B))

    def call() -> Tensor:
        return bounded_linear(x, o.weight, A, B, dropout=P, backend=backend)

    assert saved_bytes(call, [o.weight, A, B, x]) == M * 16 * 2 + 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_makes_the_same_mask_again(reentrant: bool) -> None:
    layer = fastbound.FusedBoundedLinear(16, 12, 4, dropout=P)
    torch.nn.init.normal_(layer.adapter.B)
    x = torch.randn(20, 16, requires_grad=True)
    leaves = [x, layer.adapter.A, layer.adapter.B]

    def gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        torch.manual_seed(2)
        for leaf in leaves:
            leaf.grad = None
        function(x).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break_to_the_same_bits(backend: str) -> None:
    o = layer_operands((2, 7, 12), 10, 4, torch.float32)
    function = partial(bounded_linear, dropout=P)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    torch.manual_seed(5)
    eager = run(o, function)
    torch.manual_seed(5)
    graph = run(o, compiled)
    for name in eager:
        torch.testing.assert_close(graph[name], eager[name])


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), "0.1", None, True])
@pytest.mark.parametrize("take", ["operator", "layer", "from_linear", "inject", "block"])
def test_a_dropout_out_of_range_is_refused_before_anything_changes(p: object, take: str) -> None:
    linear, block = torch.nn.Linear(6, 4), Gated(K=6, N=10)
    o = layer_operands((3, 6), 4, 2, torch.float32)
    calls: dict[str, Callable[[], object]] = {
        "operator": lambda: bounded_linear(o.x, o.weight, o.A, o.B, dropout=p),
        "layer": lambda: fastbound.FusedBoundedLinear(6, 4, 2, dropout=p),
        "from_linear": lambda: fastbound.FusedBoundedLinear.from_linear(linear, 2, dropout=p),
        "inject": lambda: fastbound.inject(block, 2, dropout=p, target_modules=["up"]),
        "block": lambda: fastbound.FusedBoundedMLP.from_mlp(block, 2, dropout=p),
    }
    with pytest.raises(ValueError, match="dropout must be a number with 0 <= dropout < 1"):
        calls[take]()
    assert linear.weight.requires_grad and type(block.up) is torch.nn.Linear


class TestModules:
    def test_training_drops_and_evaluation_does_not(self) -> None:
        layer = fastbound.FusedBoundedLinear(16, 12, 4, dropout=P)
        torch.nn.init.normal_(layer.adapter.B)
        assert "dropout=0.3" in repr(layer)
        x = torch.randn(20, 16)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))

    def test_a_block_runs_layer_by_layer_in_training_and_fused_in_evaluation(
        self, tiny_model
    ) -> None:
        model = tiny_model("llama").train()
        report = fastbound.inject(model, rank=2, dropout=0.1)
        assert not report.fused
        assert set(report.unfused.values()) == {"adapter dropout 0.1 in training"}
        assert "layer by layer: adapter dropout 0.1 in training" in str(fastbound.explain(model))
        tokens = torch.arange(12).reshape(1, 12)
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.eval()
        assert all(block.fused for block in fastbound.explain(model).blocks)

    def test_changed_to_zero_it_is_gone(self) -> None:
        layer = fastbound.FusedBoundedLinear(16, 12, 4, dropout=P)
        torch.nn.init.normal_(layer.adapter.B)
        layer.adapter.dropout = 0.0
        x = torch.randn(20, 16)
        assert torch.equal(layer(x), layer.eval()(x))
