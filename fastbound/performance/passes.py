"""The kernels of one layer, each alone, over real or meta tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbound.dispatch.defaults import Tiles, padded_rank
from fastbound.kernels.factors import launch_factors
from fastbound.kernels.launch import Launch, blocks
from fastbound.kernels.lowrank_gemm import launch_lowrank_gemm
from fastbound.kernels.reduce import (
    launch_finish,
    launch_finish_both,
    launch_reduce,
    row_chunks,
)
from fastbound.kernels.thin import launch_thin, step_chunks, thin_parts
from fastbound.kernels.tiles import GemmTile, Tile
from fastbound.performance.shapes import Shape

OMEGA = 1.5


@dataclass(frozen=True)
class Operands:
    """One layer at M tokens: every tensor its kernels read or write, workspaces left out."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    dy: Tensor  # [M, N]
    A: Tensor  # [r, K]
    B: Tensor  # [N, r]
    SA: Tensor  # [R, K]
    SB: Tensor  # [N, R]
    S: Tensor  # [M, R]
    dS: Tensor  # [M, R]
    y: Tensor  # [M, N]
    dx: Tensor  # [M, K]
    dA: Tensor  # [r, K]
    dB: Tensor  # [N, r]
    scaling: float
    multiprocessors: int

    @property
    def M(self) -> int:
        """Rows of x."""
        return self.x.shape[0]


@dataclass(frozen=True)
class Kernel:
    """One launch, its results and operations, and the workspaces it leaves for the next."""

    name: str
    launch: Launch
    results: tuple[Tensor, ...]
    flops: int
    parts: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of every tensor it takes, workspaces included, each moved once."""
        tensors = [getattr(value, "base", value) for value in self.launch.arguments]
        sizes = {
            tensor.data_ptr(): tensor.numel() * tensor.element_size()
            for tensor in tensors
            if isinstance(tensor, Tensor) and tensor.numel()
        }
        return sum(sizes.values())


@dataclass(frozen=True)
class Candidate:
    """A tile, and for a reduction how many times the usual number of programs it starts."""

    tile: Tile | GemmTile
    programs: float = 1.0

    def __str__(self) -> str:
        group = getattr(self.tile, "group_m", 8)
        text = str(self.tile) + ("" if group == 8 else f", groups of {group}")
        return text + ("" if self.programs == 1 else f", programs x {self.programs:g}")


def make_operands(
    shape: Shape,
    M: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    multiprocessors: int,
) -> Operands:
    """Random operands whose adapter's output is about as large as the frozen layer's.

    On the meta device nothing is computed.
    """
    N, K, R = shape.N, shape.K, padded_rank(rank)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(scale)

    def empty(*size: int) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    A, B = (draw(*s, scale=0.5, dtype=torch.float32) for s in ((rank, K), (N, rank)))
    operands = Operands(
        x=draw(M, K),
        weight=draw(N, K, scale=K**-0.5),
        dy=draw(M, N),
        A=A,
        B=B,
        SA=empty(R, K),
        SB=empty(N, R),
        S=empty(M, R),
        dS=empty(M, R),
        y=empty(M, N),
        dx=empty(M, K),
        dA=torch.empty_like(A),
        dB=torch.empty_like(B),
        scaling=1 / math.sqrt(rank * K),
        multiprocessors=multiprocessors,
    )
    if device.type != "meta":
        factors(operands)[0].launch.run()
        torch.mm(operands.x, operands.SA.t(), out=operands.S)
        torch.mm(operands.dy, operands.SB, out=operands.dS)
    return operands


def factors(o: Operands) -> list[Kernel]:
    launch = launch_factors(o.A, o.B, o.SA, o.SB, o.scaling, OMEGA)
    return [Kernel("factors", launch, (o.SA, o.SB), 0)]


def thin(o: Operands, candidate: Candidate) -> list[Kernel]:
    """S = x SAᵀ, into dS's place: S is an operand of others; and the sum of its parts, if any."""
    tile, (M, K) = _tile(candidate), o.x.shape
    S = torch.empty_like(o.S)
    chunks, chunk = step_chunks(M, K, tile, o.multiprocessors)
    parts = thin_parts(S, chunks)
    launch = launch_thin(o.x, o.SA.t(), parts, chunk, tile)
    flops = 2 * o.x.numel() * S.shape[1]
    if chunks == 1:
        return [Kernel("thin", launch, (S,), flops)]
    return [
        Kernel("thin", launch, (), flops, (parts,)),
        Kernel("finish S", launch_finish(parts, S), (S,), 0),
    ]


