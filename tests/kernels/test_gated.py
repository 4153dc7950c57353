"""A block's activation kernels however a launch is cut: by rows, by columns, into many parts."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from fastbound.kernels.gated import activation_cut, activation_forward, backward_cut
from fastbound.kernels.tiles import Tile

from fastbound.dispatch.defaults import default_tiles
from fastbound.dispatch.device import Device
from fastbound.dispatch.plan import Plan
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.engine import engine_of
from fastbound.performance.passes import passes_of
from fastbound.truth.exactness import assert_within_rounding
from fastbound.truth.formula import ACTIVATIONS
from fastbound.truth.operands import block_operands, run

pytestmark = pytest.mark.usefixtures("poisoned_empty", "interpreted_bf16")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = Tile(16, 32, 4, 1)


def normal(*size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 65), (40, 131)], ids=str)
def test_forward_in_parts_of_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """H to the bit; P, from parts in fp32, to rounding."""
    M, N = shape
    G, U = normal(M, N, dtype=dtype, seed=1), normal(M, N, dtype=dtype, seed=2)
    F = normal(16, N, dtype=dtype, seed=3).t()
    made = []
    for multiprocessors, parts in ((1, False), (50, True)):
        tile = TILE if parts else Tile(16, 256, 4, 1)
        assert (activation_cut(M, N, tile, multiprocessors).chunks > 1) is parts
        H, P = torch.empty_like(G), F.new_empty(M, 16)
        activation_forward(G, U, F, H, P, "silu", tile, multiprocessors)
        h, f = H.double(), F.double()
        assert_within_rounding(P, h @ f, h.abs() @ f.abs())
        made.append(H)
    assert torch.equal(*made)


def test_few_rows_take_as_many_programs_as_many_rows() -> None:
    tile = Tile(32, 64, 4, 1)
    few, many = (activation_cut(M, 14336, tile, 132).programs for M in (512, 8192))
    assert few == many == 512


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_backward_gives_the_same_however_it_is_cut(dtype: torch.dtype) -> None:
    """DG and DU to the bit; what is summed to rounding, and the same bits at every run."""
    o = block_operands((70, 24), 200, (3, 3, 3), dtype, device=DEVICE)
    backward = passes_of(o)["activate backward"]
    tiles = default_tiles(Device("interpreter"), 70, 32, dtype)
    cuts = {sms: backward_cut(70, 200, 32, tiles.gated, sms) for sms in (1, 4, 40)}
    assert len(set(cuts.values())) > 1
    made = {sms: backward.run(engine_of(Plan("fused", "", tiles, sms))) for sms in cuts}
    again = backward.run(engine_of(Plan("fused", "", tiles, 4)))
    assert all(torch.equal(a, b) for a, b in zip(made[4], again, strict=True))
    for sms in (4, 40):
        for i, (one, other) in enumerate(zip(made[1], made[sms], strict=True)):
            if i < 2:
                assert torch.equal(one, other)
            else:
                size = one.double().abs() + one.double().abs().mean()
                assert_within_rounding(other, one.double(), size)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_one(activation: str, gated: bool) -> None:
    """In y and in every gradient, as in plain PyTorch: a faulty row must not go unnoticed."""
    how = {"gated": gated, "activation": activation, "device": DEVICE}
    o = block_operands((5, 16), 24, (3, 3, 3), torch.float32, **how)
    o.x[2, 3] = float("nan")

    def spread(backend: str) -> list[torch.Tensor]:
        made = run(o, partial(bounded_mlp, backend=backend))
        return [t.isnan() for t in made.values()]

    found, expected = spread("split"), spread("reference")
    assert any(map(torch.any, expected))
    assert all(map(torch.equal, found, expected))
