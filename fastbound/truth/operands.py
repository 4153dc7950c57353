"""What one call of a layer and one of an MLP block take, made from a seed, and the run over them.

`tests/`, `benchmarks/` and the tuner share them: a layer's and a block's, and no third.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastbound.truth.formula import Projection

GRADIENTS = ("dx", "dA", "dB", "db")


@dataclass(frozen=True)
class LayerOperands:
    """What one call takes, and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float
    omega: float

    def to(self, dtype: torch.dtype) -> LayerOperands:
        moved = {
            name: getattr(self, name).detach().to(dtype) for name in ("x", "weight", "A", "B", "dy")
        }
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return replace(self, **moved, bias=bias)


def layer_operands(
    shape: tuple[int, ...],
    N: int,
    rank: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    adapter_dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
    scaling: float = 0.7,
    omega: float = 1.3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> LayerOperands:
    """x of ``shape`` [..., K]; near magnitude 0 a kernel that forgot the sine would pass."""
    generator = torch.Generator().manual_seed(seed)
    K = shape[-1]

    def normal(*size: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    return LayerOperands(
        normal(*shape),
        normal(N, K, scale=K**-0.5),
        normal(rank, K, dtype=adapter_dtype, scale=magnitude),
        normal(N, rank, dtype=adapter_dtype, scale=magnitude),
        normal(N) if bias else None,
        normal(*shape[:-1], N),
        scaling,
        omega,
    )


def run(o: LayerOperands, function: Callable[..., Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """y and every gradient of ``function`` at the operands."""
    leaves = [t.detach().requires_grad_() for t in (o.x, o.A, o.B)]
    bias = None if o.bias is None else o.bias.detach().requires_grad_()
    x, A, B = leaves
    y = function(x, o.weight, A, B, bias, scaling=o.scaling, omega=o.omega, **kwargs)
    wanted = leaves if bias is None else [*leaves, bias]
    return {
        "y": y.detach(),
        **dict(zip(GRADIENTS, torch.autograd.grad(y, wanted, o.dy), strict=False)),
    }


class BlockOperands:
    """Made from a seed; rank 0 in `ranks` (gate, up, down) leaves a projection unadapted."""

    def __init__(
        self,
        shape: tuple[int, ...],
        N: int,
        ranks: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        gated: bool = True,
        bias: bool = True,
        magnitude: float = 1.0,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

        def projection(N: int, K: int, rank: int, scaling: float) -> Projection:
            A: Tensor | None = None
            B: Tensor | None = None
            if rank:
                A, B = (
                    normal(*size, dtype=torch.float32, scale=magnitude).requires_grad_()
                    for size in ((rank, K), (N, rank))
                )
            b = normal(N) if bias else None
            return Projection(normal(N, K, scale=K**-0.5), b, A, B, scaling, 1.3)

        K = shape[-1]
        self.x = normal(*shape).requires_grad_()
        self.gate = projection(N, K, ranks[0], 0.1) if gated else None
        self.up = projection(N, K, ranks[1], 0.2)
        self.down = projection(K, N, ranks[2], 0.05)
        self.dy = normal(*shape)

    def double(self) -> BlockOperands:
        def wide(t: Tensor) -> Tensor:
            return t.detach().double().requires_grad_(t.requires_grad)

        def widened(p: Projection) -> Projection:
            bias, A, B = (None if t is None else wide(t) for t in (p.bias, p.A, p.B))
            return p._replace(weight=wide(p.weight), bias=bias, A=A, B=B)

        twin = copy(self)
        twin.x, twin.dy = wide(self.x), wide(self.dy)
        twin.gate = None if self.gate is None else widened(self.gate)
        twin.up, twin.down = widened(self.up), widened(self.down)
        return twin

    def run(self, function: Callable[..., Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """y and every gradient."""
        y = function(self.x, self.up, self.down, self.gate, **kwargs)
        leaves = {"dx": self.x}
        for name in ("gate", "up", "down"):
            p = getattr(self, name)
            if p is not None and p.A is not None:
                leaves |= {f"dA {name}": p.A, f"dB {name}": p.B}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
