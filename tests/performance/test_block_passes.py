"""The passes that the tuner times for a block: they compute what the block's formula says."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="what is timed are Triton's kernels")

from fastbound.kernels.tiles import Tile
from torch import Tensor

from fastbound.performance.block_passes import (
    BLOCK_PASSES,
    BlockOperands,
    activate,
    activate_backward,
    make_block_operands,
)
from fastbound.performance.passes import OMEGA, Candidate, Kernel, results
from fastbound.performance.shapes import Block
from fastbound.performance.tuning.sweep import sweep
from fastbound.truth.formula import apply_activation

CPU = torch.device("cpu")
TILES = (Tile(16, 32, 4, 1), Tile(32, 64, 4, 2))
FORMS = [("silu", True), ("gelu_tanh", False)]

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here: see gpu_check"
)


def block(activation: str, gated: bool) -> Block:
    return Block("tiny", 24, 80, activation, gated=gated, bias=False)


def operands(activation: str, gated: bool, M: int = 40, rank: int = 3) -> BlockOperands:
    return make_block_operands(block(activation, gated), M, rank, torch.float32, CPU, 4)


def run(kernels: list[Kernel]) -> list[Tensor]:
    for kernel in kernels:
        for tensor in (*kernel.parts, *kernel.results):
            tensor.fill_(float("nan"))
    for kernel in kernels:
        kernel.launch.run()
    return list(results(kernels))


def truth(o: BlockOperands) -> tuple[list[Tensor], list[Tensor]]:
    """fp64: what the forward pass gives, and the backward's."""
    G, DH = o.G.double().requires_grad_(), o.DH.double()
    U = None if o.U is None else o.U.double().requires_grad_()
    H = apply_activation(G, o.activation) * (1.0 if U is None else U)
    made = torch.autograd.grad(H, [G] if U is None else [G, U], DH)
    H, SB, S, R = H.detach(), o.SB.double(), o.S.double(), o.DS_down.shape[1]

    def gradient(D: Tensor, thin: Tensor, angle: Tensor, scaling: float) -> Tensor:
        cosine = scaling * OMEGA * (OMEGA * angle.double()).cos()
        return cosine * (D.T @ thin)[:, : angle.shape[1]]

    dB = [gradient(D, S[:, i * R : i * R + R], o.B, o.scaling) for i, D in enumerate(made)]
    dA = gradient(H, o.DS_down.double(), o.A_down.t(), 1.0)
    forward = [H, H @ o.SA_down.double().T]
    return forward, [*made, *(D @ SB for D in made), *dB, dA]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("activation", "gated"), FORMS)
def test_a_pass_gives_what_the_formula_says(activation: str, gated: bool, tile: Tile) -> None:
    o = operands(activation, gated)
    for build, expected in zip((activate, activate_backward), truth(o), strict=True):
        got = run(build(o, Candidate(tile)))
        for value, exact in zip(got, expected, strict=True):
            assert value.shape == exact.shape
            assert (value.double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("name", BLOCK_PASSES)
def test_a_tile_whose_results_differ_is_not_timed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only what the pass itself writes is wrong, and none of its sums."""
    build, (right, wrong) = BLOCK_PASSES[name], (Candidate(tile) for tile in TILES)

    def broken(o: BlockOperands, candidate: Candidate) -> Any:
        kernels = list(build(o, candidate))
        if candidate is wrong:  # another place is written to than the one that is looked at
            first = kernels[0].results[0]
            kernels[0] = Kernel("", kernels[0].launch, (first.clone(), *kernels[0].results[1:]), 0)
        return kernels

    monkeypatch.setitem(BLOCK_PASSES, name, broken)
    o = operands("silu", True)
    rows, dropped = sweep(name, o, block("silu", True), [right, wrong], CPU, rounds=2)
    assert [(row.candidate, row.shape, row.M) for row in rows] == [(str(right), "tiny.mlp", 40)]
    assert "off the default tile's result by nan" in dropped[0].reason
