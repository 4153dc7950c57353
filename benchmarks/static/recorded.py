"""What each competitor calls on one layer or block, recorded over meta tensors: nothing is run."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from itertools import chain

import torch
from torch import Tensor

from benchmarks.rivals.block import MLP_COMPETITORS, BlockProblem
from benchmarks.rivals.layer import COMPETITORS, Problem
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import (
    PRODUCTS,
    RANK,
    Ceilings,
    Prediction,
    prediction_of,
    seconds,
)
from fastbound.performance.recorder import (
    Directions,
    Operation,
    block_calls,
    layer_calls,
    recording,
)
from fastbound.performance.shapes import Block, Shape
from fastbound.truth.formula import Projection

DTYPE = torch.bfloat16
GPU = Device("sm_90", 132)  # whose tiles the workspaces are for
OPERATOR = ("fused", "split", "torch")  # the operator's backends for one layer
LAYER_RIVALS = ("fused", "split", "addmm", "peft_bf16", "peft_fp32")
BLOCK_RIVALS = ("fused", "per_layer", "peft_bf16", "peft_fp32")


def rivals_of(place: Shape | Block) -> tuple[str, ...]:
    """Who is predicted beside the frozen layer or block."""
    return BLOCK_RIVALS if isinstance(place, Block) else LAYER_RIVALS


def blank_problem(
    place: Shape | Block, M: int, device: str = "meta", rank: int = RANK
) -> Problem | BlockProblem:
    """The operands of a place as a competitor takes them; all zeros, where they have memory."""

    def zeros(*size: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.zeros(*size, dtype=dtype, device=device)

    def factors(N: int, K: int) -> tuple[Tensor, Tensor]:
        return zeros(rank, K, dtype=torch.float32), zeros(N, rank, dtype=torch.float32)

    def projection(N: int, K: int) -> Projection:
        return Projection(zeros(N, K), zeros(N) if bias else None, *factors(N, K))

    N, K = place.N, place.K
    if isinstance(place, Shape):
        return Problem(M, zeros(N, K), *factors(N, K), 1.0, 1.0)
    bias, first = place.bias, ("gate", "up") if place.gated else ("up",)
    projections = {name: projection(N, K) for name in first} | {"down": projection(K, N)}
    return BlockProblem(M, place.activation, projections)


def calls_of(
    name: str, place: Shape | Block, M: int, rank: int = RANK, device: Device = GPU
) -> Directions:
    """Everything that a forward and a backward call in bf16, planned as on ``device``."""
    N, K = place.N, place.K
    if isinstance(place, Shape):
        if name in OPERATOR:
            return layer_calls(device, M, N, K, rank, DTYPE, backend=name)
    elif name == "fused":
        return block_calls(
            device,
            M,
            N,
            K,
            [rank] * (2 + place.gated),
            DTYPE,
            activation=place.activation,
            gated=place.gated,
            bias=place.bias,
            backend=name,
        )
    elif name == "per_layer":  # the frozen block, but for its products
        wide, narrow = (
            layer_calls(device, M, *size, rank, DTYPE, backend="fused", bias=place.bias)
            for size in ((N, K), (K, N))
        )
        layers = [wide] * (1 + place.gated) + [narrow]
        between = (
            [call for call in calls if isinstance(call, Operation) and call.name not in PRODUCTS]
            for calls in calls_of("frozen", place, M, rank, device)
        )
        return Directions(*(list(chain(*calls)) for calls in zip(between, *layers, strict=True)))
    competitors = MLP_COMPETITORS if isinstance(place, Block) else COMPETITORS
    competitor = next(each for each in competitors if each.name == name)
    layer = competitor.build(blank_problem(place, M, rank=rank))
    x = torch.empty(M, K, dtype=DTYPE, device="meta", requires_grad=True)
    with recording(device) as forward:
        y = layer.forward(x)
    with recording(device) as backward:
        torch.autograd.grad(y, (x, *layer.trained), torch.empty_like(y))
    return Directions(forward, backward)


@cache
def predictions(
    name: str, place: Shape | Block, M: int, rank: int = RANK, device: Device = GPU
) -> tuple[Prediction, ...]:
    """Of every call of a forward and a backward, in order."""
    forward, backward = calls_of(name, place, M, rank, device)
    return tuple(map(prediction_of, (*forward, *backward)))


def ratio(
    name: str,
    place: Shape | Block,
    M: int,
    ceilings: Ceilings,
    rank: int = RANK,
    device: Device = GPU,
) -> float:
    """Predicted forward plus backward of a competitor over that of the frozen layer or block."""
    found, floor = (
        seconds(predictions(each, place, M, rank, device), ceilings) for each in (name, "frozen")
    )
    return found / floor


def versions() -> str:
    """What the calls of PEFT and of PyTorch's own operations depend on."""
    return f"torch {torch.__version__.split('+')[0]}, PEFT {version('peft')}"
