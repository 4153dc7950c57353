"""The passes that the tuner times compute what the formula says; a tile that does not is out."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

pytest.importorskip("triton", reason="what is timed are Triton's kernels")

from fastbound.kernels.tiles import GemmTile, Tile

from fastbound.dispatch.defaults import default_tiles
from fastbound.dispatch.device import Device
from fastbound.operator.torch_engine import TorchEngine
from fastbound.performance.passes import (
    BLOCK_PASSES,
    LAYER_PASSES,
    PASSES,
    Candidate,
    Pass,
    default_candidate,
    operands_at,
    passes_of,
)
from fastbound.performance.shapes import Block, Shape
from fastbound.performance.tuning import sweep as sweeps
from fastbound.truth.interpreter import poisoned_empty

CPU = torch.device("cpu")
LAYER = Shape("tiny", "up", 72, 80)
BLOCKS = [Block("tiny", 24, 80, "silu", True, False), Block("tiny", 24, 80, "gelu_tanh", False, 0)]
M, RANK, MULTIPROCESSORS = 40, 3, 4
TILES = default_tiles(Device("interpreter", 4), M, 16, torch.float32)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here: see gpu_check"
)


def passes(place: Shape | Block) -> dict[str, Pass]:
    return passes_of(operands_at(place, M, RANK, torch.float32, CPU))


def candidates(name: str) -> list[Candidate]:
    """The default and another, which cuts rows and columns elsewhere."""
    other = GemmTile(32, 32, 32, 4, 2) if name.startswith("gemm") else Tile(16, 32, 4, 1)
    return [default_candidate(name, TILES), Candidate(other)]


def in_fp64(one: Pass) -> tuple[Tensor, ...]:
    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) else value

    return Pass(one.method, tree_map(wide, one.arguments)).run(TorchEngine())


@pytest.mark.parametrize("place", [LAYER, *BLOCKS], ids=["layer", "gated", "plain"])
def test_a_pass_gives_what_the_formula_says(place: Shape | Block) -> None:
    for name, one in passes(place).items():
        if name not in PASSES:
            continue
        for candidate in candidates(name):
            engine = candidate.engine(name, TILES, MULTIPROCESSORS)
            with poisoned_empty():
                made = one.run(engine)
            for value, exact in zip(made, in_fp64(one), strict=True):
                assert value.shape == exact.shape
                assert (value.double() - exact).norm() <= 1e-5 * exact.norm(), (name, candidate)


def test_every_pass_has_a_tile_and_the_bare_gemm_is_the_floor_of_two() -> None:
    layer, block = passes(LAYER), passes(BLOCKS[0])
    assert set(layer) == {"factors", *LAYER_PASSES} and set(block) == set(BLOCK_PASSES)
    floors = {name: one.floor() for name, one in layer.items()}
    assert {name for name, floor in floors.items() if floor is not None} == {
        "gemm forward",
        "gemm dx",
    }
    assert floors["gemm forward"].shape == (M, LAYER.N) and floors["gemm dx"].shape == (M, LAYER.K)


@pytest.mark.parametrize("name", PASSES)
def test_over_meta_tensors_the_same_kernels_are_launched(name: str) -> None:
    place = LAYER if name in LAYER_PASSES else BLOCKS[0]
    meta = passes_of(operands_at(place, M, RANK, torch.float32, torch.device("meta")))
    engine = default_candidate(name, TILES).engine(name, TILES, MULTIPROCESSORS)
    found, real = (some[name].launches(engine) for some in (meta, passes(place)))
    assert [(one.kernel, one.grid, one.constants) for one in found] == [
        (one.kernel, one.grid, one.constants) for one in real
    ]


def sweep(name: str, place: Shape | Block, chosen: list[Candidate]) -> Any:
    o = operands_at(place, M, RANK, torch.float32, CPU)
    return sweeps.sweep(name, o, place, TILES, chosen, CPU, MULTIPROCESSORS, rounds=2)


class Engine:
    """Triton's, but for one method that ends otherwise."""

    def __init__(self, engine: Any, method: str, ends: Any) -> None:
        self._engine, self._method, self._ends = engine, method, ends

    def __getattr__(self, name: str) -> Any:
        made = getattr(self._engine, name)
        return (lambda *given: self._ends(made(*given))) if name == self._method else made


def not_written(made: Any) -> Any:
    first = made[0] if isinstance(made, tuple) else made
    first.view(-1)[0] = float("nan")
    return made


def out_of_memory(made: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")


def fails(made: Any) -> Any:
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("ends", "reason"),
    [(not_written, "differs from PyTorch's result by nan"), (fails, "out of resource")],
)
@pytest.mark.parametrize(
    ("name", "broken"),
    [("thin", 0), ("thin", 1), pytest.param("activate backward", 1, marks=pytest.mark.slow)],
    ids=["the default", "another", "another of a block"],
)
def test_a_tile_that_fails_or_is_wrong_is_dropped_with_the_reason(
    name: str, broken: int, ends: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default too: what is left is timed."""
    place = LAYER if name in LAYER_PASSES else BLOCKS[0]
    chosen = candidates(name)
    original = Candidate.engine

    def engine(candidate: Candidate, *arguments: Any) -> Any:
        made = original(candidate, *arguments)
        method = passes(place)[name].method
        return Engine(made, method, ends) if candidate is chosen[broken] else made

    monkeypatch.setattr(Candidate, "engine", engine)
    rows, dropped = sweep(name, place, chosen)
    assert [(row.candidate, row.shape, row.M) for row in rows] == [
        (str(chosen[1 - broken]), str(place), M)
    ]
    assert (rows[0].over_default is None) is (broken == 0)
    assert [one.candidate for one in dropped] == [str(chosen[broken])]
    assert reason in dropped[0].reason


def test_out_of_memory_ends_the_sweep_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Candidate.engine
    monkeypatch.setattr(
        Candidate, "engine", lambda c, *given: Engine(original(c, *given), "thin", out_of_memory)
    )
    with pytest.raises(torch.OutOfMemoryError):
        sweep("thin", LAYER, candidates("thin"))
