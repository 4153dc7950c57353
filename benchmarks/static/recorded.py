"""The calls of each competitor on a layer or block, recorded over meta tensors and not run."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from itertools import chain

import torch

from benchmarks.rivals.cases import Case
from benchmarks.rivals.competitors import BLOCK_COMPETITORS, LAYER_COMPETITORS
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
from fastbound.truth.operands import Operands

DTYPE = torch.bfloat16
GPU = Device("sm_90", 132)  # the device whose tiles decide the workspaces
OPERATOR = ("fused", "split", "torch")  # the operator's backends for one layer
LAYER_RIVALS = ("fused", "split", "addmm", "peft_bf16", "peft_fp32")
BLOCK_RIVALS = ("fused", "per_layer", "peft_bf16", "peft_fp32")


def rivals_of(place: Shape | Block) -> tuple[str, ...]:
    """The competitors that are predicted beside the frozen layer or block."""
    return BLOCK_RIVALS if isinstance(place, Block) else LAYER_RIVALS


def blank_operands(
    place: Shape | Block, M: int, device: str = "meta", rank: int = RANK
) -> Operands:
    """Operands without data: on the meta device, or all zeros on another device."""
    o = Case(place, M, str(DTYPE).removeprefix("torch."), rank).operands(torch.device("meta"))
    if device == "meta":
        return o
    return o.changed(lambda name, t: torch.zeros_like(t, device=device))


def calls_of(
    name: str, place: Shape | Block, M: int, rank: int = RANK, device: Device = GPU
) -> Directions:
    """All calls of a forward and a backward in bf16, planned as if on ``device``."""
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
    elif name == "per_layer":  # the frozen block, with other products
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
    competitors = BLOCK_COMPETITORS if isinstance(place, Block) else LAYER_COMPETITORS
    competitor = next(each for each in competitors if each.name == name)
    contender = competitor.build(blank_operands(place, M, rank=rank))
    x = torch.empty(M, K, dtype=DTYPE, device="meta", requires_grad=True)
    with recording(device) as forward:
        y = contender.forward(x)
    with recording(device) as backward:
        torch.autograd.grad(y, (x, *contender.trained), torch.empty_like(y))
    return Directions(forward, backward)


@cache
def predictions(
    name: str, place: Shape | Block, M: int, rank: int = RANK, device: Device = GPU
) -> tuple[Prediction, ...]:
    """The predictions for all calls of a forward and a backward, in order."""
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
    """A competitor's predicted forward plus backward divided by that of the frozen one."""
    found, floor = (
        seconds(predictions(each, place, M, rank, device), ceilings) for each in (name, "frozen")
    )
    return found / floor


def versions() -> str:
    """The versions on which the calls of PEFT and of PyTorch's own operations depend."""
    return f"torch {torch.__version__.split('+')[0]}, PEFT {version('peft')}"
