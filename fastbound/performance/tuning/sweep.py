"""A sweep of tiles, pass by pass: what does not compile cleanly is dropped before it costs time.

Every candidate of a pass runs once per round, in an order drawn anew each round, with a cold cache;
its results are compared with those of the default tile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from fastbound.performance.block_passes import BlockOperands, kernels_of, operands_at
from fastbound.performance.compilation import TARGETS, Compiled, compile_launch
from fastbound.performance.isolation import Broken, isolated
from fastbound.performance.passes import FLOORS, Candidate, Kernel, Operands, results
from fastbound.performance.shapes import Block, Shape
from fastbound.performance.timing import interleaved, kernel_stopwatch, quartiles

# Largest relative difference from the default tile's result: rounding in another order.
SAME = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-12}
FLOOR = "cuBLAS"


@dataclass(frozen=True)
class Dropped:
    """A candidate that is not timed, and why."""

    name: str
    candidate: str
    reason: str


@dataclass(frozen=True)
class TileRow:
    """One candidate, or the bare GEMM, of one pass at M tokens; seconds."""

    name: str
    shape: str
    M: int
    candidate: str
    is_default: bool
    median: float
    q1: float
    q3: float
    rounds: int
    over_default: float
    over_floor: float | None


CompileTask = tuple[str, Candidate, Shape | Block, int, int, torch.dtype, str]


def fault(task: CompileTask) -> str | None:
    """Why a candidate is not worth device time, found by compiling it; None if nothing is wrong.

    What compiles here is in Triton's cache when the sweep launches it.
    """
    return judged(task)[1]


def judged(task: CompileTask) -> tuple[Compiled | None, str | None]:
    """What the compiler made of a candidate's main kernel, and its fault."""
    name, candidate, shape, M, rank, dtype, target = task
    meta = torch.device("meta")
    o = operands_at(shape, M, rank, dtype, meta, TARGETS[target].multiprocessors)
    try:
        kernel = kernels_of(name, o, candidate)[0]
        compiled = compile_launch(kernel.launch, target)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {lines[-1] if lines else ''}"
    return compiled, _fault(compiled, target)


def _fault(compiled: Compiled, target: str) -> str | None:
    if compiled.spills:
        return f"{compiled.spills} spills"
    if compiled.shared > TARGETS[target].shared_limit:
        return f"{compiled.shared} bytes of shared memory for {TARGETS[target].shared_limit}"
    return None


def compile_check(
    tasks: Sequence[CompileTask], workers: int, deadline: float, say: Callable[[str], None]
) -> list[str | None]:
    """:func:`fault` of each task, in processes of their own; not reached in time is a fault too."""
    found: list[str | None] = ["not compiled in time"] * len(tasks)
    with _compiling():
        compiled = isolated(fault, tasks, workers=workers, deadline=deadline, limit=120)
        for done, (index, result) in enumerate(compiled, 1):
            found[index] = result.message if isinstance(result, Broken) else result
            if done % 25 == 0:
                say(f"tiles: {done} of {len(tasks)} compiled")
    return found


@contextmanager
def _compiling() -> Iterator[None]:
    """For processes started here: kernels are compiled, not interpreted."""
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def sweep(
    name: str,
    o: Operands | BlockOperands,
    shape: Shape | Block,
    chosen: Sequence[Candidate],
    device: torch.device,
    rounds: int,
) -> tuple[list[TileRow], list[Dropped]]:
    """Time ``chosen``, the default first, against one another and against the bare GEMM."""
    passes: dict[str, Sequence[Kernel]] = {}
    dropped: list[Dropped] = []
    truth: tuple[torch.Tensor, ...] = ()
    for candidate in chosen:
        try:
            kernels = kernels_of(name, o, candidate)
            produced = _poisoned_run(kernels)
            if not truth:
                truth = tuple(tensor.clone() for tensor in produced)
            _check(produced, truth)
        except Exception as error:
            if not truth:
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
            dropped.append(Dropped(name, str(candidate), reason))
        else:
            passes[str(candidate)] = kernels
    steps: dict[str, Callable[[int], object]] = {
        key: partial(_run, kernels) for key, kernels in passes.items()
    }
    if isinstance(o, Operands) and name in FLOORS:
        steps[FLOOR] = lambda turn: FLOORS[name](o)
    for step in steps.values():
        step(0)
    stopwatch = kernel_stopwatch(device)
    samples = interleaved(steps, rounds=rounds, stopwatch=stopwatch)
    return _rows(name, shape, o.M, str(chosen[0]), samples), dropped


def _run(kernels: Sequence[Kernel], turn: int = 0) -> None:
    for kernel in kernels:
        kernel.launch.run()


def _poisoned_run(kernels: Sequence[Kernel]) -> tuple[torch.Tensor, ...]:
    for kernel in kernels:
        for tensor in (*kernel.parts, *kernel.results):
            tensor.fill_(float("nan"))
    _run(kernels)
    return results(kernels)


def _check(produced: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
    for got, expected in zip(produced, truth, strict=True):
        error = float((got.float() - expected.float()).norm() / expected.float().norm())
        if not error <= SAME[got.dtype]:
            raise ArithmeticError(f"off the default tile's result by {error:.2e} (relative)")


def _rows(
    name: str, shape: Shape | Block, M: int, default: str, samples: Mapping[str, Sequence[float]]
) -> list[TileRow]:
    """Fastest first."""
    found = {key: quartiles(taken) for key, taken in samples.items()}
    floor = found[FLOOR][1] if FLOOR in found else None
    rows = [
        TileRow(
            name=name,
            shape=str(shape),
            M=M,
            candidate=key,
            is_default=key == default,
            median=median,
            q1=q1,
            q3=q3,
            rounds=len(samples[key]),
            over_default=median / found[default][1],
            over_floor=None if floor is None else median / floor,
        )
        for key, (q1, median, q3) in found.items()
    ]
    return sorted(rows, key=lambda row: row.median)
