"""One case from operands to samples: build the competitors, check, weigh, time all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.block import make_block_problem
from benchmarks.rivals.cases import DTYPES, Block, Case
from benchmarks.rivals.layer import Competitor, Layer, make_problem
from fastbound.performance.memory import peak_bytes, saved_bytes
from fastbound.performance.passes import require_truth
from fastbound.performance.timing import interleaved, stopwatch_for

DIRECTIONS = ("forward", "forward+backward")
WARMUP_ROUNDS = 3  # on a CPU, where a round takes seconds, one: the check warms up once more
CHECKED_ROWS = 256


@dataclass
class Measurement:
    """One competitor on one case: seconds by direction, bytes, the path it took, or its failure."""

    path: str = ""
    saved_bytes: int = 0
    peak_bytes: int | None = None
    failure: Exception | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Inputs:
    """Sets of x and dy to rotate through."""

    x: list[Tensor]
    dy: list[Tensor]

    def __getitem__(self, turn: int) -> tuple[Tensor, Tensor]:
        return self.x[turn % len(self.x)], self.dy[turn % len(self.dy)]


def measure(
    case: Case,
    competitors: Sequence[Competitor],
    device: torch.device,
    *,
    rounds: int,
    directions: Sequence[str] = DIRECTIONS,
) -> dict[str, Measurement]:
    """Run `competitors` on `case`, interleaved, and return what each showed.

    A competitor that fails (out of memory, a wrong result) is left out of the timing and carries
    its error in `failure`; the others go on.
    """
    dtype = DTYPES[case.dtype]
    shape = case.shape
    problem: Any
    if isinstance(shape, Block):
        problem = make_block_problem(shape, case.M, case.rank, dtype, device)
    else:
        problem = make_problem(case.M, shape.K, shape.N, case.rank, dtype, device)
    inputs = _make_inputs(case, dtype, device)
    x, dy = inputs[0]
    truths = problem.truths(x, dy, CHECKED_ROWS)
    results = {competitor.name: Measurement() for competitor in competitors}
    steps: dict[str, Callable[[int], object]] = {}
    for competitor in competitors:
        result = results[competitor.name]
        try:
            layer = competitor.build(problem)
            by_direction = _steps(layer, inputs)
            for step in by_direction.values():  # compiles, fills caches and allocators
                for turn in range(1 if device.type == "cpu" else WARMUP_ROUNDS):
                    step(turn)
            _check(layer, truths[bool(layer.trained)], x, dy)
            result.path = layer.path
            result.saved_bytes = saved_bytes(
                partial(layer.forward, x), parameters=(*problem.frozen, *layer.trained)
            )
            result.peak_bytes = peak_bytes(partial(by_direction["forward+backward"], 0), device)
        except Exception as error:  # raised again by the test of this competitor
            result.failure = error
        else:
            for direction in directions:
                steps[f"{competitor.name} {direction}"] = by_direction[direction]
    del truths
    for key, seconds in interleaved(steps, rounds=rounds, stopwatch=stopwatch_for(device)).items():
        name, direction = key.split(" ")
        results[name].samples[direction] = seconds
    return results


def _steps(layer: Layer, inputs: _Inputs) -> dict[str, Callable[[int], object]]:
    def forward(turn: int) -> Tensor:
        return layer.forward(inputs[turn][0])

    def both(turn: int) -> tuple[Tensor, ...]:
        x, dy = inputs[turn]
        return torch.autograd.grad(layer.forward(x), (x, *layer.trained), dy)

    return {"forward": forward, "forward+backward": both}


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> _Inputs:
    generator = torch.Generator(device).manual_seed(1)
    K = case.shape.K
    N = K if isinstance(case.shape, Block) else case.shape.N  # of dy
    sets = 1
    if device.type == "cuda":
        # x and dy are cold when the sets between two uses of one outweigh the L2 cache twice.
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        sets += -(-2 * l2 // (case.M * (K + N) * dtype.itemsize))

    def normal(width: int) -> Tensor:
        return torch.randn(case.M, width, generator=generator, device=device, dtype=dtype)

    x = [normal(K).requires_grad_() for _ in range(sets)]
    return _Inputs(x, [normal(N) for _ in range(sets)])


def _check(layer: Layer, truth: dict[str, Tensor], x: Tensor, dy: Tensor) -> None:
    """Compare y, dx and the factors' gradients with the truth: a fast wrong result is no result."""
    y = layer.forward(x)
    dx, *factor_gradients = torch.autograd.grad(y, (x, *layer.trained), dy)
    actual = (y.detach()[:CHECKED_ROWS], dx[:CHECKED_ROWS], *factor_gradients)
    for (name, target), value in zip(truth.items(), actual, strict=True):
        require_truth(name, value, target, x.dtype)
