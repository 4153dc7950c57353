"""What the tuner tries: the points to measure, most useful first, and the tiles of each pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fastbound.dispatch.defaults import Tiles, filled_tiles, padded_rank
from fastbound.dispatch.device import Device
from fastbound.dispatch.entries import fits
from fastbound.kernels.tiles import GemmTile, Tile
from fastbound.performance.passes import Candidate, default_candidate
from fastbound.performance.prediction import Ceilings
from fastbound.performance.shapes import Block, Shape
from fastbound.performance.tuning.tile_model import tile_seconds

# Each kind of tile with the passes that use it; it is chosen by the sum of their times.
KINDS: Mapping[str, tuple[str, ...]] = {
    "gemm": ("gemm forward",),
    "gemm_t": ("gemm dx",),
    "thin": ("thin",),
    "reduce": ("reduce dy", "reduce x"),
}
BLOCK_KINDS: Mapping[str, tuple[str, ...]] = {
    "activate": ("activate",),
    "gated": ("activate backward",),
}
COMPILED = 20  # candidates per kind that are compiled, including the default
TYPICAL_TOKENS = 8192


@dataclass(frozen=True)
class Point:
    """A layer or block to tune, at M rows (a power of two) and with factors of ``rank``."""

    shape: Shape | Block
    M: int
    rank: int

    def __str__(self) -> str:
        return f"{self.shape} at {self.M} tokens, rank {self.rank}"

    @property
    def kinds(self) -> Mapping[str, tuple[str, ...]]:
        """The kinds of tiles to choose at this point, and the passes of each."""
        return BLOCK_KINDS if isinstance(self.shape, Block) else KINDS

    @property
    def steps(self) -> int:
        """The number of steps: one per kind of tile, and one for a layer's strategies."""
        return len(self.kinds) + (not isinstance(self.shape, Block))

    def default_tiles(self, device: Device, dtype: torch.dtype) -> Tiles:
        """The tiles that dispatch uses without a table; a block's are those of twice the rank."""
        R = padded_rank(self.rank) * (2 if isinstance(self.shape, Block) else 1)
        return filled_tiles(device, self.M, (self.shape.N, self.shape.K), R, dtype)


@dataclass(frozen=True)
class Machine:
    """The GPU to tune for, as dispatch sees it, with its name, ceilings and software versions."""

    device: Device
    name: str
    ceilings: Ceilings
    versions: Mapping[str, str]


def points(
    shapes: Sequence[Shape | Block], tokens: Sequence[int], ranks: Sequence[int]
) -> list[Point]:
    """The points to measure, most useful first: the first rank, and tokens nearest to 8192.

    Tokens are rounded up to a power of two, and shapes of the same sizes are measured once. A
    block's passes do not depend on K.
    """

    def sizes(shape: Shape | Block) -> tuple[object, ...]:
        return (shape.N, shape.form if isinstance(shape, Block) else shape.K)

    distinct: dict[tuple[object, ...], Shape | Block] = {}
    for shape in shapes:
        distinct.setdefault(sizes(shape), shape)
    rows = sorted(
        {1 << (M - 1).bit_length() for M in tokens},
        key=lambda M: abs(M.bit_length() - TYPICAL_TOKENS.bit_length()),
    )
    return [Point(shape, M, rank) for rank in ranks for M in rows for shape in distinct.values()]


def candidates(name: str, tiles: Tiles, *, tiny: bool = False) -> list[Candidate]:
    """The candidates for a pass, the default first."""
    default = default_candidate(name, tiles)
    if tiny:
        other = replace(default.tile, block_m=2 * default.tile.block_m)
        return [default, Candidate(other)]
    if name.startswith("gemm"):
        found = [Candidate(tile) for tile in _gemm_tiles()]
    elif name == "thin":
        found = [
            Candidate(Tile(rows, step, warps, stages))
            for rows in (16, 32, 64, 128)
            for step, stages in ((64, 4), (64, 6), (128, 3), (128, 4), (256, 3), (512, 2))
            for warps in ((4,) if rows < 128 else (4, 8))
        ]
    elif name == "activate":
        found = [
            Candidate(Tile(rows, step, warps, stages))
            for rows in (16, 32, 64)
            for step, warps in ((64, 4), (128, 8))
            for stages in (1, 3)
        ]
    elif name == "activate backward":  # larger tiles spill: see benchmarks/NOTES.md
        found = [
            Candidate(Tile(step, columns, warps, stages))
            for step, columns in ((16, 32), (32, 32), (16, 64), (32, 16))
            for warps in (4, 8)
            for stages in (1, 2)
        ]
    else:
        found = [
            Candidate(Tile(step, columns, warps, stages))
            for step in (32, 64, 128)
            for columns in (128, 256, 512)
            for warps, stages in ((4, 3), (8, 2), (8, 3), (8, 4))
        ]
        found += [Candidate(default.tile, programs) for programs in (0.5, 2.0, 4.0)]
    return list(dict.fromkeys([default, *found]))


def _gemm_tiles() -> Iterator[GemmTile]:
    sizes = (
        (128, 256, 64, 8, (3, 4)),
        (128, 256, 32, 8, (3, 4)),
        (256, 128, 64, 8, (3, 4)),
        (128, 128, 64, 8, (3, 4, 5)),
        (128, 128, 64, 4, (3, 4)),
        (128, 128, 128, 8, (2, 3)),
        (64, 256, 64, 4, (3, 4)),
        (64, 128, 64, 4, (4, 5)),
    )
    for descriptors in (True, False):
        for block_m, block_n, block_k, warps, stages in sizes:
            if descriptors and block_n >= 128:
                yield GemmTile(block_m, block_n, block_k, warps, stages[-1], 8, True, stores=2)
            for count in stages:
                yield GemmTile(block_m, block_n, block_k, warps, count, 8, descriptors)
        for group in (4, 16):
            yield GemmTile(128, 256, 64, 8, 3, group, descriptors)


def shortlist(
    names: Sequence[str], tiles: Tiles, point: Point, machine: Machine
) -> list[Candidate]:
    """The default, then the candidates that the time model predicts to be fastest."""
    default, *others = candidates(names[0], tiles)
    device = machine.device

    def possible(candidate: Candidate) -> bool:
        tile = candidate.tile
        if candidate.programs != 1.0:  # a plan cannot express another number
            return False
        return not isinstance(tile, GemmTile) or (
            fits(tile, device) and (device.has_descriptors or not tile.descriptors)
        )

    def predicted(candidate: Candidate) -> float:
        return sum(
            tile_seconds(
                name,
                candidate.tile,
                point.shape,
                point.M,
                padded_rank(point.rank),
                machine.ceilings,
                machine.device.multiprocessors,
            )
            for name in names
        )

    return [default, *sorted(filter(possible, others), key=predicted)[: COMPILED - 1]]
