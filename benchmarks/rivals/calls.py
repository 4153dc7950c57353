"""The host's cost of a call, and what remains of it in a CUDA graph.

For the forward and backward of one layer it measures the host's time until the call returns,
starting from an idle device, and the time to replay the same work as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.rivals.cases import Case
from benchmarks.rivals.competitors import LAYER_COMPETITORS, Contender
from benchmarks.rivals.measuring import forward_and_backward
from fastbound.dispatch.timing import host_seconds, interleaved, quartiles, stopwatch_for

TAKING_PART = ("frozen", "fused", "split", "addmm", "peft_bf16")


@dataclass(frozen=True)
class CallRow:
    """One competitor's times in seconds; ``how`` is "host" or "graph replay"."""

    case: str
    competitor: str
    how: str
    median: float
    q1: float
    q3: float
    rounds: int


@dataclass(frozen=True)
class CallFailure:
    """A competitor that could not be captured or run, and why."""

    case: str
    competitor: str
    how: str
    message: str


def measure_calls(
    case: Case, device: torch.device, rounds: int
) -> tuple[list[CallRow], list[CallFailure]]:
    """Time one forward+backward of every competitor, eager on the host's clock and as a graph."""
    o = case.operands(device)
    x = o.leaves().x
    eager: dict[str, Callable[[int], object]] = {}
    replays: dict[str, Callable[[int], object]] = {}
    failures: list[CallFailure] = []
    for competitor in LAYER_COMPETITORS:
        if competitor.name not in TAKING_PART or competitor.obstacle(device.type, x.dtype):
            continue

        def failed(how: str, error: Exception, name: str = competitor.name) -> None:
            message = f"{type(error).__name__}: {error}"
            failures.append(CallFailure(str(case), name, how, message))

        try:
            contender = competitor.build(o)

            def step(turn: int, contender: Contender = contender) -> object:
                return forward_and_backward(contender, x, o.dy)

            for turn in range(3):
                step(turn)
        except Exception as error:
            failed("host", error)
            continue
        eager[competitor.name] = step
        if device.type == "cuda":
            try:
                replays[competitor.name] = _captured(step)
            except Exception as error:
                failed("graph replay", error)
    on_host = partial(_host_seconds, device)
    rows = _rows(case, "host", interleaved(eager, rounds=rounds, stopwatch=on_host))
    if replays:
        samples = interleaved(replays, rounds=rounds, stopwatch=stopwatch_for(device))
        rows += _rows(case, "graph replay", samples)
    return rows, failures


def _captured(step: Callable[[int], object]) -> Callable[[int], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for turn in range(3):
            step(turn)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step(0)

    def replay(turn: int, kept: object = kept) -> None:
        graph.replay()

    replay(0)
    torch.cuda.synchronize()
    return replay


def _host_seconds(device: torch.device, step: Callable[[], object]) -> float:
    """The host's seconds, starting from an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return host_seconds(step)


def _rows(case: Case, how: str, samples: dict[str, list[float]]) -> list[CallRow]:
    rows = []
    for name, seconds in samples.items():
        q1, median, q3 = quartiles(seconds)
        rows.append(CallRow(str(case), name, how, median, q1, q3, len(seconds)))
    return rows
