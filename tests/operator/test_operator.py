"""bounded_linear against the formula in fp64: every dtype, shape, stride and rank, by PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from fastbound import FusedBoundedLinear, bounded_linear
from fastbound.performance.memory import saved_bytes
from fastbound.truth import formula
from fastbound.truth.exactness import assert_as_exact_as_the_formula
from fastbound.truth.operands import layer_operands, run

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANKS = [1, 3, 4, 8, 16, 24, 64]


@pytest.mark.parametrize("rank", [*RANKS, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_at_every_rank(rank: int, dtype: torch.dtype) -> None:
    o = layer_operands((5, 13, 67), 129, rank, dtype)
    assert_as_exact_as_the_formula(o, bounded_linear, backend="torch")


def test_fp64_agrees_with_the_formula_in_fp64() -> None:
    o = layer_operands((5, 13, 67), 129, 8, torch.float64).to(torch.float64)
    ours, truth = run(o, bounded_linear), run(o, formula.bounded_linear)
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_matches_fp64_on_any_shape(data: st.DataObject) -> None:
    size = st.integers(1, 300)
    leading = data.draw(st.lists(st.integers(1, 7), min_size=0, max_size=2), "leading")
    rows = data.draw(st.lists(size, max_size=1), "rows")
    K, N = data.draw(size, "K"), data.draw(size, "N")
    o = layer_operands(
        (*leading, *rows, K),
        N,
        data.draw(st.sampled_from(RANKS), "rank"),
        data.draw(st.sampled_from(DTYPES), "dtype"),
        bias=data.draw(st.booleans(), "bias"),
        magnitude=data.draw(st.sampled_from([0.02, 1.0, 10.0]), "magnitude"),
        scaling=data.draw(st.sampled_from([0.05, 1.0, 2.0]), "scaling"),
        omega=data.draw(st.sampled_from([0.5, 1.0, 3.0]), "omega"),
        seed=data.draw(st.integers(0, 2**31), "seed"),
    )
    assert_as_exact_as_the_formula(o, bounded_linear, backend="torch")


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT


def _every_other(t: torch.Tensor) -> torch.Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    wide[..., ::2] = t
    return wide[..., ::2]


STRIDES = {"transposed": _transposed, "every other column": _every_other}


@pytest.mark.parametrize("operand", ["x", "weight", "A", "B", "dy"])
@pytest.mark.parametrize("layout", STRIDES)
def test_strided_operands_give_the_same_bits_as_contiguous_ones(operand: str, layout: str) -> None:
    from dataclasses import replace

    o = layer_operands((3, 11, 40), 56, 8, torch.float32)
    strided = replace(o, **{operand: STRIDES[layout](getattr(o, operand))})
    assert not getattr(strided, operand).is_contiguous()
    assert_as_exact_as_the_formula(strided, bounded_linear, backend="torch")


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_factors_come_in_their_own_dtype(adapter_dtype: torch.dtype) -> None:
    o = layer_operands((9, 32), 24, 4, torch.bfloat16, adapter_dtype=adapter_dtype)
    results = run(o, bounded_linear, backend="torch")
    assert results["dA"].dtype == results["dB"].dtype == adapter_dtype
    assert_as_exact_as_the_formula(o, bounded_linear, backend="torch")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck_in_fp64(backend: str) -> None:
    o = layer_operands((4, 7), 5, 3, torch.float64, adapter_dtype=torch.float64)
    inputs = [t.double().requires_grad_() for t in (o.x, o.A, o.B, o.bias)]

    def function(x, A, B, bias):
        return bounded_linear(
            x, o.weight.double(), A, B, bias, scaling=0.7, omega=1.3, backend=backend
        )

    assert torch.autograd.gradcheck(function, inputs)


def test_two_runs_give_the_same_bits() -> None:
    o = layer_operands((64, 96), 160, 8, torch.bfloat16)
    first, second = (run(o, bounded_linear, backend="torch") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("shape", [(0, 12), (3, 0, 12), (12,)])
def test_empty_and_one_dimensional_x(shape: tuple[int, ...]) -> None:
    o = layer_operands(shape, 20, 4, torch.float32)
    results = run(o, bounded_linear)
    assert results["y"].shape == (*shape[:-1], 20)
    assert results["dx"].shape == shape
    if 0 in shape:
        assert not results["dA"].any() and not results["dB"].any()
    else:
        assert_as_exact_as_the_formula(o, bounded_linear)


@pytest.mark.parametrize("needs", ["x", "A", "B", "xA", "xB", "AB", "bias"])
def test_only_the_gradients_asked_for_are_computed(needs: str) -> None:
    o = layer_operands((6, 10), 14, 4, torch.float64).to(torch.float64)
    names = ["bias"] if needs == "bias" else list(needs)
    tensors = {"x": o.x, "A": o.A, "B": o.B, "bias": o.bias}
    for name in names:
        tensors[name] = tensors[name].clone().requires_grad_()
    y = bounded_linear(
        tensors["x"], o.weight, tensors["A"], tensors["B"], tensors["bias"], scaling=0.7, omega=1.3
    )
    got = torch.autograd.grad(y, [tensors[name] for name in names], o.dy)
    truth = run(o, formula.bounded_linear)
    for name, gradient in zip(names, got, strict=True):
        torch.testing.assert_close(gradient, truth["db" if name == "bias" else f"d{name}"])


def test_saved_bytes_are_x_and_the_thin_product_and_peft_keeps_more() -> None:
    """bf16 x and fp32 factors of rank 16, beside the same layer under PEFT's default."""
    from fastbound.performance.profiling.baselines import peft_linear

    M, K, N, rank = 128, 96, 256, 16
    o = layer_operands((M, K), N, rank, torch.bfloat16, bias=False)
    x, A, B = (t.requires_grad_() for t in (o.x, o.A, o.B))

    fused = saved_bytes(lambda: bounded_linear(x, o.weight, A, B), [o.weight, A, B])
    assert fused == M * K * 2 + M * 16 * 2
    thin = saved_bytes(lambda: bounded_linear(x, o.weight, A, B), [o.weight, A, B, x])
    assert thin == M * 16 * 2, "x was copied: another layer's saved x could not be shared"

    base = torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    layer = peft_linear(base, o.A.detach(), o.B.detach(), scaling=0.7, omega=1.3)
    peft = saved_bytes(lambda: layer(x), layer.parameters())
    sines = 2 * 4 * rank * (K + N)  # ωA, ωB and their sines, in fp32
    assert peft == M * K * 4 + M * rank * 4 + sines
    assert fused < peft / 2


