"""The predicted time of a pass with a tile: good enough to rank candidates, but not as a figure."""

from __future__ import annotations

from typing import Any

from fastbound.kernels.gated import activation_cut, backward_cut
from fastbound.kernels.reduce import row_chunks
from fastbound.kernels.thin import step_chunks
from fastbound.kernels.tiles import GemmTile, Tile
from fastbound.performance.prediction import BF16, FP32, Ceilings
from fastbound.performance.shapes import Block, Shape

L2_OVER_MEMORY = 2.0  # assumed ratio of L2's bandwidth to that of memory


def tile_seconds(
    name: str,
    tile: Tile | GemmTile,
    shape: Shape | Block,
    M: int,
    R: int,
    ceilings: Ceilings,
    sms: int,
) -> float:
    """The predicted seconds of a layer's or a block's pass, with factors of padded rank R each.

    Warps and stages are not modelled: tiles that differ only in them get the same prediction.
    """
    if isinstance(shape, Block):
        nbytes, programs = _block_bytes(name, tile, shape, M, R, sms)
    elif isinstance(tile, GemmTile):
        wide, depth = (shape.N, shape.K) if name == "gemm forward" else (shape.K, shape.N)
        # The last wave of tiles takes as long as a full one; a tile's operands come from L2.
        waves = -(-(-(-M // tile.block_m) * -(-wide // tile.block_n)) // sms)
        work = 2 * tile.block_m * tile.block_n * (depth + R)
        loads = BF16 * (tile.block_m + tile.block_n) * depth
        least = BF16 * (M * wide + wide * depth + M * depth) / ceilings.bandwidth
        one = max(work / ceilings.flops, loads / (L2_OVER_MEMORY * ceilings.bandwidth))
        return max(waves * sms * one, least)
    elif name == "thin":
        chunks, _ = step_chunks(M, shape.K, tile, sms)
        programs = chunks * -(-M // tile.block_m)
        parts = FP32 * chunks * M * R * (chunks > 1)  # one launch writes S itself
        factor = BF16 * -(-M // tile.block_m) * shape.K * R  # once per block of rows, from L2
        nbytes = BF16 * M * shape.K + factor / L2_OVER_MEMORY + 2 * parts
    else:
        width = shape.N if name == "reduce dy" else shape.K
        chunks, _ = row_chunks(M, width, tile, sms)
        columns = -(-width // tile.block_n)
        parts, programs = FP32 * chunks * width * R, chunks * columns
        if name == "reduce dy":
            parts += FP32 * columns * M * R
        nbytes = BF16 * M * width + 2 * parts
    return nbytes / ceilings.bandwidth * max(1.0, sms / programs)


def _block_bytes(name: str, tile: Any, block: Block, M: int, R: int, sms: int) -> tuple[float, int]:
    """The bytes of one pass over the tall tensors, in bytes of memory, and its programs."""
    tall = BF16 * M * block.N
    if name == "activate":  # G, U and H; the factor once per block of rows, from L2
        rows, chunks = -(-M // tile.block_m), activation_cut(M, block.N, tile, sms).chunks
        factor = BF16 * rows * block.N * R / L2_OVER_MEMORY
        parts = FP32 * chunks * M * R * (chunks > 1)  # one launch writes P itself
        return tall * (2 + block.gated) + factor + 2 * parts, rows * chunks
    # DH, G, U, DG and DU. For each block of columns, S and DS_down are read, and the parts of DS
    # are read and written in L2. Each span of blocks, and each chunk, leaves parts in memory.
    width = R * (1 + block.gated)
    cut = backward_cut(M, block.N, width, tile, sms)
    cached = -(-block.N // tile.block_n) * M * (BF16 * (width + R) + 2 * FP32 * width)
    parts = FP32 * (cut.columns * M * width + cut.chunks * block.N * (width + R))
    return tall * (3 + 2 * block.gated) + cached / L2_OVER_MEMORY + 2 * parts, cut.programs
