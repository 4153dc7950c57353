"""How tall matrices are cut among the programs of a launch, so that its last wave is full too.

All programs of a launch do the same work, so it takes as many waves as its number of programs
divided by the number that run at once, rounded up. Needs no Triton.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fastbound.kernels.tiles import Tile

REGISTERS = 65_536  # per multiprocessor; a thread has 255 unless its launch sets a lower limit
START = 2  # overhead of a column block, in steps: the first loads' latency and the writing of Q
WAVES = 3  # the most waves considered: shorter programs spend too much time starting


class Cut(NamedTuple):
    """``columns`` programs side by side, each with ``span`` column blocks, by ``chunks`` below."""

    span: int
    columns: int
    chunks: int
    chunk: int  # rows per chunk, a multiple of the block

    @property
    def programs(self) -> int:
        return self.columns * self.chunks


def resident(warps: int, registers: int = 256) -> int:
    """The number of programs that one multiprocessor can certainly hold at once."""
    return max(1, REGISTERS // (32 * warps * registers))


@lru_cache(maxsize=4096)
def cut_of(M: int, N: int, tile: Tile, slots: int, most: int = 1, part: float = 0.0) -> Cut:
    """The cut of M x N estimated to finish first, with up to ``most`` column blocks per program.

    ``slots`` is the number of programs that run at once. ``part`` is the cost of one row's part of
    P in one program, in elements of the tall matrices.
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
            # Among equal cuts take the widest, which leaves the fewest parts.
            if time <= least:
                best, least = Cut(span, columns, chunks, steps * tile.block_m), time
            if chunks == rows:
                break
    return best
