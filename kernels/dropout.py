"""Dropout's mask as bits, from a seed in memory; and the reading of it by the products.

Bit k % 32 of int32 (m, k // 32) says whether element (m, k) is kept. Each byte comes from the four
words of one Philox-4x32 call with counter (k // 8, m, 0, 0): the bits do not depend on a tile's
shape, and making them costs 1/8 of a call an element, once, for all the blocks that read them.
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
    """Whether the low and the high 16 bits of a word are not below ``dropped``."""
    low = (word & 0xFFFF).to(tl.int32)
    high = (word >> 16).to(tl.int32)
    return (low >= dropped).to(tl.int32) | ((high >= dropped).to(tl.int32) << 1)


@triton.jit
def kept(
    KEEP, rows, in_rows, start, N, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The mask of a tile, bool [BLOCK_M, BLOCK_N]: KEEP in words of 32 columns, from ``start`` on.

    Words are loaded and then spread, so that a thread holds few of them.
    """
    words = start // 32 + tl.arange(0, BLOCK_N // 32)
    inside = in_rows[:, None] & (words * 32 < N)[None, :]
    word = tl.load(KEEP + rows[:, None] * stride + words[None, :], mask=inside, other=0)
    bit = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bit, [BLOCK_M, BLOCK_N]) != 0


def launch_keep_bits(seed: Tensor, keep: Tensor, dropped: int, rounds: int) -> Launch:
    """seed [1] int64 -> keep int32 [M, ceil(K/32)]; ``dropped`` of 2^16 values drop an element."""
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
    """The mask of an x [M, K] as bits."""
    keep = torch.empty(M, cdiv(K, 32), dtype=torch.int32, device=seed.device)
    launch_keep_bits(seed, keep, dropped, rounds).run()
    return keep
