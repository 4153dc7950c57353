"""Tools that look at a call from outside: FLOP counters, torch.jit.trace, torch.compile."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbound import BoundedOverBase, FusedBoundedLinear, FusedBoundedMLP, bounded_linear
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.function import bounded_addition
from fastbound.truth.operands import Operands, block_operands, layer_operands

M, K, N, RANK = 6, 10, 14, 3


def flops(o: Operands, function, wanted: tuple[str, ...], **settings) -> tuple[int, int]:
    """Of a forward and of a backward for the named gradients of x and of the trained."""
    o = o.leaves()
    with FlopCounterMode(display=False) as counter:
        y = function(o.x, **o.arguments, **settings)
    forward = counter.get_total_flops()
    leaves = [{"dx": o.x, **o.trained}[name] for name in wanted]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y, leaves, o.dy)
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("wanted", [("dx", "dA", "dB"), ("dx",), ("dA",), ("dB",), ("dA", "dB")])
def test_a_layers_flops_are_those_of_its_products(wanted: tuple[str, ...]) -> None:
    o = layer_operands((2, 3, K), N, RANK, torch.float32)
    unwanted = {"x": "dx", "A": "dA", "B": "dB"}

    def function(x, A, B, **rest):
        x, A, B = (
            t if unwanted[name] in wanted else t.detach()
            for name, t in (("x", x), ("A", A), ("B", B))
        )
        return bounded_linear(x, A=A, B=B, **rest)

    weight, a, b = 2 * M * K * N, 2 * M * K * RANK, 2 * M * N * RANK
    backward = ("dx" in wanted) * (weight + a) + ("dA" in wanted) * a + ("dB" in wanted) * b
    backward += b * ("dx" in wanted or "dA" in wanted)
    assert flops(o, function, wanted) == (weight + a + b, backward)
    assert flops(o, function, wanted, backend="reference") == (weight + a + b, backward)


def test_a_term_over_a_base_counts_without_the_weight() -> None:
    o = layer_operands((M, K), N, RANK, torch.float32)
    with FlopCounterMode(display=False) as counter:
        bounded_addition(torch.zeros(M, N), o.x, o.A, o.B)
    assert counter.get_total_flops() == 2 * M * K * RANK + 2 * M * N * RANK


@pytest.mark.parametrize("wanted", [("dx", "dA", "dB"), ("dx",), ("dA",), ("dB",)])
def test_a_layers_flops_in_the_product_form_are_the_formulas(wanted: tuple[str, ...]) -> None:
    o = layer_operands((2, 3, K), N, RANK, torch.float32, form="product")

    def function(x, A, B, **rest):
        x, A, B = (
            t if name in wanted else t.detach() for name, t in (("dx", x), ("dA", A), ("dB", B))
        )
        return bounded_linear(x, A=A, B=B, **rest)

    expected = flops(o, function, wanted, backend="reference")
    assert expected[0] == 2 * N * K * (M + RANK) and flops(o, function, wanted) == expected


@pytest.mark.parametrize("form", ["factors", "product"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ranks", [(2, 3, 4), (0, 3, 0)])
@pytest.mark.parametrize("need_dx", [True, False])
def test_a_blocks_flops_are_the_formulas(form: str, gated: bool, ranks, need_dx: bool) -> None:
    block = block_operands((M, K), N, ranks, torch.float32, gated=gated, form=form)
    wanted = (*(("dx",) if need_dx else ()), *block.trained)

    def function(x, **rest):
        return bounded_mlp(x if need_dx else x.detach(), **rest)

    expected = flops(block, function, wanted, backend="reference")
    assert expected[0] > 0 and flops(block, function, wanted) == expected
    forward, backward = flops(block, function, wanted, recompute="gate_up")
    per_rank = K * N if form == "product" else M * N
    first = ranks[:2] if gated else ranks[1:2]
    again = 2 * sum(M * N * K + per_rank * rank for rank in first)
    assert (forward, backward) == (expected[0], expected[1] + again)


LAYERS = {
    "layer": lambda: (FusedBoundedLinear(K, N, RANK), torch.randn(M, K)),
    "over its base": lambda: (BoundedOverBase.from_linear(Own(K, N), RANK), torch.randn(M, K)),
    "block": lambda: (fused_block(), torch.randn(2, 3, 16)),
}


class Own(torch.nn.Linear):
    """A subclass, so that it is called itself."""


class MLP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)
        self.act = torch.nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def fused_block() -> FusedBoundedMLP:
    return FusedBoundedMLP.from_mlp(MLP(), RANK)


@pytest.fixture(params=LAYERS)
def layer_and_x(request: pytest.FixtureRequest) -> Iterator[tuple[torch.nn.Module, torch.Tensor]]:
    layer, x = LAYERS[request.param]()
    for name, parameter in layer.named_parameters():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter)
    yield layer, x
    torch.compiler.reset()  # a forward is compiled a limited number of times per process


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen", "trained", "x alone"])
def test_compiles_whole_whether_or_not_a_gradient_is_asked_for(layer_and_x, mode: str) -> None:
    layer, x = layer_and_x
    if mode in ("frozen", "x alone"):
        layer.requires_grad_(False)
    x.requires_grad_(mode == "x alone")
    context = getattr(torch, mode) if mode.startswith(("no", "inf")) else torch.enable_grad
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with context():
        expected, got = layer(x), compiled(x)
    torch.testing.assert_close(got, expected)
    assert got.requires_grad == expected.requires_grad == (mode in ("trained", "x alone"))


def test_one_compiled_layer_serves_with_and_without_gradients(layer_and_x) -> None:
    layer, x = layer_and_x
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        first = compiled(x)
    gradients = torch.autograd.grad(compiled(x).square().sum(), trained)
    with torch.no_grad():
        assert torch.equal(compiled(x), first)
    expected = torch.autograd.grad(layer(x).square().sum(), trained)
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_without_gradients_is_saved_and_loaded(layer_and_x) -> None:
    layer, x = layer_and_x
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(layer, (x,)), file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(2 * x), layer(2 * x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_with_gradients_is_refused_with_the_remedy(layer_and_x) -> None:
    with pytest.raises(
        RuntimeError, match=r"does not record the gradient.*trace under torch\.no_grad\(\)"
    ):
        torch.jit.trace(layer_and_x[0], (layer_and_x[1],))
