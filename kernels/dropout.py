"""Makes dropout's mask as bits from a seed in device memory, and loads it into the products' tiles.

Bit k % 32 of int32 word (m, k // 32) says whether element (m, k) is kept. Each byte comes from the
four words of one Philox-4x32 call with the counter (k // 8, m, 0, 0), so the bits do not depend on
the shape of a tile. They cost 1/8 of a call per element and are made once for all blocks that read
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastbound.kernels.launch import Launch, cdiv
from torch import Tensor

BYTES = 1024  # per program


@triton.jit(do_not_specialize=["size"])
def _keep_kernel(
    SEED, KEEP, size, columns, dropped, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = (offs % columns).to(tl.uint32)
    row = (offs // columns).to(tl.uint32)
    zero = column * 0
    a, b, c, d = tl.philox(tl.load(SEED), column, row, zero, zero, ROUNDS)
    byte = _two_bits(a, dropped) | (_two_bits(b, dropped) << 2)
    byte |= (_two_bits(c, dropped) << 4) | (_two_bits(d, dropped) << 6)
    tl.store(KEEP + offs, byte.to(tl.uint8), mask=offs < size)


@triton.jit
def _two_bits(word, dropped):
    """Two bits: whether a word's low and high 16 bits are at least ``dropped``."""
    low = (word & 0xFFFF).to(tl.int32)
    high = (word >> 16).to(tl.int32)
    return (low >= dropped).to(tl.int32) | ((high >= dropped).to(tl.int32) << 1)


@triton.jit
def kept(
    KEEP, rows, in_rows, start, N, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile's mask, bool [BLOCK_M, BLOCK_N], from column ``start`` on; KEEP has 32 columns a word.

    The words are loaded first and then expanded into bits, so that each thread holds only a few.
    """
    words = start // 32 + tl.arange(0, BLOCK_N // 32)
    inside = in_rows[:, None] & (words * 32 < N)[None, :]
    word = tl.load(KEEP + rows[:, None] * stride + words[None, :], mask=inside, other=0)
    bit = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bit, [BLOCK_M, BLOCK_N]) != 0


def launch_keep_bits(seed: Tensor, keep: Tensor, dropped: int, rounds: int) -> Launch:
    """seed [1] int64 -> keep int32 [M, ceil(K/32)].

    ``dropped`` of the 2^16 values that 16 random bits can take drop an element.
    """
    size, columns = 4 * keep.numel(), 4 * keep.shape[1]
    return Launch(
        _keep_kernel,
        (cdiv(size, BYTES),),
        (seed, keep.view(torch.uint8), size, columns, dropped),
        dict(ROUNDS=rounds, BLOCK=BYTES),
        warps=4,
        stages=1,
    )


def keep_bits(seed: Tensor, M: int, K: int, dropped: int, rounds: int) -> Tensor:
    """The mask of x [M, K] as bits: int32 [M, ceil(K/32)], on the seed's device."""
    keep = torch.empty(M, cdiv(K, 32), dtype=torch.int32, device=seed.device)
    launch_keep_bits(seed, keep, dropped, rounds).run()
    return keep
