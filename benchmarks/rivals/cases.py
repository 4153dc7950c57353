"""The cases: MLP projections and whole MLP blocks of four models, and sizes that suit a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastbound.performance.shapes import MODEL_BLOCKS, MODEL_SHAPES, Block, Shape
from fastbound.truth.operands import Operands, block_operands, layer_operands

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A shape at M tokens: x is `[M, K]`, and adapters have `rank` and `form`."""

    shape: Shape | Block
    M: int
    dtype: str
    rank: int = 16
    form: str = "factors"

    def __str__(self) -> str:
        return f"{self.shape}-{self.M}-{self.dtype}-r{self.rank}"

    def operands(self, device: torch.device) -> Operands:
        """Random operands with y of unit variance, and terms of adapters about as large as x Wᵀ."""
        shape, rank = self.shape, self.rank
        x, N, dtype = (self.M, shape.K), shape.N, DTYPES[self.dtype]
        common: Any = {"magnitude": 0.5, "omega": 1.5, "form": self.form}
        common |= {"device": device, "on_device": True}
        if not isinstance(shape, Block):
            scaling = ((1 if self.form == "product" else rank) * shape.K) ** -0.5
            return layer_operands(x, N, rank, dtype, bias=False, scaling=scaling, **common)
        common |= {"gated": shape.gated, "bias": shape.bias, "activation": shape.activation}
        scalings = [(rank * K) ** -0.5 for K in (shape.K, shape.K, N)]
        return block_operands(x, N, (rank, rank, rank), dtype, scaling=scalings, **common)


GPU_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)

CPU_SHAPES = (Shape("gpt-neo-125m", "c_fc", 768, 3072), Shape("1k", "4x", 1024, 4096))
CPU_TOKENS = (2048,)

SMOKE_SHAPES = (Shape("tiny", "up", 64, 192),)
SMOKE_TOKENS = (32, 64)

LLAMA_1K = Block("llama-1k", 1024, 2816, "silu", gated=True, bias=False)
CPU_BLOCKS = (LLAMA_1K, MODEL_BLOCKS[0])
SMOKE_BLOCKS = (
    Block("tiny-gated", 64, 160, "silu", gated=True, bias=False),
    Block("tiny-plain", 64, 160, "gelu_tanh", gated=False, bias=True),
)


def layer_cases(
    device_type: str, *, smoke: bool, tokens: Sequence[int] | None = None
) -> list[Case]:
    """The linear layers for a device, at `tokens` or by default; bf16, and on a CPU fp32 too."""
    shapes = SMOKE_SHAPES if smoke else CPU_SHAPES if device_type == "cpu" else MODEL_SHAPES
    return _at_sizes(shapes, device_type, smoke, tokens)


def product_cases(
    device_type: str, *, smoke: bool, tokens: Sequence[int] | None = None
) -> list[Case]:
    """The linear layers with adapters of the form "product", which their names mention."""
    return [
        replace(case, form="product", shape=_named(case.shape, "product form"))
        for case in layer_cases(device_type, smoke=smoke, tokens=tokens)
    ]


def _named(shape: Shape | Block, what: str) -> Shape | Block:
    if isinstance(shape, Block):
        raise TypeError(f"{shape} is a block, but the {what} is measured on layers")
    return replace(shape, projection=f"{shape.projection} {what}")


def block_cases(
    device_type: str, *, smoke: bool, tokens: Sequence[int] | None = None
) -> list[Case]:
    """The MLP blocks for a device, as in :func:`layer_cases`."""
    blocks = SMOKE_BLOCKS if smoke else CPU_BLOCKS if device_type == "cpu" else MODEL_BLOCKS
    # One size per block is enough to see that it runs, as torch.compile takes seconds each time.
    return _at_sizes(blocks, device_type, smoke, tokens or (SMOKE_TOKENS[:1] if smoke else None))


def _at_sizes(
    shapes: Sequence[Shape | Block], device_type: str, smoke: bool, tokens: Sequence[int] | None
) -> list[Case]:
    on_cpu = device_type == "cpu"
    default = SMOKE_TOKENS if smoke else CPU_TOKENS if on_cpu else GPU_TOKENS
    dtypes = ("bfloat16", "float32") if on_cpu and not smoke else ("bfloat16",)
    return [
        Case(shape, M, dtype) for shape in shapes for dtype in dtypes for M in tokens or default
    ]
