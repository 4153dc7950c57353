"""A whole MLP block's operands and its measure of error, for the tests and the check on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from fastbound.operator.block_function import bounded_mlp
from fastbound.truth import formula as reference
from fastbound.truth.formula import Projection


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

    def run(
        self, function: Callable[..., Tensor] = bounded_mlp, **kwargs: Any
    ) -> dict[str, Tensor]:
        """y and every gradient."""
        y = function(self.x, self.up, self.down, self.gate, **kwargs)
        leaves = {"dx": self.x}
        for name in ("gate", "up", "down"):
            p = getattr(self, name)
            if p is not None and p.A is not None:
                leaves |= {f"dA {name}": p.A, f"dB {name}": p.B}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_block_as_exact(block: BlockOperands, activation: str, **kwargs: Any) -> None:
    """The error's norm is at most the plain formula's in the same dtype, plus six roundings.

    A norm and not a maximum: h, dg and du are rounded in another place than autograd does it, so
    the two errors are equal in distribution and not entry by entry. Six, because rank one leaves
    few numbers, behind each of which stand six roundings (S, y's, dh, dg, dS and dA).
    """
    ours = block.run(activation=activation, **kwargs)
    plain = block.run(reference.bounded_mlp, activation=activation)
    expected = block.double().run(reference.bounded_mlp, activation=activation)
    rounding = torch.finfo(block.x.dtype).eps / 2
    for name, exact in expected.items():
        if ours[name].shape != exact.shape:
            raise AssertionError(f"{name}: {ours[name].shape} for {exact.shape}")
        if ours[name].dtype != plain[name].dtype:
            raise AssertionError(f"{name}: {ours[name].dtype} for {plain[name].dtype}")
        error = (ours[name].double() - exact).norm()
        allowed = (plain[name].double() - exact).norm() + 6 * rounding * exact.norm()
        if not error <= allowed:  # a NaN fails too
            raise AssertionError(f"{name}: error {error:.3e}, allowed {allowed:.3e}")