def gemm_forward(o: Operands, candidate: Candidate) -> list[Kernel]:
    """y = x Wᵀ + S SBᵀ."""
    launch = launch_lowrank_gemm(
        o.x, o.weight, o.S, o.SB, None, o.y, _gemm_tile(candidate), o.multiprocessors
    )
    return [Kernel("gemm forward", launch, (o.y,), _gemm_flops(o))]


def gemm_dx(o: Operands, candidate: Candidate) -> list[Kernel]:
    """dx = dy W + dS SA."""
    launch = launch_lowrank_gemm(
        o.dy, o.weight.t(), o.dS, o.SA.t(), None, o.dx, _gemm_tile(candidate), o.multiprocessors
    )
    return [Kernel("gemm dx", launch, (o.dx,), _gemm_flops(o))]


def reduce_dy(o: Operands, candidate: Candidate) -> list[Kernel]:
    """dS and dB from one read of dy, and the sums of their parts."""
    tile, (M, N), R = _tile(candidate), o.dy.shape, o.S.shape[1]
    chunks, chunk = row_chunks(M, N, tile, _programs(o, candidate))
    P = _workspace(o, blocks(N, tile.block_n), M, R)
    Q = _workspace(o, chunks, N, R)
    dS = torch.empty_like(o.dS)
    return [
        Kernel(
            "reduce dy",
            launch_reduce(o.dy, o.SB, o.S, P, Q, chunk, tile),
            (),
            4 * o.dy.numel() * R,
            (P, Q),
        ),
        Kernel(
            "finish dS, dB",
            launch_finish_both(P, dS, Q, o.dB, o.B, OMEGA, o.scaling),
            (dS, o.dB),
            0,
        ),
    ]


def reduce_x(o: Operands, candidate: Candidate) -> list[Kernel]:
    """dA from x and dS, and the sum of its parts."""
    tile, (M, K), R = _tile(candidate), o.x.shape, o.S.shape[1]
    chunks, chunk = row_chunks(M, K, tile, _programs(o, candidate))
    Q = _workspace(o, chunks, K, R)
    return [
        Kernel(
            "reduce x",
            launch_reduce(o.x, None, o.dS, None, Q, chunk, tile),
            (),
            2 * o.x.numel() * R,
            (Q,),
        ),
        Kernel("finish dA", launch_finish(Q, o.dA.t(), o.A.t(), OMEGA, 1.0), (o.dA,), 0),
    ]


Build = Callable[[Operands, Candidate], Sequence[Kernel]]

# What a tile is chosen for: all its kernels together, since a tile decides how many parts remain.
PASSES: Mapping[str, Build] = {
    "gemm forward": gemm_forward,
    "gemm dx": gemm_dx,
    "thin": thin,
    "reduce dy": reduce_dy,
    "reduce x": reduce_x,
}

# The bare GEMM of the same operands: what the layer costs without an adapter.
FLOORS: Mapping[str, Callable[[Operands], Tensor]] = {
    "gemm forward": lambda o: torch.mm(o.x, o.weight.t(), out=o.y),
    "gemm dx": lambda o: torch.mm(o.dy, o.weight, out=o.dx),
}


def default_candidate(name: str, tiles: Tiles) -> Candidate:
    """What dispatch would use in this pass."""
    if name.startswith("gemm"):
        return Candidate(tiles.gemm if name == "gemm forward" else tiles.gemm_t)
    if name.startswith("activate"):
        return Candidate(tiles.activate if name == "activate" else tiles.gated)
    return Candidate(tiles.thin if name == "thin" else tiles.reduce)


def results(kernels: Sequence[Kernel]) -> tuple[Tensor, ...]:
    """What a pass is for."""
    return tuple(tensor for kernel in kernels for tensor in kernel.results)


def _gemm_flops(o: Operands) -> int:
    (N, K), (M, R) = o.weight.shape, o.S.shape
    return 2 * M * N * (K + R)


def _programs(o: Operands, candidate: Candidate) -> int:
    return max(1, round(o.multiprocessors * candidate.programs))


def _workspace(o: Operands, *size: int) -> Tensor:
    return torch.empty(*size, dtype=torch.float32, device=o.x.device)


def _tile(candidate: Candidate) -> Tile:
    tile: Any = candidate.tile
    return tile


def _gemm_tile(candidate: Candidate) -> GemmTile:
    tile: Any = candidate.tile
    return tile
