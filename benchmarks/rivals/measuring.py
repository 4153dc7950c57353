"""Measure a case: build the competitors, check their results, count bytes, time all together."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.cases import Case
from benchmarks.rivals.competitors import Competitor, Contender
from fastbound.dispatch.timing import interleaved, stopwatch_for
from fastbound.performance.memory import peak_bytes, saved_bytes
from fastbound.truth.exactness import CORRECT, exact, require_truth
from fastbound.truth.operands import Operands, drawing

DIRECTIONS = ("forward", "forward+backward")
WARMUP_ROUNDS = 3  # one on a CPU, where a round takes seconds; the check is another one
CHECKED_ROWS = 256


@dataclass
class Measurement:
    """A competitor on a case: seconds by direction, bytes, and the path it took, or its failure."""

    path: str = ""
    saved_bytes: int = 0
    peak_bytes: int | None = None
    failure: Exception | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)


def measure(
    case: Case,
    competitors: Sequence[Competitor],
    device: torch.device,
    *,
    rounds: int,
    directions: Sequence[str] = DIRECTIONS,
) -> dict[str, Measurement]:
    """Run `competitors` on `case`, interleaved, and return each one's measurement.

    A competitor that fails (out of memory, a wrong result) is left out of the timing, with its
    error in `failure`; the others are still measured.
    """
    o = case.operands(device)
    inputs = _inputs(o)
    truth_of = cache(partial(_truth, o))
    results = {competitor.name: Measurement() for competitor in competitors}
    steps: dict[str, Callable[[int], object]] = {}
    for competitor in competitors:
        result = results[competitor.name]
        try:
            by_direction = _prepared(competitor, o, inputs, truth_of, result)
        except Exception as error:  # raised again by the test of this competitor
            result.failure = _without_frames(error)
        else:
            for direction in directions:
                steps[f"{competitor.name} {direction}"] = by_direction[direction]
    truth_of.cache_clear()
    for key, seconds in interleaved(steps, rounds=rounds, stopwatch=stopwatch_for(device)).items():
        name, direction = key.split(" ")
        results[name].samples[direction] = seconds
    return results


def _prepared(
    competitor: Competitor,
    o: Operands,
    inputs: Sequence[tuple[Tensor, Tensor]],
    truth_of: Callable[[str | None], dict[str, Tensor]],
    result: Measurement,
) -> dict[str, Callable[[int], object]]:
    """The steps to time, by direction; all else about the competitor is in `result` then."""
    device = o.x.device
    contender = competitor.build(o)
    by_direction = _steps(contender, inputs)
    for step in by_direction.values():  # compiles, fills caches and allocators
        for turn in range(1 if device.type == "cpu" else WARMUP_ROUNDS):
            step(turn)
    _check(contender, o, truth_of(contender.form))
    result.path = contender.path()
    result.saved_bytes = saved_bytes(
        partial(contender.forward, inputs[0][0]), (*o.frozen, *contender.trained)
    )
    result.peak_bytes = peak_bytes(partial(by_direction["forward+backward"], 0), device)
    return by_direction


def _without_frames(error: Exception) -> Exception:
    """The error, with its traceback as the text of its cause.

    The frames themselves would keep a competitor's tensors while the others are measured.
    """
    lines = traceback.format_exception(error)
    error.__cause__ = RuntimeError("".join(lines))
    error.__context__ = None
    return error.with_traceback(None)


def described(
    case: Case, competitor: str, direction: str, measurement: Measurement
) -> dict[str, Any]:
    """A benchmark's row without its statistics."""
    return {
        **asdict(case.shape),
        "M": case.M,
        "rank": case.rank,
        "dtype": case.dtype,
        "direction": direction,
        "competitor": competitor,
        "path": measurement.path,
        "saved_bytes": measurement.saved_bytes,
        "peak_bytes": measurement.peak_bytes,
    }


def _steps(
    contender: Contender, inputs: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Callable[[int], object]]:
    def forward(turn: int) -> Tensor:
        return contender.forward(inputs[turn % len(inputs)][0])

    def both(turn: int) -> tuple[Tensor, ...]:
        return forward_and_backward(contender, *inputs[turn % len(inputs)])

    return {"forward": forward, "forward+backward": both}


def forward_and_backward(contender: Contender, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """dx and the gradients of what the contender trains."""
    return torch.autograd.grad(contender.forward(x), (x, *contender.trained), dy)


def _inputs(o: Operands) -> list[tuple[Tensor, Tensor]]:
    """Pairs of x and dy to rotate through; on a GPU enough of them that each is cold when used."""
    sets, device = 1, o.x.device
    if device.type == "cuda":
        # Between two uses of a pair, the others fill the L2 cache twice.
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        sets += -(-2 * l2 // (o.x.nbytes + o.dy.nbytes))
    draw = drawing(o.x.dtype, device=device, seed=1, on_device=True)
    further = [(draw(*o.x.shape), draw(*o.dy.shape)) for _ in range(sets - 1)]
    return [(x.detach().requires_grad_(), dy) for x, dy in ((o.x, o.dy), *further)]


def _truth(o: Operands, form: str | None) -> dict[str, Tensor]:
    """The truth of an adapter of the given form; for None, that of the bare weight."""
    checked = slice(0, CHECKED_ROWS)
    if form is None:
        return exact(o.rows(checked).changed(lambda name, t: t, scaling=0.0), checked)
    return exact(o.changed(lambda name, t: t, form=form), checked)


def _check(contender: Contender, o: Operands, truth: dict[str, Tensor]) -> None:
    """Compare y, dx and the factors' gradients with the truth: a fast wrong result is worthless."""
    x = o.leaves().x
    y = contender.forward(x)
    dx, *gradients = torch.autograd.grad(y, (x, *contender.trained), o.dy)
    adapted = contender.form is not None  # else a gradient is the whole weight's
    named = dict(zip(o.trained, gradients, strict=True)) if adapted else {}
    found = {"y": y.detach()[:CHECKED_ROWS], "dx": dx[:CHECKED_ROWS], **named}
    for name, value in found.items():
        require_truth(name, value, truth[name], CORRECT[x.dtype])
