"""Default tiles: what compiles without spills for a device's family, none of it timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastbound.dispatch.device import Device
from fastbound.kernels.tiles import GemmTile, Tile


def padded_rank(rank: int) -> int:
    """The width of SA, SB and S: ``max(16, next power of two)``, what a tensor core can take."""
    return max(16, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class Tiles:
    """``gemm`` for y, ``gemm_t`` for dx, ``thin`` (rows x step) for S, ``reduce`` (step x columns).

    The two GEMMs differ in how the weight lies: row by row for y, and read transposed for dx. A
    Conv1D's weight lies the other way round, so its y takes ``gemm_t``.

    For an MLP block also ``activate`` (rows x step) and ``gated``, its backward (step x columns).
    """

    gemm: GemmTile
    gemm_t: GemmTile
    thin: Tile
    reduce: Tile
    activate: Tile
    gated: Tile


def filled_tiles(
    device: Device, M: int, widths: tuple[int, int], R: int, dtype: torch.dtype
) -> Tiles:
    """The defaults, with a reduction's tile that fills the device at M rows of either width."""
    tiles = default_tiles(device.architecture, M, R, dtype)
    return replace(tiles, reduce=filling(tiles.reduce, M, min(widths), device.multiprocessors))


def filling(reduce: Tile, M: int, width: int, multiprocessors: int) -> Tile:
    """A reduction's tile for M x ``width``: a smaller one where it leaves a quarter of a GPU idle.

    One smaller one, whatever the number of rows: each tile is a binary of its own.
    """
    if 4 * -(-M // reduce.block_m) * -(-width // reduce.block_n) >= 3 * multiprocessors:
        return reduce
    return Tile(min(32, reduce.block_m), min(128, reduce.block_n), 4, reduce.stages)


def default_tiles(architecture: str, M: int, R: int, dtype: torch.dtype) -> Tiles:
    """Defaults for M rows and padded rank R, chosen by what compiles without spills; not timed.

    A block's tiles (the last two) are for two projections of half R each, side by side.
    """
    gemm, thin = GemmTile(64, 64, 32, 4, 3), Tile(16, 64, 4, 3)
    if architecture == "interpreter":
        gemm, tall = GemmTile(64, 64, 64, 4, 2), Tile(64, 128, 4, 2)
        return Tiles(gemm, gemm, tall, tall, tall, Tile(64, 64, 4, 2))
    family = tile_family(architecture)
    if dtype is torch.float32:
        return Tiles(gemm, gemm, thin, thin, Tile(16, 64, 4, 2), Tile(16, 32, 4, 1))
    rows = 64 if M >= 8192 else 32
    warps, activate, gated = 8 if R == 64 else 4, Tile(32, 64, 4, 1), gated_tile(architecture, R)
    if family == "sm_90":
        gemm = GemmTile(128, 256, 64, 8, 3, descriptors=True)
        thin, reduce = Tile(rows, 128, warps, 4), Tile(64, 512 if R == 16 else 256, 8, 3)
        return Tiles(gemm, gemm, thin, reduce, activate, gated)
    if family == "gfx942":
        gemm, thin = GemmTile(128, 128, 64, 8, 2), Tile(rows, 128, warps, 2)
        return Tiles(gemm, gemm, thin, Tile(64, 128, 4, 2), activate, gated)
    thin, reduce = Tile(rows, 128, warps, 4), Tile(32, 256 if R == 64 else 512, 8, 3)
    gemm = GemmTile(128, 256, 32, 8, 4)
    return Tiles(gemm, gemm, thin, reduce, activate, gated)


def gated_tile(architecture: str, R: int) -> Tile:
    """Of a block's backward: the largest that keeps its three sums and its tensors in registers.

    Hopper's matrix unit takes 64 rows at a time; elsewhere two programs of 4 warps hide one
    another's barriers, and at rank 32 on an Ampere 8 warps share one.
    """
    if architecture == "sm_90":
        return Tile(64, 64, 8, 2)
    ampere = tile_family(architecture) == "sm_80" or architecture.startswith("sm_12")
    return Tile(32, 64, 8 if R == 64 and ampere else 4, 2)


def unaligned_tiles(R: int) -> Tiles:
    """Element by element loads: neither TMA nor asynchronous copies, and larger tiles spill."""
    gemm = GemmTile(128, 128, 32, 8, 2)
    activate, gated = Tile(16, 64, 8 if R == 64 else 4, 2), Tile(16, 32, 4, 1)
    return Tiles(gemm, gemm, Tile(16, 64, 4, 2), Tile(32, 128, 4, 2), activate, gated)


def tile_family(architecture: str) -> str:
    """sm_90 for Hopper and newer (tensor descriptors), gfx942 for AMD, sm_80 for all others."""
    if architecture.startswith("gfx"):
        return "gfx942"
    if architecture.startswith("sm_") and int(architecture[3:]) >= 90:
        return "sm_90"
    return "sm_80"
