"""What a call costs the CPU beyond F.linear: `python -m benchmarks.static.call_cost`.

Measures the process time of one eager forward and backward, interleaved, on operands so small that
nothing hides it. Without a GPU the Triton paths run without their launches: the time includes all
the Python before a launch (plan, tensors, arguments, grids) but not Triton's own dispatch. The
empty Function makes as many tensors and does nothing else, a cost that no preparation can avoid. On
a GPU the launches run, and a layer's calls are replayed from a CUDA graph too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any
from unittest import mock

import torch
from fastbound.kernels.launch import Launch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.report.rows import markdown_table
from benchmarks.rivals.calls import measure_calls
from benchmarks.rivals.cases import SMOKE_SHAPES, Case
from benchmarks.static import in_the_interpreter
from fastbound import bounded_linear
from fastbound.dispatch.timing import interleaved

M, K, N, RANK = 16, 64, 96, 16
CALLS = 20  # calls per reading of the clock
FLOOR = "F.linear"
NO_LAUNCH = ", no launch"


class _Empty(torch.autograd.Function):
    """As many arguments as the fused path, as many new tensors of the same sizes, and no work."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, A, B, *_ = arguments
        *_, S, y = [x.new_empty(*size) for size in (A.shape, B.shape, (M, RANK), (M, N))]
        ctx.save_for_backward(x, S, weight, A, B)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, S, _, A, B = ctx.saved_tensors
        for like in (A, B, S, B, S, A):  # SA and SB again, the parts of dS, dB and dA, and dS
            dy.new_empty(*like.shape)
        dx, dA, dB = (torch.empty_like(like) for like in (x, A, B))
        return dx, None, dA, dB, *(None,) * 6


def subjects(device: torch.device) -> dict[str, Callable[[], object]]:
    """One forward and backward of each subject, by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    x, A, B = (draw(*size).requires_grad_() for size in ((M, K), (RANK, K), (N, RANK)))
    weight, dy = draw(N, K), draw(M, N)

    def floor() -> object:
        return torch.autograd.grad(linear(x, weight), (x,), dy)

    def empty() -> object:
        y = _Empty.apply(x, weight, A, B, None, 0.1, 1.0, "fused", None, 0.0)
        return torch.autograd.grad(y, (x, A, B), dy)

    def adapted(backend: str) -> object:
        y = bounded_linear(x, weight, A, B, scaling=0.1, backend=backend)
        return torch.autograd.grad(y, (x, A, B), dy)

    mark = "" if device.type == "cuda" else NO_LAUNCH
    found: dict[str, Callable[[], object]] = {FLOOR: floor, "empty Function": empty}
    found["torch"] = lambda: adapted("torch")
    for backend in ("split", "fused"):
        found[backend + mark] = lambda backend=backend: adapted(backend)  # type: ignore[misc]
    return found


@contextmanager
def no_launches() -> Iterator[None]:
    """Prepare every launch but run none of them; results mean nothing."""
    with mock.patch.object(Launch, "run", lambda launch: None):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, since process time is the sum over all threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(device: torch.device, rounds: int) -> dict[str, float]:
    """The median of each subject's process time, in seconds per call, on one thread."""
    steps = subjects(device)
    with one_thread(), nullcontext() if device.type == "cuda" else no_launches():
        for step in steps.values():
            for _ in range(CALLS):
                step()
        repeated = {name: _several(step) for name, step in steps.items()}
        samples = interleaved(repeated, rounds=rounds, stopwatch=_process_seconds)
    return {name: median(seconds) / CALLS for name, seconds in samples.items()}


def _several(step: Callable[[], object]) -> Callable[[int], object]:
    def calls(turn: int) -> None:
        for _ in range(CALLS):
            step()

    return calls


def _process_seconds(step: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # start from an empty queue, so that no launch waits
    start = time.process_time()
    step()
    return time.process_time() - start


def table(found: dict[str, float]) -> str:
    """µs per call, µs beyond the floor, and the ratio to the floor."""
    floor = found[FLOOR]
    lines = [
        [name, f"{1e6 * s:.0f}", f"{1e6 * (s - floor):.0f}", f"{s / floor:.2f}"]
        for name, s in found.items()
    ]
    return markdown_table(["forward + backward", "µs", "beyond", "ratio"], lines)


def replay_table(rounds: int) -> str:
    """On a GPU, the host time of the eager calls and the time to replay them as a CUDA graph."""
    case = Case(SMOKE_SHAPES[0], M, "bfloat16", RANK)
    rows, failures = measure_calls(case, torch.device("cuda"), rounds)
    lines = [[row.competitor, row.how, f"{1e6 * row.median:.0f}"] for row in rows]
    lines += [[failure.competitor, failure.how, failure.message] for failure in failures]
    return markdown_table([str(case), "", "µs"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.call_cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {options.rounds}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"CPU time of a call on {device.type}, M={M}, K={K}, N={N}, r={RANK}, fp32:\n")
    print(table(measure(device, options.rounds)))
    if device.type == "cuda":
        print("\n" + replay_table(options.rounds))
    else:
        print(
            f'\n"{NO_LAUNCH.removeprefix(", ")}": all of the call except the launches themselves.'
        )
    return 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        in_the_interpreter()  # otherwise the plan for a CPU would have no tiles
    sys.exit(main())
