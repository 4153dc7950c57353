"""Tensors whose memory does not hold their values as they are: marked negative, zero, not dense."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastbound import bounded_linear
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.function import bounded_addition
from fastbound.truth.operands import Operands, block_operands, layer_operands, run

pytest.importorskip("triton", reason="the negative bit is lost in the kernels, which need Triton")


def marked(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, as memory that holds their negatives and a mark that says so."""
    view = torch._neg_view(-tensor.detach())
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def assert_same(o: Operands, other: Operands, function, **settings) -> None:
    expected, got = run(o, function, **settings), run(other, function, **settings)
    for name, value in expected.items():
        # Some units of fp32's last place: a copy may be multiplied in another order.
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["torch", "split", "fused"])
@pytest.mark.parametrize("operand", ["x", "weight", "bias", "A", "B", "dy"])
def test_a_layer_reads_the_values_of_a_negative_view(operand: str, backend: str) -> None:
    o = layer_operands((5, 24), 20, 3, torch.float32)
    other = replace(o, **{operand: marked(getattr(o, operand))})
    assert_same(o, other, bounded_linear, backend=backend)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["torch", "split"])
@pytest.mark.parametrize("give_up", [False, True])
def test_a_term_over_a_base_reads_the_values_of_negative_views(backend, give_up) -> None:
    o = layer_operands((5, 24), 20, 3, torch.float32)

    def over(make):
        def call(x, weight, A, B, bias, **settings):
            result = make(torch.nn.functional.linear(x, weight, bias))
            return bounded_addition(result, x, A, B, give_up=give_up, backend=backend, **settings)

        return call

    negative = o.changed(lambda name, t: marked(t) if name in ("x", "A", "B", "dy") else t)
    expected, got = run(o, over(lambda r: r)), run(negative, over(lambda r: torch._neg_view(-r)))
    for name, value in expected.items():
        # Some units of fp32's last place: a copy may be multiplied in another order.
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.interpreted
@pytest.mark.parametrize(("backend", "recompute"), [("torch", None), ("fused", "gate_up")])
def test_a_block_reads_the_values_of_negative_views(recompute, backend) -> None:
    o = block_operands((5, 16), 24, (2, 3, 2), torch.float32)
    for names in (("x", "A"), ("dy", "B"), ("weight", "bias")):
        other = o.changed(lambda name, t, names=names: marked(t) if name in names else t)
        assert_same(o, other, bounded_mlp, backend=backend, recompute=recompute)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["torch", "split"])
def test_zeros_that_have_no_memory_are_zeros(backend) -> None:
    o = layer_operands((5, 24), 20, 3, torch.float32, bias=False)
    zeros = torch._efficientzerotensor(5, 24)
    y = bounded_linear(zeros, o.weight, o.A, o.B, backend=backend)
    assert y.shape == (5, 20) and not y.any()


@pytest.mark.parametrize("operand", ["x", "weight", "A"])
def test_a_sparse_operand_is_named_with_the_remedy(operand) -> None:
    o = layer_operands((5, 24), 20, 3, torch.float32)
    held = {name: getattr(o, name) for name in ("x", "weight", "A", "B")}
    held[operand] = held[operand].to_sparse()
    with pytest.raises(
        TypeError, match=rf"{operand} has layout torch\.sparse_coo: call .*to_dense"
    ):
        bounded_linear(**held)
