"""The product form, y = x (W + s·sin(ω·B A))ᵀ + b, against the formula in fp64, by PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbound import bounded_linear
from fastbound.operator import product
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.function import bounded_addition
from fastbound.performance.memory import saved_bytes
from fastbound.truth import formula
from fastbound.truth.exactness import assert_as_exact_as_the_formula, assert_block_as_exact
from fastbound.truth.operands import LayerOperands, block_operands, layer_operands, run

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def operands(*arguments, **settings) -> LayerOperands:
    return layer_operands(*arguments, **{"form": "product", "scaling": 0.1, **settings})


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of more than 128 rows is taken in parts."""
    monkeypatch.setattr(product, "WORKSPACE", 1)


@pytest.mark.parametrize("rank", [1, 3, 16, 64, 100, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_at_every_rank(rank: int, dtype: torch.dtype) -> None:
    o = operands((5, 13, 67), 129, rank, dtype)
    assert_as_exact_as_the_formula(o, bounded_linear, backend="torch")


@pytest.mark.parametrize("argument", [1e-3, 1.0, 100.0, 1e5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_for_any_argument_of_the_sine(argument: float, dtype: torch.dtype) -> None:
    o = operands((40, 33), 65, 4, dtype)
    o = o.changed(lambda name, t: t, omega=argument / (o.B @ o.A).abs().max().item())
    assert_as_exact_as_the_formula(o, bounded_linear, backend="torch")


@pytest.mark.usefixtures("small_workspace")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_some_rows_at_a_time(dtype: torch.dtype, bias: bool) -> None:
    o = operands((3, 50, 261), 389, 5, dtype, bias=bias)
    assert_as_exact_as_the_formula(o, bounded_linear, backend="torch")


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_matches_fp64_on_any_shape(data: st.DataObject) -> None:
    size = st.integers(1, 200)
    o = operands(
        (*data.draw(st.lists(st.integers(1, 7), max_size=2), "leading"), data.draw(size, "K")),
        data.draw(size, "N"),
        data.draw(st.integers(1, 70), "rank"),
        data.draw(st.sampled_from(DTYPES), "dtype"),
        bias=data.draw(st.booleans(), "bias"),
        magnitude=data.draw(st.sampled_from([0.02, 1.0, 10.0]), "magnitude"),
        omega=data.draw(st.sampled_from([0.5, 3.0, 100.0]), "omega"),
        seed=data.draw(st.integers(0, 2**31), "seed"),
    )
    assert_as_exact_as_the_formula(o, bounded_linear, backend="torch")


@pytest.mark.parametrize("operand", ["x", "weight", "A", "B", "dy"])
def test_strided_operands_are_read_as_they_lie(operand: str) -> None:
    o = operands((3, 11, 40), 56, 8, torch.float32)
    strided = o.changed(lambda name, t: t.mT.contiguous().mT if name == operand else t)
    assert not getattr(strided, operand).is_contiguous()
    assert_as_exact_as_the_formula(strided, bounded_linear, backend="torch")


@pytest.mark.usefixtures("small_workspace")
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "over a base"])
def test_gradcheck_in_fp64(weight: bool) -> None:
    o = operands((4, 7), 131, 3, torch.float64, adapter_dtype=torch.float64)
    o = o.to(torch.float64)
    base = o.x @ o.weight.T

    def function(x, A, B, bias):
        term = {"scaling": 0.3, "omega": 2.0, "form": "product"}
        if weight:
            return bounded_linear(x, o.weight, A, B, bias, **term)
        return bounded_addition(base + bias, x, A, B, **term)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (o.x, o.A, o.B, o.bias)])


