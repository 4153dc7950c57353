"""Default tiles: tiles that compile without spills for a device's family; none has been timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastbound.dispatch.device import SHARED_LIMIT, Device
from fastbound.kernels.tiles import ELEMENTWISE, GemmTile, Tile

# The share of a device that a GEMM's blocks must fill for a tile to be preferred; cuBLAS, which
# can cut K too, does better below it.
FILLED = 0.93


def padded_rank(rank: int) -> int:
    """The width of SA, SB and S: ``max(16, next power of two)``, as tensor cores require."""
    return max(16, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class Tiles:
    """The tiles of one plan.

    A layer uses ``gemm`` for y, ``gemm_t`` for dx, ``thin`` (rows x step) for S, and ``reduce``
    (step x columns) for the factors' gradients. The two GEMMs differ in the weight's layout: it is
    read row by row for y and transposed for dx. A Conv1D stores its weight transposed, so its y
    takes ``gemm_t``.

    An MLP block also uses ``activate`` (rows x step) and, in its backward, ``gated`` (step x
    columns).
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
    """The defaults for ``widths`` (N, K), with tiles that fill the device at M rows if possible.

    y is [M, N] and dx [M, K]; a reduction reads M rows of either width.
    """
    tiles, sms = default_tiles(device, M, R, dtype), device.multiprocessors
    N, K = widths
    return replace(
        tiles,
        gemm=filling_gemm(tiles.gemm, M, N, sms),
        gemm_t=filling_gemm(tiles.gemm_t, M, K, sms),
        reduce=filling(tiles.reduce, M, min(widths), sms),
    )


def filling_gemm(tile: GemmTile, M: int, N: int, multiprocessors: int) -> GemmTile:
    """``tile``, or a square tile if that fills the device with [M, N] and ``tile`` does not."""
    square = replace(tile, block_n=tile.block_m, stages=4)
    fills = filled_share(M, N, tile, multiprocessors) >= FILLED
    if fills or filled_share(M, N, square, multiprocessors) < FILLED:
        return tile
    return square


