"""fp16 at both ends of its range: as exact as the formula whose low-rank term stays in fp32.

A sum over K or N passes 65504 where y does not, and the first steps of a training leave sin(ωB)
near 1e-6.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from fastbound import bounded_linear
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.function import bounded_addition
from fastbound.truth.exactness import assert_as_exact_as_the_formula, assert_block_as_exact
from fastbound.truth.operands import BlockOperands, LayerOperands, block_operands, layer_operands

pytest.importorskip("triton", reason="half of the engines are Triton's")

M, N, K, RANK = 6, 24, 256, 3
LARGE = 300.0  # K times this is beyond 65504
HALF = torch.float16


def extreme(case: str) -> LayerOperands:
    """Operands of which a part, named by the case, leaves fp16's range in the formula's letters."""
    o = layer_operands((M, K), N, RANK, HALF, scaling=1.0, omega=1.0)
    o = replace(o, weight=o.weight * 0, bias=None)
    ones = torch.full_like(o.A, math.pi / 2), torch.full_like(o.B, math.pi / 2)
    large = torch.full_like(o.x, LARGE)
    changes = {
        "S too large": {"x": large, "A": ones[0], "scaling": 1e-3},
        "dS too large": {
            "x": o.x[:, :N] / 64,
            "weight": o.weight.t(),
            "A": o.A[:, :N] * 1e-3,
            "B": ones[1][:1].expand(K, -1),
            "dy": large,
        },
        "SB too small": {"x": o.x * 8, "B": o.B * 1e-6},
        "SB too small, S too large": {"x": large, "A": ones[0], "B": o.B * 1e-7},
        "SA too small": {"A": o.A * 1e-7, "scaling": 100.0},
        "S too small": {"x": o.x * 1e-4, "A": o.A * 1e-4, "scaling": 3000.0},
        "s too large": {"x": o.x / 64, "A": o.A * 1e-3, "B": o.B * 1e-6, "scaling": 1e5},
        "one row too large": {"x": torch.cat([o.x[:1] * 800, o.x[1:]]), "scaling": 1e-3},
    }
    return replace(o, **changes[case])


CASES = [
    "S too large",
    "dS too large",
    "SB too small",
    "SB too small, S too large",
    "SA too small",
    "S too small",
    "s too large",
    "one row too large",
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("split", marks=pytest.mark.slow), "reference"]
)
def test_a_layer_is_exact(case: str, backend: str) -> None:
    assert_as_exact_as_the_formula(extreme(case), bounded_linear, backend=backend)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", ["S too large", "dS too large", "SB too small, S too large"])
def test_a_layer_is_exact_in_one_kernel(case: str) -> None:
    assert_as_exact_as_the_formula(extreme(case), bounded_linear, backend="fused")


@pytest.mark.interpreted
@pytest.mark.parametrize("case", ["S too large", "dS too large", "SB too small"])
@pytest.mark.parametrize(("backend", "give_up"), [("torch", False), ("split", True)])
def test_a_term_over_a_base_is_exact(case: str, backend: str, give_up: bool) -> None:
    def over_base(x, weight, A, B, bias=None, **settings):
        return bounded_addition(linear(x, weight, bias), x, A, B, give_up=give_up, **settings)

    assert_as_exact_as_the_formula(extreme(case), over_base, backend=backend)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("x_dtype", "result_dtype"), [(HALF, torch.float32), (torch.float32, HALF)]
)
@pytest.mark.parametrize("backend", ["torch", "split"])
def test_beside_another_dtype_nothing_leaves_the_range(x_dtype, result_dtype, backend) -> None:
    o = extreme("S too large")
    x = o.x.to(x_dtype).requires_grad_()
    A, B = (t.clone().requires_grad_() for t in (o.A, o.B))
    result = torch.zeros(M, N, dtype=result_dtype)
    y = bounded_addition(result, x, A, B, scaling=1e-3, backend=backend)
    found = (y, *torch.autograd.grad(y, (x, A, B), o.dy.to(result_dtype)))
    S = x.double() @ torch.sin(A.double()).T
    expected = 1e-3 * S @ torch.sin(B.double()).T
    exact = (expected, *torch.autograd.grad(expected, (x, A, B), o.dy.double()))
    for got, truth in zip(found, exact, strict=True):
        assert (got.double() - truth).norm() <= 1e-3 * truth.norm()


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["torch", "split"])
def test_dropouts_mask_changes_nothing_of_it(backend: str) -> None:
    o = extreme("S too large")
    leaves = [t.clone().requires_grad_() for t in (o.x, o.A, o.B)]

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        x, A, B = leaves
        y = bounded_linear(x, o.weight, A, B, scaling=1e-3, dropout=0.4, backend=backend)
        return (y, *torch.autograd.grad(y, leaves, o.dy))

    for got, expected in zip(gradients(backend), gradients("reference"), strict=True):
        error = got.double() - expected.double()
        assert error.norm() <= 1e-3 * expected.double().norm() < math.inf


def extreme_block(case: str) -> BlockOperands:
    o = block_operands((5, 192), 24, (2, 3, 2), HALF, scaling=(1.0, 1.0, 1.0), bias=False)
    if case == "small":
        return o.changed(lambda name, t: t * 1e-6 if name == "B" else t)
    wide = o.changed(
        lambda name, t: {"x": t.abs() * 600, "weight": t / 64, "A": t * 0 + math.pi / 2}.get(
            name, t
        )
    )
    down = wide.down._replace(scaling=1e-4)
    up, gate = (p._replace(scaling=2e-4) for p in (wide.up, wide.gate))
    return replace(wide, up=up, gate=gate, down=down)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", ["large", "small"])
@pytest.mark.parametrize(("backend", "recompute"), [("torch", "gate_up"), ("split", None)])
def test_a_block_is_exact(case: str, backend: str, recompute: str | None) -> None:
    block = extreme_block(case)
    if case == "large":
        assert block.x.float().sum(-1).max() > 65504
    assert_block_as_exact(block, bounded_mlp, backend=backend, recompute=recompute)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["torch", "split"])
def test_a_row_that_is_not_finite_leaves_the_others_as_they_are(backend: str) -> None:
    o = layer_operands((M, 64), N, RANK, HALF)
    broken = o.x.clone()
    broken[2, 5] = math.inf
    settings = {"scaling": o.scaling, "omega": o.omega, "backend": backend}
    expected = bounded_linear(o.x, o.weight, o.A, o.B, **settings)
    got = bounded_linear(broken, o.weight, o.A, o.B, **settings)
    others = torch.arange(M) != 2
    assert not got[2].isfinite().any()
    # Two units of fp16's last place: the inf may give its column another power of two.
    torch.testing.assert_close(got[others], expected[others], rtol=2e-3, atol=2e-3)