def test_backward_twice_over_a_retained_graph() -> None:
    o = layer_operands((8, 12), 10, 4, torch.float32)
    x, A, B = (t.requires_grad_() for t in (o.x, o.A, o.B))
    y = bounded_linear(x, o.weight, A, B)
    first = torch.autograd.grad(y, (x, A, B), o.dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, A, B), o.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivative_is_refused_not_wrong() -> None:
    o = layer_operands((8, 12), 10, 4, torch.float32)
    x, dy = o.x.requires_grad_(), o.dy.requires_grad_()
    y = bounded_linear(x, o.weight, o.A, o.B)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable only once"):
        dx.sum().backward()


class TestAutocast:
    def test_casts_x_and_never_the_masters(self) -> None:
        """Masters that bf16 would round to one value must still differ."""
        o = layer_operands((33, 48), 40, 4, torch.float32, magnitude=8.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = bounded_linear(o.x, o.weight, o.A, o.B, o.bias, scaling=0.7, omega=1.3)
        half = layer_operands((33, 48), 40, 4, torch.bfloat16, magnitude=8.0)
        expected = bounded_linear(half.x, half.weight, o.A, o.B, half.bias, scaling=0.7, omega=1.3)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y, expected)

    def test_gradients_reach_fp32_leaves(self) -> None:
        o = layer_operands((33, 48), 40, 4, torch.float32)
        x, A, B = (t.requires_grad_() for t in (o.x, o.A, o.B))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = bounded_linear(x, o.weight, A, B)
        gradients = torch.autograd.grad(y, (x, A, B), o.dy.bfloat16())
        assert [g.dtype for g in gradients] == [torch.float32] * 3

    def test_fp64_is_left_alone(self) -> None:
        o = layer_operands((4, 6), 5, 2, torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert bounded_linear(o.x, o.weight, o.A, o.B).dtype is torch.float64


class TestCompile:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_fullgraph_with_gradients_and_dynamic_rows(self, backend: str) -> None:
        o = layer_operands((2, 7, 12), 10, 4, torch.float32)

        @torch.compile(fullgraph=True, dynamic=True, backend=backend)
        def function(x, A, B):
            return bounded_linear(x, o.weight, A, B, o.bias, scaling=0.7, omega=1.3).relu()

        for rows in (7, 11):
            r = layer_operands((2, rows, 12), 10, 4, torch.float32)
            x, A, B = (t.requires_grad_() for t in (r.x, o.A, o.B))
            got = torch.autograd.grad(function(x, A, B), (x, A, B), r.dy)
            eager = bounded_linear(x, o.weight, A, B, o.bias, scaling=0.7, omega=1.3).relu()
            for a, b in zip(got, torch.autograd.grad(eager, (x, A, B), r.dy), strict=True):
                torch.testing.assert_close(a, b)

    def test_a_whole_injected_model_is_one_graph(self, tiny_model) -> None:
        import fastbound

        model = tiny_model("llama")
        fastbound.inject(model, rank=4, bound="auto")
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.B"):
                torch.nn.init.normal_(parameter)
        tokens = torch.arange(24).reshape(2, 12)
        trained = [p for p in model.parameters() if p.requires_grad]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        eager = torch.autograd.grad(model(input_ids=tokens, labels=tokens).loss, trained)
        graph = torch.autograd.grad(compiled(input_ids=tokens, labels=tokens).loss, trained)
        for a, b in zip(graph, eager, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("form", ["factors", "product"])
    def test_registered_operators_pass_opcheck(self, form: str, dtype: torch.dtype) -> None:
        o = layer_operands((2, 7, 12), 10, 4, dtype)
        utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        dropout = (torch.tensor([7]), 0.25) if form == "factors" else (None, 0.0)
        A, B = (t.t().contiguous().t() for t in (o.A, o.B))  # stored column by column
        term = (A, B, 0.7, 1.3, "torch", *dropout, form)
        arguments = (o.x, o.weight, o.bias, None, *term)
        torch.library.opcheck(torch.ops.fastbound.forward.default, arguments, test_utils=utilities)
        _, S = torch.ops.fastbound.forward(*arguments)
        backward = (o.dy, o.x, S, o.weight, dtype, True, True, True, *term)
        torch.library.opcheck(torch.ops.fastbound.backward.default, backward, test_utils=utilities)

    def test_export_with_a_dynamic_dimension(self) -> None:
        layer = FusedBoundedLinear(12, 10, 4).eval()
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(layer, (torch.randn(5, 12),), dynamic_shapes={"x": {0: rows}})
        x = torch.randn(9, 12)
        torch.testing.assert_close(program.module()(x), layer(x))


class TestBadInput:
    def call(self, **changes: object) -> None:
        o = layer_operands((5, 12), 10, 4, torch.float32)
        arguments = {"x": o.x, "weight": o.weight, "A": o.A, "B": o.B, "bias": o.bias} | changes
        bounded_linear(**arguments)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": torch.randn(5, 11)}, r"x \[5, 11\] does not match weight \[10, 12\]"),
            ({"A": torch.randn(4, 11)}, r"A \[4, 11\] does not match weight \[10, 12\]"),
            ({"B": torch.randn(9, 4)}, r"B \[9, 4\] does not match weight \[10, 12\]"),
            ({"B": torch.randn(10, 3)}, r"B \[10, 3\] does not match A \[4, 12\]"),
            ({"bias": torch.randn(9)}, r"bias \[9\] does not match weight \[10, 12\]"),
            ({"A": torch.randn(0, 12), "B": torch.randn(10, 0)}, r"rank must be >= 1"),
            ({"weight": torch.randn(12)}, r"expected x \[\.\.\., K\]"),
            ({"weight": torch.randn(10, 12, requires_grad=True)}, r"weight requires grad"),
            ({"weight": torch.randn(10, 12, device="meta")}, r"weight is on meta"),
            ({"scaling": float("nan")}, r"must be finite"),
            ({"backend": "cuda"}, r"unknown backend 'cuda'.*auto, fused, split, torch, reference"),
        ],
    )
    def test_values(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.call(**changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": torch.ones(5, 12, dtype=torch.int64)}, r"x is torch.int64"),
            ({"x": torch.ones(5, 12, dtype=torch.bfloat16)}, r"x is torch.bfloat16 and weight is"),
            ({"weight": torch.ones(10, 12, dtype=torch.int8)}, r"weight is torch.int8"),
        ],
    )
    def test_dtypes(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(TypeError, match=message):
            self.call(**changes)

    def test_a_distributed_weight_is_named(self) -> None:
        import torch.distributed as dist
        from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            weight = distribute_tensor(torch.randn(10, 12), mesh, [Replicate()])
            with pytest.raises(ValueError, match="weight is a DTensor"):
                self.call(weight=weight)
        finally:
            dist.destroy_process_group()


def test_a_trained_conv1d_is_told_to_freeze_its_weight_and_nothing_of_fsdp() -> None:
    """Its weight is a transposed view of the parameter, and so no leaf."""
    conv = Conv1D(6, 4)
    layer = FusedBoundedLinear.from_linear(conv, rank=2)
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"call weight\.requires_grad_\(False\)"):
        layer(torch.randn(3, 4))
