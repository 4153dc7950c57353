"""bounded_addition: the adapter's term on a base's result, in place only where that is safe."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastbound
from fastbound.dispatch.device import Device
from fastbound.dispatch.plan import plan_key
from fastbound.operator.engine import route_for
from fastbound.operator.function import bounded_addition, can_write_into
from fastbound.truth import formula
from fastbound.truth.exactness import assert_as_exact_as_the_formula
from fastbound.truth.operands import LayerOperands, layer_operands, run


def over_linear(x, weight, A, B, bias=None, **settings) -> torch.Tensor:
    return bounded_addition(linear(x, weight, bias), x, A, B, **settings)


@pytest.mark.interpreted
@pytest.mark.parametrize("give_up", [False, True])
@pytest.mark.parametrize("backend", ["torch", "split", "reference"])
@pytest.mark.parametrize("rank", [1, 4, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_exact_as_the_formula(dtype, rank, backend, give_up):
    o = layer_operands((2, 19, 33), 41, rank, dtype)
    assert_as_exact_as_the_formula(o, over_linear, backend=backend, give_up=give_up)


@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 3, 5, 33)])
def test_any_number_of_rows_and_bf16(shape):
    o = layer_operands(shape, 41, 3, torch.bfloat16)
    assert_as_exact_as_the_formula(o, over_linear, give_up=True)


def test_gradcheck_in_fp64():
    o = layer_operands((5, 7), 6, 3, torch.float64, adapter_dtype=torch.float64)
    result = torch.randn(5, 6, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (result, o.x, o.A, o.B)]
    torch.autograd.gradcheck(
        lambda *tensors: bounded_addition(*tensors, scaling=o.scaling, omega=o.omega), leaves
    )


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("result_dtype", [torch.float32, torch.bfloat16])
def test_result_keeps_its_dtype_and_gradients_come_in_each_tensors_own(x_dtype, result_dtype):
    o = layer_operands((6, 9), 11, 3, torch.float32)
    result = torch.randn(6, 11).to(result_dtype).requires_grad_()
    x, A, B = (t.clone().requires_grad_() for t in (o.x.to(x_dtype), o.A, o.B))
    y = bounded_addition(result, x, A, B, scaling=o.scaling, omega=o.omega)
    assert y.dtype is result_dtype
    y.backward(o.dy.to(result_dtype))
    term = formula.bounded_linear(
        x.double(), torch.zeros(11, 9).double(), A.double(), B.double(), scaling=0.7, omega=1.3
    )
    expected = torch.autograd.grad(term, (x, A, B), o.dy.to(result_dtype).double())
    exact = result.double() + term
    coarse = torch.bfloat16 in (x_dtype, result_dtype)
    close = {"rtol": 2e-2, "atol": 5e-2} if coarse else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), exact, **close)
    assert torch.equal(result.grad, o.dy.to(result_dtype))
    for leaf, gradient in zip((x, A, B), expected, strict=True):
        assert leaf.grad.dtype is leaf.dtype
        torch.testing.assert_close(leaf.grad.double(), gradient.double(), **close)


def test_autocast_casts_x_and_neither_the_masters_nor_the_result():
    o = layer_operands((6, 9), 11, 3, torch.float32)
    base = torch.randn(6, 11)
    with torch.autocast("cpu", torch.bfloat16):
        y = bounded_addition(base, o.x, o.A, o.B, scaling=o.scaling, omega=o.omega)
    same = bounded_addition(base, o.x.bfloat16(), o.A, o.B, scaling=o.scaling, omega=o.omega)
    assert y.dtype is torch.float32 and torch.equal(y, same)


def test_saved_are_x_and_the_thin_product_only():
    o = layer_operands((64, 32), 48, 4, torch.float32)
    saved = []
    A, B = o.A.clone().requires_grad_(), o.B.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        over_linear(o.x, o.weight, A, B, give_up=True)
    assert sorted(t.numel() for t in saved) == sorted([64 * 32, 64 * 16, 4 * 32, 48 * 4])


class TestInPlace:
    """With give_up=True, y takes the memory of a result that nobody else can need."""

    def made(self, shape: tuple[int, ...] = (2, 5, 9)) -> tuple[torch.Tensor, LayerOperands]:
        o = layer_operands(shape, 11, 3, torch.float32)
        x = o.x.clone().requires_grad_()
        return linear(x, o.weight, o.bias), LayerOperands(**{**vars(o), "x": x})

    def add(self, result: torch.Tensor, o: LayerOperands, **settings) -> torch.Tensor:
        A = o.A.clone().requires_grad_()
        return bounded_addition(result, o.x, A, o.B, **{"give_up": True, **settings})

    @pytest.mark.parametrize("shape", [(5, 9), (2, 5, 9)])
    def test_a_linear_layers_result_is_written_into(self, shape):
        result, o = self.made(shape)
        y = self.add(result, o)
        assert y.data_ptr() == result.data_ptr()
        torch.relu_(y).sum().backward()  # an activation in place may follow
        assert o.x.grad.abs().max() > 0

    def test_it_is_left_alone_unless_given_up(self):
        result, o = self.made()
        before = result.detach().clone()
        self.add(result, o, give_up=False)
        assert torch.equal(result, before)

    def test_a_result_that_its_node_may_keep_is_left_alone(self):
        result, o = self.made()
        kept = result.sigmoid()
        before = kept.detach().clone()
        self.add(kept, o).sum().backward()
        assert torch.equal(kept, before)

    def test_a_leaf_a_parameter_a_part_an_expanded_one_and_x_itself_are_left_alone(self):
        x = torch.randn(4, 6)
        weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        leaf = torch.randn(4, 6, requires_grad=True)
        for result in (leaf, weight, torch.randn(8, 6)[:4], torch.randn(1, 6).expand(4, 6), x):
            assert not can_write_into(result, x)
        assert can_write_into(torch.randn(4, 6), x)

    def test_memory_kept_by_someone_unknown_is_an_error_not_a_wrong_gradient(self):
        result, o = self.made()
        squared = result.square()  # saves result
        y = self.add(result, o)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (y.sum() + squared.sum()).backward()

    def test_selective_checkpointing_keeps_what_it_saved(self):
        _, o = self.made()
        A = o.A.clone().requires_grad_()
        saved = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]

        def function(x):
            return bounded_addition(linear(x, o.weight, o.bias), x, A, o.B, give_up=True).sin()

        got = checkpoint(
            function,
            o.x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(saved),
        )
        one = torch.autograd.grad(got.sum(), (o.x, A))
        other = torch.autograd.grad(function(o.x).sum(), (o.x, A))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("give_up", [False, True])
def test_compiles_whole_with_dynamic_rows(give_up):
    o = layer_operands((4, 9), 11, 3, torch.float32)

    def function(x, A, B):
        result = linear(x, o.weight, o.bias)
        return bounded_addition(result, x, A, B, scaling=0.7, omega=1.3, give_up=give_up).relu()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        leaves = [t.clone().requires_grad_() for t in (torch.randn(rows, 9), o.A, o.B)]
        one = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        other = torch.autograd.grad(function(*leaves).sum(), leaves)
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


def test_registered_operators_pass_opcheck():
    operators = torch.ops.fastbound
    result, x = torch.randn(5, 11), torch.randn(5, 9)
    term = (torch.randn(3, 9), torch.randn(11, 3), 0.7, 1.3, "torch", None, 0.0)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = (x, None, None, result, *term)
    torch.library.opcheck(operators.forward.default, forward, test_utils=tests)
    backward = (torch.randn(5, 11), x, torch.randn(5, 16), None, torch.float32, True, True, True)
    torch.library.opcheck(operators.backward.default, (*backward, *term), test_utils=tests)


def test_dropout_is_the_operators_own():
    o = layer_operands((37, 24), 20, 4, torch.float32)

    def same_seed(function):
        def call(*tensors, **settings):
            torch.manual_seed(4)
            return function(*tensors, dropout=0.4, **settings)

        return call

    ours, operator = run(o, same_seed(over_linear)), run(o, same_seed(fastbound.bounded_linear))
    formula = run(o, same_seed(over_linear), backend="reference")
    for name, expected in operator.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(formula[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dropouts_mask_is_one_whoever_makes_the_products(dtype):
    """Backward, too, where Triton's mask is in words and PyTorch's in bytes; K and N are odd."""
    o = layer_operands((70, 67), 41, 5, dtype)

    def call(*operands, **settings):
        torch.manual_seed(5)
        return over_linear(*operands, dropout=0.4, **settings)

    assert_as_exact_as_the_formula(
        o, partial(call, backend="split"), partial(call, backend="reference")
    )


@pytest.mark.interpreted
def test_the_products_are_tritons_where_they_can_run_and_never_fused():
    cpu = torch.device("cpu")

    def plan(N, dtype, backend="auto"):
        return route_for(*plan_key(cpu, 64, N, 32, 4, dtype, backend, over_base=True)).plan

    assert plan(32, torch.float32, "split").strategy == "split"
    assert plan(32, torch.float32).strategy == "torch"
    with mock.patch("fastbound.dispatch.plan.describe", return_value=Device("sm_90", 132)):
        for dtype in (torch.bfloat16, torch.float32):
            assert plan(33, dtype).strategy == "split" and plan(33, dtype).tiles is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"result": torch.zeros(4, 11)}, "their rows differ"),
        ({"result": torch.zeros(5, 12)}, r"B \[11, 3\] does not match result \[5, 12\]"),
        ({"A": torch.zeros(3, 8)}, r"A \[3, 8\] does not match x \[5, 9\]"),
        ({"B": torch.zeros(11, 4)}, r"B \[11, 4\] does not match A \[3, 9\]"),
        ({"A": torch.zeros(0, 9), "B": torch.zeros(11, 0)}, "rank must be >= 1"),
        ({"x": torch.zeros(5, 9, device="meta")}, "meta|is on"),
        ({"omega": float("nan")}, "must be finite"),
        ({"backend": "fused"}, "computes x Wᵀ itself"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_bad_operands_are_named(changes, message):
    given = {
        "result": torch.zeros(5, 11),
        "x": torch.zeros(5, 9),
        "A": torch.zeros(3, 9),
        "B": torch.zeros(11, 3),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        bounded_addition(**given)


def test_integers_are_named():
    x, A, B = (torch.zeros(shape) for shape in ((5, 9), (3, 9), (11, 3)))
    with pytest.raises(TypeError, match=r"result is torch\.int64"):
        bounded_addition(torch.zeros(5, 11).long(), x, A, B)
