"""The products of an MLP block in PyTorch operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbound.operator.torch_engine import TorchProducts
from fastbound.truth.formula import apply_activation

if TYPE_CHECKING:
    from fastbound.operator.block_ops import Factors


class TorchMLPProducts(TorchProducts):
    """What a block needs beyond one layer's products."""

    def activate(
        self, G: Tensor, U: Tensor | None, SA: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor | None]:
        """H = f(G) ⊙ U [M, N] and H SAᵀ [M, R]."""
        H = apply_activation(G, activation)
        if U is not None:
            H.mul_(U)
        return H, None if SA is None else self.thin(H, SA.t())

    def activate_backward(
        self,
        DH: Tensor,
        G: Tensor,
        U: Tensor | None,
        S: Tensor,
        DS_down: Tensor | None,
        gate: Factors,
        up: Factors | None,
        down: Factors,
        activation: str,
        R: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """DG, DU, [DS_G | DS_U], and the gradients of B of gate and up and of A of down.

        Writes over DH, which nothing else holds.
        """
        H = apply_activation(G, activation)
        DU = None
        if U is not None:
            DU = DH * H
            H.mul_(U)
            DH.mul_(U)
        dA_down = None
        if down.A is not None and DS_down is not None:
            dA_down = self.factor_gradient(H, DS_down, down.A.t(), down.omega, 1.0).t()
        del H
        DG = activation_backward(DH, G, activation)
        parts: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for p, D in ((gate, DG), (up, DU)):
            if p is None or D is None or p.B is None or p.SB is None:
                gradients.append(None)
                continue
            column = R * len(parts)
            part, gradient = self.thin_and_factor_gradient(
                D, p.SB, S[:, column : column + R], p.B, p.omega, p.scaling
            )
            parts.append(part)
            gradients.append(gradient)
        DS = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] if parts else None
        return DG, DU, DS, gradients[0], gradients[1], dA_down

    def stacked_factor_gradients(
        self, X: Tensor, DS: Tensor | None, gate: Factors, up: Factors | None, R: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of A of gate and up."""
        gradients: list[Tensor | None] = []
        column = 0
        for p in (gate, up):
            if p is None or p.A is None or DS is None:
                gradients.append(None)
                continue
            part = DS[:, column : column + R]
            gradients.append(self.factor_gradient(X, part, p.A.t(), p.omega, 1.0).t())
            column += R
        return gradients[0], gradients[1]


def activation_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """``dy ⊙ f'(x)``."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dy, x, approximate=approximate)
