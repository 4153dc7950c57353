"""The operator in plain PyTorch: the formula, and nothing else.

    factors     y = x Wᵀ + b + s · (x sin(ωA)ᵀ) sin(ωB)ᵀ
    product     y = x (W + s · sin(ω·B A))ᵀ + b

Every other path is checked against this one, evaluated in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from fastbound.truth.linear_algebra import without_autocast

ADAPTER_FORMS = ("factors", "product")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class Projection(NamedTuple):
    """One projection of an MLP block: weight [N, K], bias [N], A [r, K], B [N, r].

    A and B are None if the projection is not adapted.
    """

    weight: Tensor
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0
    omega: float = 1.0
    form: str = "factors"


def bounded_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    omega: float = 1.0,
    form: str = "factors",
    keep: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + b + scaling · (x sin(omega·A)ᵀ) sin(omega·B)ᵀ``, with one rounding per operation.

    In the form "product" it is ``x (W + scaling · sin(omega·B A))ᵀ + b``, with W + ΔW rounded once.

    Shapes: x [..., K], weight [N, K], A [r, K], B [N, r], bias [N]; returns [..., N] in x's dtype.
    The sine is computed in fp32 (fp64 for fp64 factors) and cast to x's dtype. If that is fp16,
    whose range parts of the term may exceed, the term stays in fp32 up to the sum. ``keep`` is
    dropout's mask, bool with x's shape: in the low-rank term, x is zero where it is False.
    """
    if form == "product":
        delta = delta_weight(A, B, scaling=scaling, omega=omega, form=form)
        return linear(x, (weight + delta).to(x.dtype), bias)
    term = _lowrank_term(x, A, B, omega, keep, x.dtype)
    return (linear(x, weight, bias) + scaling * term).to(x.dtype)


def bounded_addition(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float = 1.0,
    omega: float = 1.0,
    form: str = "factors",
    keep: Tensor | None = None,
) -> Tensor:
    """``result + scaling · (x sin(omega·A)ᵀ) sin(omega·B)ᵀ`` in result's dtype.

    As :func:`bounded_linear`, with ``result`` [..., N] in place of x Wᵀ + b.
    """
    if form == "product":
        delta = delta_weight(A, B, scaling=scaling, omega=omega, form=form)
        return (result + linear(x, delta.to(x.dtype))).to(result.dtype)
    return (result + scaling * _lowrank_term(x, A, B, omega, keep, result.dtype)).to(result.dtype)


def _lowrank_term(
    x: Tensor, A: Tensor, B: Tensor, omega: float, keep: Tensor | None, dtype: torch.dtype
) -> Tensor:
    x, dtype = x.to(thin_dtype(x.dtype)), thin_dtype(dtype)
    SA = torch.sin(omega * A.to(wide_dtype(A))).to(x.dtype)  # [r, K]
    SB = torch.sin(omega * B.to(wide_dtype(B))).to(dtype)  # [N, r]
    return linear(linear(x if keep is None else x * keep, SA).to(dtype), SB)


def thin_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of SA, SB, S and dS for a compute dtype: the same, but fp32 for fp16.

    A sum over K or N can exceed fp16's 65504 although the result does not, and s·sin(omega·B) is
    below fp16's smallest number, 6e-8, in the first training steps.
    """
    return torch.float32 if dtype is torch.float16 else dtype


def wide_dtype(P: Tensor) -> torch.dtype:
    """The dtype in which sin and cos of P are computed: fp32, or fp64 if P is fp64."""
    return torch.promote_types(P.dtype, torch.float32)


def delta_weight(
    A: Tensor, B: Tensor, *, scaling: float = 1.0, omega: float = 1.0, form: str = "factors"
) -> Tensor:
    """ΔW [N, K] in fp32, or in fp64 if A or B is fp64, also under autocast.

    factors: ``scaling · sin(omega·B) sin(omega·A)``; product: ``scaling · sin(omega·B A)``.
    """
    dtype = torch.promote_types(wide_dtype(A), wide_dtype(B))
    A, B = A.to(dtype), B.to(dtype)
    with without_autocast(A.device):
        if form == "product":
            return scaling * torch.sin(omega * (B @ A))
        return scaling * torch.sin(omega * B) @ torch.sin(omega * A)


def apply_activation(x: Tensor, activation: str) -> Tensor:
    """f(x) for one of ``silu``, ``gelu``, ``gelu_tanh`` (GPT-2's gelu_new) and ``relu``."""
    if activation == "silu":
        return silu(x)
    if activation == "relu":
        return relu(x)
    return gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def mlp(
    x: Tensor,
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
    gate: Callable[[Tensor], Tensor] | None = None,
    *,
    activation: str,
) -> Tensor:
    """``down(f(gate(x)) ⊙ up(x))``, or ``down(f(up(x)))`` without a gate, for any projections."""
    if gate is None:
        return down(apply_activation(up(x), activation))
    return down(apply_activation(gate(x), activation) * up(x))


def bounded_mlp(
    x: Tensor,
    up: Projection,
    down: Projection,
    gate: Projection | None = None,
    *,
    activation: str = "silu",
) -> Tensor:
    """:func:`mlp` of adapted projections, differentiated by autograd."""
    first = None if gate is None else partial(_project, p=gate)
    return mlp(x, partial(_project, p=up), partial(_project, p=down), first, activation=activation)


def _project(x: Tensor, p: Projection) -> Tensor:
    if p.A is None or p.B is None:
        return linear(x, p.weight, p.bias)
    settings: dict[str, Any] = {"scaling": p.scaling, "omega": p.omega, "form": p.form}
    return bounded_linear(x, p.weight, p.A, p.B, p.bias, **settings)
