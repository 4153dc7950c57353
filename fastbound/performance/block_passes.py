"""The activation passes of one MLP block, each alone, over real or meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbound.dispatch.defaults import padded_rank
from fastbound.kernels.gated import (
    column_blocks,
    launch_activation,
    launch_activation_backward,
    spanned_chunks,
)
from fastbound.kernels.reduce import launch_finish
from fastbound.performance.passes import (
    OMEGA,
    PASSES,
    Candidate,
    Kernel,
    Operands,
    _tile,
    make_operands,
)
from fastbound.performance.shapes import Block, Shape


@dataclass(frozen=True)
class BlockOperands:
    """One MLP block at M tokens, every projection adapted: what lies between its GEMMs.

    A gated block's S is that of gate and up side by side; a plain one has no U and no DU.
    """

    G: Tensor  # [M, N]
    U: Tensor | None  # [M, N]
    DH: Tensor  # [M, N]
    H: Tensor  # [M, N]
    DG: Tensor  # [M, N]
    DU: Tensor | None  # [M, N]
    S: Tensor  # [M, WIDTH]
    DS_down: Tensor  # [M, R]
    SA_down: Tensor  # [R, N]
    SB: Tensor  # [N, R], for gate and for up
    A_down: Tensor  # [r, N]
    B: Tensor  # [N, r], for gate and for up
    activation: str
    scaling: float
    multiprocessors: int

    @property
    def M(self) -> int:
        """Rows of x."""
        return self.G.shape[0]


def make_block_operands(
    block: Block,
    M: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    multiprocessors: int,
) -> BlockOperands:
    """Random operands of a block's sizes; on the meta device nothing is computed."""
    N, R = block.N, padded_rank(rank)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(scale)

    G = draw(M, N)
    return BlockOperands(
        G=G,
        U=draw(M, N) if block.gated else None,
        DH=draw(M, N),
        H=torch.empty_like(G),
        DG=torch.empty_like(G),
        DU=torch.empty_like(G) if block.gated else None,
        S=draw(M, R * (1 + block.gated)),
        DS_down=draw(M, R),
        SA_down=draw(R, N, scale=N**-0.5),
        SB=draw(N, R, scale=R**-0.5),
        A_down=draw(rank, N, dtype=torch.float32),
        B=draw(N, rank, dtype=torch.float32),
        activation=block.activation,
        scaling=R**-0.5,
        multiprocessors=multiprocessors,
    )


def activate(o: BlockOperands, candidate: Candidate) -> list[Kernel]:
    """H = f(G) ⊙ U and S of the down projection."""
    S_down = torch.empty_like(o.DS_down)
    R = S_down.shape[1]
    launch = launch_activation(
        o.G, o.U, o.SA_down.t(), o.H, S_down, o.activation, R, _tile(candidate)
    )
    return [Kernel("activate", launch, (o.H, S_down), 2 * o.H.numel() * R)]


def activate_backward(o: BlockOperands, candidate: Candidate) -> list[Kernel]:
    """DG, DU, DS of gate and up, dB of both and down's dA: the pass, and the sums of its parts."""
    tile, (M, N), R, width = _tile(candidate), o.G.shape, o.DS_down.shape[1], o.S.shape[1]
    chunks, chunk = spanned_chunks(M, N, tile, o.multiprocessors)

    def workspace(*size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.float32, device=o.G.device)

    gated = o.U is not None
    P = workspace(column_blocks(N, tile), M, width)
    QG, QU, QD = (workspace(chunks if there else 0, N, R) for there in (True, gated, True))
    launch = launch_activation_backward(
        o.DH, o.G, o.U, o.S, o.DS_down, o.SB, o.SB if gated else None, o.DG, o.DU, P, QG, QU, QD,
        o.activation, R, chunk, chunks, tile,
    )  # fmt: skip
    made = (o.DG,) if o.DU is None else (o.DG, o.DU)
    flops = 2 * o.DG.numel() * (2 * width + R)
    kernels = [Kernel("activate backward", launch, made, flops, (P, QG, QU, QD))]
    DS = torch.empty_like(o.S)
    projections = {"gate": QG, "up": QU} if gated else {"up": QG}
    for column, name in enumerate(projections):
        part = slice(column * R, column * R + R)
        finish = launch_finish(P[:, :, part], DS[:, part])
        kernels.append(Kernel(f"finish dS of {name}", finish, (DS[:, part],), 0))
    sums = {f"dB of {name}": (Q, o.B, o.scaling) for name, Q in projections.items()}
    for name, (Q, angle, scaling) in {**sums, "dA of down": (QD, o.A_down.t(), 1.0)}.items():
        gradient = torch.empty_like(angle)
        finish = launch_finish(Q, gradient, angle, OMEGA, scaling)
        kernels.append(Kernel(f"finish {name}", finish, (gradient,), 0))
    return kernels


BLOCK_PASSES: Mapping[str, Callable[[BlockOperands, Candidate], Sequence[Kernel]]] = {
    "activate": activate,
    "activate backward": activate_backward,
}


def operands_at(
    shape: Shape | Block,
    M: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    multiprocessors: int,
) -> Operands | BlockOperands:
    """Those of a layer or of a block."""
    if isinstance(shape, Block):
        return make_block_operands(shape, M, rank, dtype, device, multiprocessors)
    return make_operands(shape, M, rank, dtype, device, multiprocessors)


def kernels_of(name: str, o: Operands | BlockOperands, candidate: Candidate) -> Sequence[Kernel]:
    """A pass of a layer or of a block, with one tile."""
    if isinstance(o, BlockOperands):
        return BLOCK_PASSES[name](o, candidate)
    return PASSES[name](o, candidate)
