"""How tall matrices are cut among the programs of one launch, so that they fill a GPU to the end.

All programs of a launch do the same work, so it lasts as many waves as there are times the programs
that run at once. No Triton here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastbound.kernels.tiles import Tile

REGISTERS = 65_536  # of a multiprocessor; a thread has 255 unless its launch says fewer
START = 2  # steps' time that a column block costs beyond its steps: loads to wait for, Q to write
WAVES = 3  # no more than so many: short programs start too often


class Cut(NamedTuple):
    """Programs side by side, each ``span`` blocks of columns; and one below the other."""

    span: int
    columns: int
    chunks: int
    chunk: int  # rows of each, whole blocks of them

    @property
    def programs(self) -> int:
        return self.columns * self.chunks


def resident(warps: int, registers: int = 256) -> int:
    """Programs that one multiprocessor is sure to hold at once."""
    return max(1, REGISTERS // (32 * warps * registers))


@lru_cache(maxsize=4096)
def cut_of(M: int, N: int, tile: Tile, slots: int, most: int = 1, part: float = 0.0) -> Cut:
    """The cut of M x N that ends first, of those with up to ``most`` column blocks per program.

    ``slots``: programs that run at once; ``part``: what a row's part of P costs in one program, in
    elements of the tall matrices.
    """
    rows, blocks = max(1, -(-M // tile.block_m)), -(-N // tile.block_n)
    best, least = Cut(1, blocks, 1, rows), float("inf")
    for span in range(1, min(most, blocks) + 1):
        columns = -(-blocks // span)
        sums = columns * rows * part / (tile.block_n * slots)
        for waves in range(1, WAVES + 1):
            chunks = min(rows, max(1, waves * slots // columns))
            steps = -(-rows // chunks)
            chunks = -(-rows // steps)
            time = -(-columns * chunks // slots) * span * (steps + START) + sums
            # Of equal ones the widest: it leaves the fewest parts.
            if time <= least:
                best, least = Cut(span, columns, chunks, steps * tile.block_m), time
            if chunks == rows:
                break
    return best
