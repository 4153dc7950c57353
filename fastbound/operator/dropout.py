"""Dropout of x for the thin product, where one seed determines which elements are kept.

    keep(seed, m, k):  16 random bits >= round(2^16 p),   eight columns from one Philox-4x32-7 call

A mask is stored as bits, uint8 [M, ceil(K/8)] with column k in bit k % 8 of byte k // 8, and lives
only as long as one product needs it: backward saves the seed alone. Every device and the Triton
kernel (``kernels/dropout.py``) produce the same bits.
"""

from __future__ import annotations

from typing import SupportsFloat

import torch
from torch import Tensor

LEVELS = 1 << 16  # p is rounded to the nearest 1/LEVELS
ROUNDS = 7  # the fewest with which Philox-4x32 passes BigCrush (Salmon et al., 2011, table 2)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_CHUNK = 1 << 18  # bytes of the mask made at a time; making them takes about 40 times as much


def check_dropout(p: float) -> float:
    """p as a float. Raises ValueError, naming it, unless 0 <= p < 1."""
    if type(p) is float and 0 <= p < 1:
        return p
    number = float(p) if isinstance(p, SupportsFloat) and not isinstance(p, bool) else -1.0
    if not 0 <= number < 1:
        raise ValueError(f"dropout must be a number with 0 <= dropout < 1, got {p!r}")
    return number


def threshold(p: float) -> int:
    """How many of the LEVELS values that 16 random bits can take drop an element."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep_rate(p: float) -> float:
    """The share of elements that are kept: 1 - p, with p rounded to the nearest 1/LEVELS."""
    return 1 - threshold(p) / LEVELS


def draw_seed(device: torch.device) -> Tensor:
    """A seed [1] from the device's default generator. It stays there, so the host does not wait."""
    return torch.randint(2**63 - 1, (1,), device=device, dtype=torch.int64)


def keep_bits(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The mask of x [M, K] as bits: uint8 [M, ceil(K/8)], on the seed's device."""
    columns = -(-K // 8)
    rows = max(1, _CHUNK // max(columns, 1))
    parts = [
        _keep_bits(seed, start, min(start + rows, M), columns, threshold(p))
        for start in range(0, M, rows)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else seed.new_empty(0, columns, dtype=torch.uint8)


def keep_mask(bits: Tensor, K: int) -> Tensor:
    """The bits [M, ceil(K/8)] as bool [M, K]; the int32 words of the Triton kernel will do too."""
    bits = bits.view(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).flatten(1)[:, :K].bool()


def _keep_bits(seed: Tensor, start: int, stop: int, columns: int, dropped: int) -> Tensor:
    """Rows ``start`` to ``stop`` of the mask: Philox in int64, whose products wrap modulo 2^64."""
    row = torch.arange(start, stop, device=seed.device)[:, None]
    column = torch.arange(columns, device=seed.device)[None, :]
    c0, c1 = torch.broadcast_tensors(column, row)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((right >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((left >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = right & _LOW, left & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    bits = torch.zeros_like(c0, dtype=torch.uint8)
    for place, word in enumerate((c0, c1, c2, c3)):
        for half in range(2):
            kept = ((word >> 16 * half) & (LEVELS - 1)) >= dropped
            bits |= kept.to(torch.uint8) << (2 * place + half)
    return bits
