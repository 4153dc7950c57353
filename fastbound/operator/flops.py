"""FLOP formulas of the operators for PyTorch's counter (``torch.utils.flop_counter``).

As for aten's operators, each multiply-add of a matrix product counts as two. The formula is counted
at its own rank: padding the rank and reading dropout's mask do not count.

    forward     x Wᵀ 2MNK    S 2MKr    S SBᵀ 2MNr
    backward    dy W 2MNK    dS 2MNr    dS SA 2MKr    dA 2MKr    dB 2MNr

In the product form:

    forward     x (W + ΔW)ᵀ 2MNK    B A 2NKr
    backward    dy (W + ΔW) 2MNK    dyᵀ x 2MNK    dA 2NKr    dB 2NKr
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fastbound.operator.call import Term

Shape = Sequence[int]


def register() -> None:
    """Register the formulas with PyTorch's counter; importing the counter imports Triton."""
    from torch.utils.flop_counter import register_flop_formula

    operators = torch.ops.fastbound
    for formula in (forward, backward, mlp_forward, mlp_backward):
        register_flop_formula(getattr(operators, formula.__name__))(formula)


def forward(x: Shape, weight: Shape | None, bias: Any, result: Any, *adapter: Any, **_: Any) -> int:
    """FLOPs of ``fastbound::forward``; the counter passes each tensor's shape."""
    A, B, form = _read(adapter)
    return _forward(prod(x[:-1]), weight, A, B, form)


def backward(
    dy: Shape, x: Any, S: Any, weight: Shape | None, dtype: Any,
    need_dx: bool, need_dA: bool, need_dB: bool, *adapter: Any, **_: Any,
) -> int:  # fmt: skip
    """FLOPs of ``fastbound::backward``."""
    A, B, form = _read(adapter)
    return _backward(prod(dy[:-1]), weight, A, B, form, need_dx, need_dA, need_dB)


def _read(adapter: Sequence[Any]) -> tuple[Shape, Shape, str]:
    """A, B and the form of a term, whose last arguments may be omitted."""
    term = Term(*adapter)
    return term.A, term.B, term.form  # type: ignore[return-value]


def mlp_forward(x: Shape, *call: Any, **_: Any) -> int:
    """FLOPs of ``fastbound::mlp_forward``."""
    M = prod(x[:-1])
    return sum(_forward(M, weight, A, B, call[-1]) for weight, A, B in _projections(call))


def mlp_backward(
    dy: Shape, x: Any, G: Any, U: Any, S: Any, S_down: Any, need_dx: bool, *call: Any, **_: Any
) -> int:
    """FLOPs of ``fastbound::mlp_backward``; without g, g and u are recomputed from x and S."""
    M = prod(dy[:-1])
    *first, down = _projections(call)
    form = call[-1]
    flops = _backward(M, *down, form, True, True, True)
    for weight, A, B in first:
        flops += _backward(M, weight, A, B, form, need_dx, True, True)
        if G is None:
            flops += _product(M, weight)
            flops += _angle(A, B) if form == "product" else _product(M, B)
    return flops


def _projections(call: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """weight, A and B of the projections that exist; down's come last."""
    three = (call[4 * i : 4 * i + 4] for i in range(3))
    return [(weight, A, B) for weight, _, A, B in three if weight is not None]


def _forward(M: int, weight: Shape | None, A: Shape | None, B: Shape | None, form: str) -> int:
    if form == "product" and A is not None and B is not None:
        return 2 * M * B[0] * A[1] + _angle(A, B)
    return _product(M, weight) + _product(M, A) + _product(M, B)


def _backward(
    M: int, weight: Shape | None, A: Shape | None, B: Shape | None, form: str,
    need_dx: bool, need_dA: bool, need_dB: bool,
) -> int:  # fmt: skip
    if form == "product" and A is not None and B is not None:
        gemm, angle = 2 * M * B[0] * A[1], _angle(A, B)
        return (need_dx + (need_dA or need_dB)) * gemm + (need_dA + need_dB) * angle
    need_dS = need_dx or need_dA
    return (
        need_dx * (_product(M, weight) + _product(M, A))
        + need_dS * _product(M, B)
        + need_dA * _product(M, A)
        + need_dB * _product(M, B)
    )


def _angle(A: Shape | None, B: Shape | None) -> int:
    """FLOPs of B A, or of dZ with A or B."""
    return 0 if A is None or B is None else 2 * B[0] * prod(A)


def _product(M: int, matrix: Shape | None) -> int:
    """FLOPs of M rows times a matrix or its transpose."""
    return 0 if matrix is None else 2 * M * prod(matrix)
