"""The operator's products on a CPU, each in the forms PyTorch offers for it.

The same product differs several-fold between forms on skinny operands, and differently in bf16 and
fp32; `fastbound.operator.torch_engine` takes what this comparison favours.

    S  = x SAᵀ        y  = x Wᵀ + S SBᵀ
    dS = dy SB        dx = dy W + dS SA        dA = dSᵀ x        dB = dyᵀ S
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Operands:
    """x [M, K], W [N, K], SA [R, K], SB [N, R], S and dS [M, R], dy [M, N], in one dtype."""

    x: Tensor
    W: Tensor
    SA: Tensor
    SB: Tensor
    S: Tensor
    dS: Tensor
    dy: Tensor


Form = Callable[[Operands], Tensor]

PRODUCTS: dict[str, dict[str, Form]] = {
    "S": {
        "mm(x, SA.t())": lambda o: torch.mm(o.x, o.SA.t()),
        "mm(SA, x.t()).t()": lambda o: torch.mm(o.SA, o.x.t()).t(),
    },
    "y": {
        "linear(x, W).addmm_(S, SB.t())": lambda o: linear(o.x, o.W).addmm_(o.S, o.SB.t()),
        "mm(S, SB.t()).addmm_(x, W.t())": lambda o: torch.mm(o.S, o.SB.t()).addmm_(o.x, o.W.t()),
        "linear(x, W) + linear(S, SB)": lambda o: linear(o.x, o.W) + linear(o.S, o.SB),
        "linear(x, W), the floor": lambda o: linear(o.x, o.W),
    },
    "dS": {
        "mm(dy, SB)": lambda o: torch.mm(o.dy, o.SB),
        "mm(SB.t(), dy.t()).t()": lambda o: torch.mm(o.SB.t(), o.dy.t()).t(),
    },
    "dB": {
        "mm(dy.t(), S)": lambda o: torch.mm(o.dy.t(), o.S),
        "mm(S.t(), dy).t()": lambda o: torch.mm(o.S.t(), o.dy).t(),
        "linear(S.t(), dy.t()).t()": lambda o: linear(o.S.t(), o.dy.t()).t(),
    },
    "dx": {
        "mm(dy, W).addmm_(dS, SA)": lambda o: torch.mm(o.dy, o.W).addmm_(o.dS, o.SA),
        "mm(dS, SA).addmm_(dy, W)": lambda o: torch.mm(o.dS, o.SA).addmm_(o.dy, o.W),
        "mm(dy, W), the floor": lambda o: torch.mm(o.dy, o.W),
    },
    "dA": {
        "mm(dS.t(), x)": lambda o: torch.mm(o.dS.t(), o.x),
        "mm(x.t(), dS).t()": lambda o: torch.mm(o.x.t(), o.dS).t(),
    },
}


def make_operands(M: int, K: int, N: int, R: int, dtype: torch.dtype) -> Operands:
    """Random operands of unit scale on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(dtype)

    return Operands(
        x=normal(M, K),
        W=normal(N, K),
        SA=normal(R, K),
        SB=normal(N, R),
        S=normal(M, R),
        dS=normal(M, R),
        dy=normal(M, N),
    )
