"""The operator's products on a CPU, each in the forms that PyTorch offers for it.

On skinny operands the time of the same product differs several-fold between forms, and differently
in bf16 and fp32. `fastbound.operator.torch_engine` uses the forms that this comparison favours.

    S  = x SAᵀ        y  = x Wᵀ + S SBᵀ
    dS = dy SB        dx = dy W + dS SA        dA = dSᵀ x        dB = dyᵀ S
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastbound.truth.operands import LayerOperands, drawing, layer_operands

# A function of a layer's operands, whose A and B hold SA and SB, and of S or dS.
Form = Callable[[LayerOperands, Tensor], Tensor]

PRODUCTS: dict[str, dict[str, Form]] = {
    "S": {
        "mm(x, SA.t())": lambda o, S: torch.mm(o.x, o.A.t()),
        "mm(SA, x.t()).t()": lambda o, S: torch.mm(o.A, o.x.t()).t(),
    },
    "y": {
        "linear(x, W).addmm_(S, SB.t())": lambda o, S: linear(o.x, o.weight).addmm_(S, o.B.t()),
        "mm(S, SB.t()).addmm_(x, W.t())": lambda o, S: torch.mm(S, o.B.t()).addmm_(
            o.x, o.weight.t()
        ),
        "linear(x, W) + linear(S, SB)": lambda o, S: linear(o.x, o.weight) + linear(S, o.B),
        "linear(x, W), the floor": lambda o, S: linear(o.x, o.weight),
    },
    "dS": {
        "mm(dy, SB)": lambda o, S: torch.mm(o.dy, o.B),
        "mm(SB.t(), dy.t()).t()": lambda o, S: torch.mm(o.B.t(), o.dy.t()).t(),
    },
    "dB": {
        "mm(dy.t(), S)": lambda o, S: torch.mm(o.dy.t(), S),
        "mm(S.t(), dy).t()": lambda o, S: torch.mm(S.t(), o.dy).t(),
        "linear(S.t(), dy.t()).t()": lambda o, S: linear(S.t(), o.dy.t()).t(),
    },
    "dx": {
        "mm(dy, W).addmm_(dS, SA)": lambda o, dS: torch.mm(o.dy, o.weight).addmm_(dS, o.A),
        "mm(dS, SA).addmm_(dy, W)": lambda o, dS: torch.mm(dS, o.A).addmm_(o.dy, o.weight),
        "mm(dy, W), the floor": lambda o, S: torch.mm(o.dy, o.weight),
    },
    "dA": {
        "mm(dS.t(), x)": lambda o, dS: torch.mm(dS.t(), o.x),
        "mm(x.t(), dS).t()": lambda o, dS: torch.mm(o.x.t(), dS).t(),
    },
}


def product_operands(
    M: int, K: int, N: int, R: int, dtype: torch.dtype
) -> tuple[LayerOperands, Tensor]:
    """A layer's operands on the CPU, with factors in ``dtype`` too, and S [M, R]."""
    o = layer_operands((M, K), N, R, dtype, bias=False, adapter_dtype=dtype)
    return o, drawing(dtype, seed=1)(M, R)
