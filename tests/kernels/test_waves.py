"""The cut of a launch: every block once, no wave begun for a few programs, few rows too."""

from __future__ import annotations

import pytest
from fastbound.kernels.tiles import Tile
from fastbound.kernels.waves import START, Cut, cut_of, resident
from hypothesis import given
from hypothesis import strategies as st

from fastbound.performance.prediction import share_busy

HOPPER = 132
WIDTHS = (3072, 4096, 8192, 14336, 18944, 28672)
GATED, REDUCE = Tile(64, 64, 8, 2), Tile(64, 512, 8, 3)


@given(
    M=st.integers(1, 100_000),
    N=st.integers(1, 100_000),
    slots=st.integers(1, 1216),
    most=st.integers(1, 16),
    tile=st.sampled_from([GATED, REDUCE, Tile(32, 64, 4, 2), Tile(16, 16, 4, 1)]),
)
def test_every_row_and_column_belongs_to_one_program(
    M: int, N: int, slots: int, most: int, tile: Tile
) -> None:
    cut = cut_of(M, N, tile, slots, most, 25.6)
    assert 1 <= cut.span <= most and cut.chunk % tile.block_m == 0
    assert (cut.chunks - 1) * cut.chunk < M <= cut.chunks * cut.chunk
    columns = cut.span * tile.block_n
    assert (cut.columns - 1) * columns < N <= cut.columns * columns


def time_of(cut: Cut, tile: Tile, slots: int) -> int:
    """In steps, one wave after the other."""
    return -(-cut.programs // slots) * cut.span * (cut.chunk // tile.block_m + START)


@given(M=st.integers(1, 50_000), N=st.integers(1, 50_000), sms=st.integers(1, 304))
def test_it_ends_no_later_than_two_programs_per_multiprocessor_rounded_up(
    M: int, N: int, sms: int
) -> None:
    wanted = -(-2 * sms // -(-N // REDUCE.block_n))
    rows = -(-M // REDUCE.block_m)
    steps = -(-rows // wanted)
    rounded = Cut(1, -(-N // REDUCE.block_n), -(-rows // steps), steps * REDUCE.block_m)
    assert time_of(cut_of(M, N, REDUCE, sms), REDUCE, sms) <= time_of(rounded, REDUCE, sms)


@pytest.mark.parametrize("N", WIDTHS)
@pytest.mark.parametrize("M", [2048, 4096, 8192, 32768])
def test_a_blocks_backward_leaves_a_hopper_no_tail(M: int, N: int) -> None:
    cut = cut_of(M, N, GATED, HOPPER, 16, 25.6)
    assert share_busy(cut, M, N, GATED, HOPPER) > 0.95


@pytest.mark.parametrize("N", WIDTHS)
@pytest.mark.parametrize("M", [512, 1024])
def test_a_few_rows_keep_most_of_a_hopper_at_work(M: int, N: int) -> None:
    cut = cut_of(M, N, GATED, HOPPER, 16, 25.6)
    assert share_busy(cut, M, N, GATED, HOPPER) > 0.7


@pytest.mark.parametrize(
    ("warps", "registers", "programs"), [(8, 256, 1), (4, 256, 2), (4, 128, 4), (16, 256, 1)]
)
def test_what_a_multiprocessor_is_sure_to_hold(warps: int, registers: int, programs: int) -> None:
    assert resident(warps, registers) == programs
