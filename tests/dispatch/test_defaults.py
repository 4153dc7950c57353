"""Default tiles: how much of a device their blocks fill."""

from __future__ import annotations

import pytest
import torch
from fastbound.kernels.tiles import GemmTile
from hypothesis import given
from hypothesis import strategies as st

from fastbound.dispatch.defaults import filled_share, filled_tiles, unaligned_tiles
from fastbound.dispatch.entries import fits
from fastbound.performance.compilation import TARGETS

WIDE, SQUARE = GemmTile(128, 256, 64, 8, 3), GemmTile(128, 128, 64, 8, 3)
H100, A100 = 132, 108


@pytest.mark.parametrize(
    ("M", "N", "multiprocessors", "share"),
    [
        pytest.param(512, 4096, H100, 0.48, id="Llama dx or down, 512 rows"),
        pytest.param(512, 14336, H100, 0.85, id="Llama gate or up, 512 rows"),
        pytest.param(1024, 14336, H100, 0.85, id="Llama gate or up, 1024 rows"),
        pytest.param(512, 2048, H100, 0.24, id="Phi fc1 dx, 512 rows"),
        pytest.param(1024, 2048, H100, 0.48, id="Phi fc1 dx, 1024 rows"),
        pytest.param(1024, 768, H100, 0.18, id="GPT-Neo c_proj, 1024 rows"),
        pytest.param(2048, 768, H100, 0.36, id="GPT-Neo c_proj, 2048 rows"),
        pytest.param(8192, 768, H100, 0.73, id="GPT-Neo c_proj, 8192 rows"),
        pytest.param(1024, 4096, A100, 0.59, id="A100, Llama dx, 1024 rows"),
        pytest.param(2048, 4096, A100, 0.79, id="A100, Llama dx, 2048 rows"),
    ],
)
def test_the_share_of_a_device_that_wide_blocks_fill(
    M: int, N: int, multiprocessors: int, share: float
) -> None:
    assert filled_share(M, N, WIDE, multiprocessors) == pytest.approx(share, abs=0.005)


def test_half_as_wide_blocks_fill_what_wide_ones_leave_idle() -> None:
    assert filled_share(512, 4096, SQUARE, H100) == pytest.approx(128 / 132)


def test_rows_beyond_the_last_full_block_count_as_idle() -> None:
    """At 513 rows the fifth row of blocks does one row of work."""
    assert filled_share(513, 4096, WIDE, H100) == pytest.approx(513 / 512 * 64 / 132)
    assert filled_share(8448, 4096, WIDE, H100) == 1.0
    assert filled_share(8449, 4096, WIDE, H100) < 0.9


@pytest.mark.parametrize(
    ("architecture", "M", "y", "dx"),
    [
        ("sm_90", 512, (128, 256), (128, 128)),  # a square tile fills no more with 14336 columns
        ("sm_90", 8192, (128, 256), (128, 256)),
        ("sm_80", 1024, (128, 256), (128, 256)),  # neither fills 108 multiprocessors
        ("gfx942", 512, (128, 128), (128, 128)),
        ("sm_120", 512, (128, 128), (128, 128)),
    ],
)
def test_a_square_tile_is_the_default_where_it_alone_fills_the_device(
    architecture: str, M: int, y: tuple[int, int], dx: tuple[int, int]
) -> None:
    device = TARGETS[architecture].device
    tiles = filled_tiles(device, M, (14336, 4096), 16, torch.bfloat16)
    assert (tiles.gemm.block_m, tiles.gemm.block_n) == y
    assert (tiles.gemm_t.block_m, tiles.gemm_t.block_n) == dx


@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("target", TARGETS)
def test_every_default_gemm_can_fit_the_cards_shared_memory(target: str, rank: int) -> None:
    device = TARGETS[target].device
    for M in (512, 8192):
        tiles = filled_tiles(device, M, (14336, 4096), rank, torch.bfloat16)
        assert fits(tiles.gemm, device) and fits(tiles.gemm_t, device)
    assert fits(unaligned_tiles(device, rank).gemm, device)


@given(
    M=st.integers(0, 10**6),
    N=st.integers(1, 10**5),
    multiprocessors=st.integers(1, 304),
    tile=st.sampled_from([WIDE, SQUARE]),
)
def test_a_share_is_a_share(M: int, N: int, multiprocessors: int, tile: GemmTile) -> None:
    assert 0 < filled_share(M, N, tile, multiprocessors) <= 1