@pytest.mark.parametrize("give_up", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_term_over_a_base_matches_fp64(dtype: torch.dtype, give_up: bool) -> None:
    o = operands((3, 9, 33), 65, 4, dtype)

    def over(make):
        def call(x, weight, A, B, bias, **settings):
            return make(torch.nn.functional.linear(x, weight, bias), x, A, B, **settings)

        return call

    ours = partial(bounded_addition, give_up=give_up)
    assert_as_exact_as_the_formula(o, over(ours), over(formula.bounded_addition))


def test_a_base_result_that_is_not_given_up_stays() -> None:
    o = operands((9, 33), 65, 4, torch.float32)
    result = o.x @ o.weight.T
    before = result.clone()
    y = bounded_addition(result, o.x, o.A, o.B, scaling=0.1, form="product")
    assert torch.equal(result, before) and not torch.equal(y, before)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("ranks", [(3, 4, 5), (3, 0, 0), (0, 4, 0), (0, 0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_matches_fp64(ranks: tuple[int, int, int], dtype: torch.dtype, gated: bool) -> None:
    if not gated and not any(ranks[1:]):
        ranks = (0, 3, 3)
    block = block_operands((2, 9, 24), 40, ranks, dtype, form="product", gated=gated)
    assert_block_as_exact(block, bounded_mlp, backend="torch")


@pytest.mark.usefixtures("small_workspace")
def test_a_block_that_saves_x_alone_gives_the_same_bits() -> None:
    block = block_operands((2, 9, 24), 200, (3, 4, 5), torch.float32, form="product")
    kept, made_again = run(block, bounded_mlp), run(block, bounded_mlp, recompute="gate_up")
    assert all(torch.equal(kept[name], made_again[name]) for name in kept)


def test_two_runs_give_the_same_bits() -> None:
    o = operands((64, 96), 160, 8, torch.bfloat16)
    first, second = (run(o, bounded_linear) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_layer_saves_x_alone_and_a_block_x_and_two_preactivations() -> None:
    M, K, N = 64, 96, 256
    o = operands((M, K), N, 16, torch.bfloat16, bias=False)
    leaves = o.leaves()
    saved = saved_bytes(
        lambda: bounded_linear(leaves.x, **leaves.arguments), [leaves.weight, leaves.A, leaves.B]
    )
    assert saved == M * K * 2
    block = block_operands((M, K), N, (8, 8, 8), torch.bfloat16, form="product", bias=False)
    b = block.leaves()
    parameters = [t for p in b.projections.values() for t in p[:4] if t is not None]
    saved = saved_bytes(lambda: bounded_mlp(b.x, **b.arguments), parameters)
    assert saved == M * (K + 2 * N) * 2


@pytest.mark.parametrize("needs", ["x", "A", "B", "AB"])
def test_only_the_gradients_asked_for_are_computed(needs: str) -> None:
    o = operands((6, 10), 14, 4, torch.float64).to(torch.float64)
    asked = o.changed(lambda name, t: t.clone().requires_grad_() if name in needs else t)
    y = bounded_linear(asked.x, **asked.arguments)
    got = torch.autograd.grad(y, [getattr(asked, name) for name in needs], o.dy)
    truth = run(o, formula.bounded_linear)
    for name, gradient in zip(needs, got, strict=True):
        torch.testing.assert_close(gradient, truth[f"d{name}"])


def test_the_rows_of_the_parts_cover_the_weight_once_within_the_workspace() -> None:
    for N, row_bytes in ((14336, 8192), (4096, 28672), (1, 2), (129, 2**30), (28672, 16384)):
        parts = list(product.row_parts(N, row_bytes))
        assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, N)
        rows = max(p.stop - p.start for p in parts)
        assert rows * row_bytes <= product.WORKSPACE or rows <= 128


def test_autocast_casts_x_and_never_the_masters_or_the_weight() -> None:
    o = operands((33, 48), 40, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bounded_linear(o.x, **o.arguments)
    delta = formula.delta_weight(o.A, o.B, scaling=o.scaling, omega=o.omega, form="product")
    rounded_once = (o.weight + delta).bfloat16()
    expected = torch.nn.functional.linear(o.x.bfloat16(), rounded_once, o.bias.bfloat16())
    torch.testing.assert_close(y, expected)


def test_checkpointing_gives_the_same_bits() -> None:
    from torch.utils.checkpoint import checkpoint

    o = operands((33, 48), 40, 4, torch.float32)
    kept = run(o, bounded_linear)
    again = run(o, partial(checkpoint, bounded_linear, use_reentrant=False))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole_with_gradients_and_dynamic_rows(backend: str) -> None:
    o = operands((2, 7, 12), 10, 4, torch.float32)

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def function(x, A, B):
        return bounded_linear(x, o.weight, A, B, o.bias, omega=2.0, form="product").relu()

    for rows in (7, 11):
        r = operands((2, rows, 12), 10, 4, torch.float32)
        x, A, B = (t.requires_grad_() for t in (r.x, o.A, o.B))
        got = torch.autograd.grad(function(x, A, B), (x, A, B), r.dy)
        eager = bounded_linear(x, o.weight, A, B, o.bias, omega=2.0, form="product").relu()
        for a, b in zip(got, torch.autograd.grad(eager, (x, A, B), r.dy), strict=True):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()


def test_registered_operators_pass_opcheck() -> None:
    o = operands((2, 7, 12), 10, 4, torch.float32)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    term = (o.A, o.B, 0.1, 2.0, "torch", None, 0.0, "product")
    arguments = (o.x, o.weight, o.bias, None, *term)
    torch.library.opcheck(torch.ops.fastbound.forward.default, arguments, test_utils=utilities)
    backward = (o.dy, o.x, None, o.weight, torch.float32, True, True, True, *term)
    torch.library.opcheck(torch.ops.fastbound.backward.default, backward, test_utils=utilities)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "produkt"}, "unknown form 'produkt': choose one of factors, product"),
        ({"form": "product", "backend": "fused"}, 'use "auto"'),
        (
            {"form": "product", "dropout": 0.1},
            'not support adapter dropout, got 0.1.*form="factors"',
        ),
        ({"form": "product", "omega": float("nan")}, "must be finite"),
    ],
)
def test_settings_the_form_does_not_take_are_named(settings: dict, message: str) -> None:
    o = layer_operands((6, 10), 14, 4, torch.float32)
    with pytest.raises(ValueError, match=message):
        bounded_linear(o.x, o.weight, o.A, o.B, **settings)


def test_a_block_of_two_forms_is_refused() -> None:
    block = block_operands((6, 10), 14, (2, 2, 2), torch.float32)
    with pytest.raises(ValueError, match="must have one form"):
        bounded_mlp(block.x, block.up._replace(form="product"), block.down, block.gate)
