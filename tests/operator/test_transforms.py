"""torch.func over the operators: first derivatives and vmap over x work, the rest says why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import fastbound
from fastbound import bounded_linear
from fastbound.operator.block_function import bounded_mlp
from fastbound.truth import formula
from fastbound.truth.formula import Projection

torch.manual_seed(0)
X, W, A, B = (
    torch.randn(*size, dtype=torch.float64) for size in ((3, 5, 12), (10, 12), (4, 12), (10, 4))
)
DOWN = torch.randn(12, 10, dtype=torch.float64)

OPERATORS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear": (
        lambda x, A, B: bounded_linear(x, W, A, B),
        lambda x, A, B: formula.bounded_linear(x, W, A, B),
    ),
    "product form": (
        lambda x, A, B: bounded_linear(x, W, A, B, form="product"),
        lambda x, A, B: formula.bounded_linear(x, W, A, B, form="product"),
    ),
    "block of the product form": (
        lambda x, A, B: bounded_mlp(
            x, Projection(W, None, A, B, form="product"), Projection(DOWN), Projection(W / 2)
        ),
        lambda x, A, B: formula.bounded_mlp(
            x, Projection(W, None, A, B, form="product"), Projection(DOWN), Projection(W / 2)
        ),
    ),
    "plain block": (
        lambda x, A, B: bounded_mlp(x, Projection(W, None, A, B), Projection(DOWN)),
        lambda x, A, B: formula.bounded_mlp(x, Projection(W, None, A, B), Projection(DOWN)),
    ),
    "gated block": (
        lambda x, A, B: bounded_mlp(
            x, Projection(W, None, A, B), Projection(DOWN), Projection(W / 2)
        ),
        lambda x, A, B: formula.bounded_mlp(
            x, Projection(W, None, A, B), Projection(DOWN), Projection(W / 2)
        ),
    ),
}


@pytest.fixture(params=OPERATORS)
def pair(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return OPERATORS[request.param]


def _loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, A, B: function(x, A, B).square().sum()


def _same(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_grad(pair) -> None:
    ours, truth = (grad(_loss(f), argnums=(0, 1, 2))(X, A, B) for f in pair)
    _same(ours, truth)


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_x_is_more_rows(pair, dim: int) -> None:
    ours, truth = (vmap(f, in_dims=(dim, None, None))(X, A, B) for f in pair)
    _same((ours,), (truth,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample(pair) -> None:
    each = (vmap(grad(_loss(f), argnums=(0, 1, 2)), in_dims=(0, None, None)) for f in pair)
    ours, truth = (f(X, A, B) for f in each)
    _same(ours, truth)


def test_a_second_derivative_is_refused_and_not_zero(pair) -> None:
    def second(x: Tensor) -> Tensor:
        return grad(lambda x: pair[0](x, A, B).pow(3).sum())(x).sum()

    with pytest.raises(RuntimeError, match=r"differentiable only once.*reference"):
        grad(second)(X)


def test_vmap_over_adapters_is_refused_by_name(pair) -> None:
    with pytest.raises(ValueError, match="vmap over weights or adapters is not supported"):
        vmap(pair[0], in_dims=(None, 0, None))(X[0], torch.stack([A, A]), B)


def test_vmap_with_dropout_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="vmap with dropout is not supported"):
        vmap(lambda x: bounded_linear(x, W, A, B, dropout=0.5), randomness="different")(X)


def test_forward_mode_is_refused_by_name(pair) -> None:
    with pytest.raises(
        RuntimeError, match=r"fastbound's operators have no forward-mode.*reference"
    ):
        jvp(lambda x: pair[0](x, A, B), (X,), (X,))
    with pytest.raises(RuntimeError, match=r"no forward-mode"), forward_ad.dual_level():
        pair[0](forward_ad.make_dual(X, X), A, B)


def test_forward_mode_of_something_else_passes_by(pair) -> None:
    y, tangent = jvp(lambda x: pair[0](X, A, B).sum() + x.sum(), (X,), (X,))
    torch.testing.assert_close(tangent, X.sum())
    torch.testing.assert_close(y, pair[1](X, A, B).sum() + X.sum())


def test_forward_mode_by_the_formula(pair) -> None:
    _, ours = jvp(lambda x: bounded_linear(x, W, A, B, backend="reference"), (X,), (X,))
    torch.testing.assert_close(ours, formula.bounded_linear(X, W, A, B))  # linear in x


def test_functional_call_trains_the_adapter_of_a_layer() -> None:
    layer = fastbound.FusedBoundedLinear(12, 10, 4, dtype=torch.float64)
    adapter = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    gradients = grad(lambda p: functional_call(layer, p, (X,)).square().sum())(adapter)
    layer(X).square().sum().backward()
    _same(tuple(gradients.values()), tuple(p.grad for p in adapter.values()))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_batch_of_gradients_at_once(backend):
    layer = fastbound.FusedBoundedLinear.from_linear(torch.nn.Linear(6, 7), 2, backend=backend)
    torch.nn.init.normal_(layer.adapter.B)
    x = torch.randn(6, requires_grad=True)
    expected = (layer.weight + layer.delta_weight()).detach()
    found = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    torch.testing.assert_close(found, expected)
    (batched,) = torch.autograd.grad(layer(x), x, torch.eye(7), is_grads_batched=True)
    torch.testing.assert_close(batched, expected)


def test_a_batch_of_gradients_at_once_through_a_block():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    mlp = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2))
    block = fastbound.FusedBoundedMLP.from_mlp(mlp, rank=2)
    x = torch.randn(8)
    found = torch.autograd.functional.jacobian(block, x, vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(block, x))
