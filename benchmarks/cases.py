"""What is measured: the MLP projections of four models, and the sizes a CPU can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """One linear layer, weight `[N, K]`, named after its place in a model."""

    model: str
    projection: str
    K: int
    N: int

    def __str__(self) -> str:
        return f"{self.model}.{self.projection}"


@dataclass(frozen=True)
class Case:
    """One shape at M tokens: x `[M, K]`, weight `[N, K]`, A `[rank, K]`, B `[N, rank]`."""

    shape: Shape
    M: int
    dtype: str
    rank: int = 16

    def __str__(self) -> str:
        return f"{self.shape}-{self.M}-{self.dtype}-r{self.rank}"


MODEL_SHAPES = (
    Shape("gpt-neo-125m", "c_fc", 768, 3072),
    Shape("gpt-neo-125m", "c_proj", 3072, 768),
    Shape("phi-1.5", "fc1", 2048, 8192),
    Shape("phi-1.5", "fc2", 8192, 2048),
    Shape("llama-2-7b", "gate_up", 4096, 11008),
    Shape("llama-2-7b", "down", 11008, 4096),
    Shape("llama-3-8b", "gate_up", 4096, 14336),
    Shape("llama-3-8b", "down", 14336, 4096),
)
GPU_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)

CPU_SHAPES = (Shape("gpt-neo-125m", "c_fc", 768, 3072), Shape("1k", "4x", 1024, 4096))
CPU_TOKENS = (2048,)

SMOKE_SHAPES = (Shape("tiny", "up", 64, 192),)
SMOKE_TOKENS = (32, 64)


def cases(device_type: str, *, smoke: bool, tokens: Sequence[int] | None = None) -> list[Case]:
    """The cases for a device, in bf16 and on a CPU in fp32 too, at `tokens` or the default ones."""
    shapes: Sequence[Shape]
    default: Sequence[int]
    if smoke:
        shapes, default = SMOKE_SHAPES, SMOKE_TOKENS
    elif device_type == "cpu":
        shapes, default = CPU_SHAPES, CPU_TOKENS
    else:
        shapes, default = MODEL_SHAPES, GPU_TOKENS
    dtypes = ("bfloat16", "float32") if device_type == "cpu" and not smoke else ("bfloat16",)
    return [
        Case(shape, M, dtype) for shape in shapes for dtype in dtypes for M in tokens or default
    ]