def filling(reduce: Tile, M: int, width: int, multiprocessors: int) -> Tile:
    """``reduce``, or a smaller tile if it would leave a quarter of the GPU idle at M x ``width``.

    There is only one smaller tile, whatever M is, because each tile is compiled to its own binary.
    """
    if 4 * -(-M // reduce.block_m) * -(-width // reduce.block_n) >= 3 * multiprocessors:
        return reduce
    return Tile(min(32, reduce.block_m), min(128, reduce.block_n), 4, reduce.stages)


def filled_share(M: int, N: int, tile: GemmTile, multiprocessors: int) -> float:
    """The share of a device, 0 to 1, that computing a GEMM's output [M, N] keeps busy.

        M N / (waves · multiprocessors · block_m · block_n)

    A multiprocessor takes one block at a time, and the last wave takes as long as a full one. The
    part of a block beyond M or N counts as idle. An empty output gives 1.0.
    """
    blocks = -(-M // tile.block_m) * -(-N // tile.block_n)
    if not blocks:
        return 1.0
    waves = -(-blocks // multiprocessors)
    return M * N / (waves * multiprocessors * tile.block_m * tile.block_n)


def default_tiles(device: Device, M: int, R: int, dtype: torch.dtype) -> Tiles:
    """Defaults for M rows and padded rank R: they compile without spills, and none has been timed.

    A block's own tiles (the last two) are for two projections side by side, of R/2 each.
    """
    gemm, thin = GemmTile(64, 64, 32, 4, 3), Tile(16, 64, 4, 3)
    if device.architecture == "interpreter":
        gemm, tall = GemmTile(64, 64, 64, 4, 2), Tile(64, 128, 4, 2)
        return Tiles(gemm, gemm, tall, tall, tall, Tile(64, 64, 4, 2))
    family = tile_family(device)
    if dtype is torch.float32:
        return Tiles(gemm, gemm, thin, thin, Tile(16, 64, 4, 2), Tile(16, 32, 4, 1))
    rows = 64 if M >= 8192 else 32
    warps, activate, gated = 8 if R >= 64 else 4, Tile(32, 64, 4, 1), gated_tile(device, R)
    if R == 32 and rows == 32:
        warps = 8
    if family == "sm_90":
        gemm = GemmTile(128, 256, 64, 8, 3, descriptors=True)
        thin, reduce = Tile(rows, 128, warps, 4), Tile(64, 512 if R == 16 else 256, 8, 3)
        return Tiles(gemm, gemm, thin, reduce, activate, gated)
    if family == "gfx942":  # of 8 warps of 64 threads, some would repeat products of 32 rows
        gemm, thin = GemmTile(128, 128, 64, 8, 2), Tile(rows, 128, 4 if rows == 32 else warps, 2)
        return Tiles(gemm, gemm, thin, Tile(64, 128, 4, 2), activate, gated)
    if family == "gfx1100":
        gemm, thin = GemmTile(128, 128, 64, 8, 2), Tile(min(rows, 32), 128, 4, 2)
        reduce = Tile(32, 64 if R >= 64 else 128, 8, 1)
        return Tiles(gemm, gemm, thin, reduce, Tile(16, 64, 4, 2), Tile(32, 32, 4, 1))
    thin, reduce = Tile(rows, 128, warps, 4), Tile(32, {64: 256, 128: 128}.get(R, 512), 8, 3)
    gemm = GemmTile(128, 256, 32, 8, 4)
    if device.shared_limit < SHARED_LIMIT["sm_80"]:
        thin = replace(thin, stages={64: 3, 128: 2}.get(R, 4))
        reduce = replace(reduce, stages=3 if R >= 64 else 2)
    if family == "sm_120":
        gemm = GemmTile(128, 128, 64, 8, 3, descriptors=True)
    return Tiles(gemm, gemm, thin, reduce, activate, gated)


def gated_tile(device: Device, R: int) -> Tile:
    """The tile of a block's backward: the largest whose sums and tensors all fit in registers.

    Hopper's matrix unit takes 64 rows at a time. Elsewhere two programs of 4 warps hide each
    other's barriers, except on Ampere from rank 32 (R = 64) on, where 8 warps share one program.
    Above, AMD's matrix cores have room for two programs only without loads ahead.
    """
    if device.architecture == "sm_90":
        return Tile(64, 64, 8, 2)
    family = tile_family(device)
    if R > 64 and family == "sm_120":
        return Tile(32, 32, 8, 2)
    ampere = family in ("sm_80", "sm_120")
    return Tile(32, 64, 8 if R >= 64 and ampere else 4, 1 if R > 64 and family == "gfx942" else 2)


def unaligned_tiles(device: Device, R: int) -> Tiles:
    """Tiles for loads element by element, without TMA or asynchronous copies; larger ones spill."""
    gemm, reduce = ELEMENTWISE, Tile(32, 128, 4, 2)
    activate, gated = Tile(16, 64, 8, 2), Tile(16, 32, 4, 1)
    family = tile_family(device)
    if R > 64 or family == "sm_120":
        reduce = Tile(32, 64, 4, 2)
    if family == "gfx1100":
        reduce = Tile(32, 64, 8, 1)
    if R > 64:
        gated = Tile(16, 32, 8, 1)
    elif R == 64 and family == "gfx1100":
        gated = Tile(16, 16, 4, 1)
    return Tiles(gemm, gemm, Tile(16, 64, 4, 2), reduce, activate, gated)


def tile_family(device: Device) -> str:
    """The architecture whose default tiles a device uses.

    sm_90 stands for NVIDIA GPUs with tensor descriptors (TMA) and the shared memory of data-centre
    cards, sm_120 for those with descriptors but less shared memory, and sm_80 for all others.
    gfx942 stands for AMD GPUs with MFMA, and gfx1100 for those with WMMA.
    """
    if device.architecture.startswith("gfx"):
        return "gfx1100" if device.architecture.startswith(("gfx11", "gfx12")) else "gfx942"
    if device.has_descriptors:
        return "sm_120" if device.shared_limit < SHARED_LIMIT["sm_90"] else "sm_90"
    return "sm_80"
