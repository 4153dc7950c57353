"""The passes of a layer and of an MLP block: each is one call of an engine's method.

A tile is chosen for a whole pass, including its workspaces and the launches that finish it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbound.dispatch.defaults import Tiles, padded_rank
from fastbound.dispatch.plan import Plan
from fastbound.kernels.launch import Launch, recorded
from fastbound.kernels.tiles import GemmTile, Tile
from fastbound.operator.block_ops import ReadyBlock
from fastbound.operator.call import BlockCall
from fastbound.operator.engine import Engine, engine_of
from fastbound.operator.ops import given
from fastbound.operator.torch_engine import TorchEngine
from fastbound.performance.shapes import Block, Shape
from fastbound.truth.operands import (
    BlockOperands,
    LayerOperands,
    block_operands,
    layer_operands,
)

OMEGA = 1.5

# The tile that each pass uses, by its name in `Tiles`.
LAYER_PASSES: Mapping[str, str] = {
    "gemm forward": "gemm",
    "gemm dx": "gemm_t",
    "thin": "thin",
    "reduce dy": "reduce",
    "reduce x": "reduce",
}
BLOCK_PASSES: Mapping[str, str] = {"activate": "activate", "activate backward": "gated"}
PASSES: Mapping[str, str] = {**LAYER_PASSES, **BLOCK_PASSES}


class Pass(NamedTuple):
    """An engine's method and its arguments."""

    method: str
    arguments: tuple[Any, ...]

    def run(self, engine: Engine) -> tuple[Tensor, ...]:
        """The tensors that the pass makes, without the None of projections that are not adapted."""
        made = getattr(engine, self.method)(*self.arguments)
        return tuple(t for t in (made if isinstance(made, tuple) else (made,)) if t is not None)

    def reference(self) -> tuple[Tensor, ...]:
        """The same by PyTorch's operations, which get a copy of the operand they may overwrite."""
        first, *others = self.arguments
        return self._replace(arguments=(first.clone(), *others)).run(TorchEngine())

    def launches(self, engine: Engine) -> list[Launch]:
        """The pass's kernel launches, which are not run; meta tensors will do."""
        with recorded() as found:
            self.run(engine)
        return found

    def floor(self) -> Tensor | None:
        """The bare GEMM of the same operands, or None if the pass has no GEMM."""
        if self.method != "lowrank_gemm":
            return None
        X, W, *_ = self.arguments
        return torch.mm(X, W.t())


@dataclass(frozen=True)
class Candidate:
    """A tile; for a reduction also a factor on its usual number of programs."""

    tile: Tile | GemmTile
    programs: float = 1.0

    def __str__(self) -> str:
        group = getattr(self.tile, "group_m", 8)
        text = str(self.tile) + ("" if group == 8 else f", groups of {group}")
        return text + ("" if self.programs == 1 else f", programs x {self.programs:g}")

    def engine(self, name: str, tiles: Tiles, multiprocessors: int) -> Engine:
        """Triton's engine with this tile for the pass ``name``, and ``tiles`` for the others."""
        chosen: Any = {PASSES[name]: self.tile}
        size = max(1, round(multiprocessors * self.programs))
        return engine_of(Plan("fused", "tuning", replace(tiles, **chosen), size))


def default_candidate(name: str, tiles: Tiles) -> Candidate:
    """The candidate that dispatch would use in this pass."""
    return Candidate(getattr(tiles, PASSES[name]))


def operands_at(
    shape: Shape | Block, M: int, rank: int, dtype: torch.dtype, device: torch.device
) -> LayerOperands | BlockOperands:
    """Operands of a layer or a block, whose adapters' terms are about as large as x Wᵀ.

    On the meta device the tensors are empty.
    """
    K, N = shape.K, shape.N
    settings: dict[str, Any] = {"bias": False, "magnitude": 0.5, "omega": OMEGA, "device": device}
    settings["on_device"] = device.type != "cpu"
    if isinstance(shape, Block):
        scaling = tuple(1 / math.sqrt(rank * width) for width in (K, K, N))
        form: dict[str, Any] = {"gated": shape.gated, "activation": shape.activation}
        return block_operands((M, K), N, (rank,) * 3, dtype, scaling=scaling, **form, **settings)
    return layer_operands((M, K), N, rank, dtype, scaling=1 / math.sqrt(rank * K), **settings)


def passes_of(o: LayerOperands | BlockOperands) -> dict[str, Pass]:
    """The passes by name; a layer's start with the one that makes SA and SB.

    PyTorch computes the tensors that one pass of a call would hand to another, once, here.
    """
    if isinstance(o, BlockOperands):
        return _block_passes(o)
    engine, R = TorchEngine(), padded_rank(o.A.shape[0])
    x, dy, W, A, B, dtype = o.x, o.dy, o.weight, o.A, o.B, o.x.dtype
    SA, SB = engine.factors(A, B, o.scaling, o.omega, dtype, R)
    S, dS = engine.thin(x, SA.t()), engine.thin(dy, SB)
    return {
        "factors": Pass("factors", (A, B, o.scaling, o.omega, dtype, R)),
        "gemm forward": Pass("lowrank_gemm", (x, W, S, SB, None)),
        "gemm dx": Pass("lowrank_gemm", (dy, W.t(), dS, SA.t(), None)),
        "thin": Pass("thin", (x, SA.t())),
        "reduce dy": Pass("thin_and_factor_gradient", (dy, SB, S, B, o.omega, o.scaling)),
        "reduce x": Pass("factor_gradient", (x, dS, A.t(), o.omega, 1.0)),
    }


def _block_passes(o: BlockOperands) -> dict[str, Pass]:
    first, second = (o.up, None) if o.gate is None else (o.gate, o.up)
    block = ReadyBlock(o.x, BlockCall(first, second, o.down, o.activation), TorchEngine())
    gate, up, down, engine = block.gate, block.up, block.down, block.engine
    S = engine.thin(o.x, given(block.stacked_SA()).t())
    G, U = block.preactivations(o.x, S)
    DS = engine.thin(o.dy, given(down.SB))
    DH = block.input_gradient(o.dy, down, DS, down.SA)
    backward = (DH, G, U, S, DS, gate, up, down, o.activation, block.R)
    return {
        "activate": Pass("activate", (G, U, down.SA, o.activation)),
        "activate backward": Pass("activate_backward", backward),
    }
