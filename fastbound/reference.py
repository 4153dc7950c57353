"""The operator in plain PyTorch: the formula, and nothing else.

    y = x Wᵀ + b + s · (x sin(ωA)ᵀ) sin(ωB)ᵀ

Every other path is measured against this one, evaluated in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def bounded_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    omega: float = 1.0,
) -> Tensor:
    """``x Wᵀ + b + scaling · (x sin(omega·A)ᵀ) sin(omega·B)ᵀ``, one rounding per operation.

    Shapes: x [..., K], weight [N, K], A [r, K], B [N, r], bias [N]; returns [..., N] in x's dtype.
    The sine is taken in fp32 (fp64 for fp64 factors) and its result cast to x's dtype.
    """
    SA = torch.sin(omega * A.to(wide_dtype(A))).to(x.dtype)  # [r, K]
    SB = torch.sin(omega * B.to(wide_dtype(B))).to(x.dtype)  # [N, r]
    return linear(x, weight, bias) + scaling * linear(linear(x, SA), SB)


def wide_dtype(P: Tensor) -> torch.dtype:
    """The dtype in which sin and cos of P are taken: fp32, or fp64 where P is fp64."""
    return torch.promote_types(P.dtype, torch.float32)


def delta_weight(A: Tensor, B: Tensor, *, scaling: float = 1.0, omega: float = 1.0) -> Tensor:
    """``ΔW = scaling · sin(omega·B) sin(omega·A)``, [N, K]; fp32, or fp64 where A or B is fp64."""
    dtype = torch.promote_types(wide_dtype(A), wide_dtype(B))
    return scaling * torch.sin(omega * B.to(dtype)) @ torch.sin(omega * A.to(dtype))
