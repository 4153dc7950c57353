"""What the first call of a shape chooses on this card, and how long the choice takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.session import Session, Step
from benchmarks.rivals.cases import (
    MODEL_BLOCKS,
    MODEL_SHAPES,
    SMOKE_BLOCKS,
    SMOKE_SHAPES,
    Case,
)
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.engine import routes
from fastbound.operator.function import bounded_linear
from fastbound.truth.operands import BlockOperands, run

TOKENS = (8192, 1024, 32768)


@dataclass(frozen=True)
class ChoiceRow:
    """One part of a case: the chosen strategy and the reason that `explain` gives, with the times.

    ``seconds`` is the time of the case's first forward and backward, including compiling and
    measuring.
    """

    case: str
    part: str
    strategy: str
    reason: str
    seconds: float


def choice_steps(session: Session) -> list[Step]:
    """The layers and blocks of all models, at three lengths."""
    if session.options.tiny:
        few, many = SMOKE_SHAPES[0], SMOKE_BLOCKS[0]
        places = [Case(few, 32, "bfloat16", 4), Case(many, 512, "bfloat16", 4)]
    else:
        shapes = (*MODEL_SHAPES, *MODEL_BLOCKS)
        places = [Case(shape, M, "bfloat16", 16) for M in TOKENS for shape in shapes]
    return [(str(case), partial(_choose, session, case)) for case in places]


def _choose(session: Session, case: Case) -> Mapping[str, Sequence[Any]]:
    device = session.options.device
    o = case.operands(device)
    before = set(routes())
    start = time.monotonic()
    run(o, bounded_mlp if isinstance(o, BlockOperands) else bounded_linear)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - start
    # For a block this includes the routes of its layers, if they are tried one by one.
    made = [route for route in routes() if route not in before]
    return {
        "rows": [
            ChoiceRow(str(case), route.key.part, route.plan.strategy, route.plan.reason, seconds)
            for route in made
        ]
    }
