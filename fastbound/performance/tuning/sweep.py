"""A sweep of tiles, pass by pass; candidates that do not compile cleanly are dropped beforehand.

Every candidate of a pass runs once per round, in an order drawn anew for each round, with a cold
cache. Its results are compared with those of PyTorch's operations in the same dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from fastbound.dispatch.defaults import Tiles, default_tiles, padded_rank
from fastbound.dispatch.device import Device
from fastbound.dispatch.timing import interleaved, kernel_stopwatch, quartiles
from fastbound.operator.engine import Engine
from fastbound.performance.compilation import compile_launch, faults, target_of
from fastbound.performance.inspection import Compiled
from fastbound.performance.isolation import Broken, isolated
from fastbound.performance.passes import Candidate, Pass, operands_at, passes_of
from fastbound.performance.shapes import Block, Shape
from fastbound.truth.interpreter import poisoned_empty
from fastbound.truth.operands import BlockOperands, LayerOperands

# The largest relative difference from PyTorch's result for the same operands: both round, but in
# different places.
SAME = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-12}
FLOOR = "cuBLAS"


@dataclass(frozen=True)
class Dropped:
    """A candidate that is not timed, with the reason."""

    name: str
    candidate: str
    reason: str


@dataclass(frozen=True)
class TileRow:
    """One candidate of one pass at M tokens, or the bare GEMM; times are in seconds."""

    name: str
    shape: str
    M: int
    candidate: str
    is_default: bool
    median: float
    q1: float
    q3: float
    rounds: int
    over_default: float | None
    over_floor: float | None


CompileTask = tuple[str, Candidate, Shape | Block, int, int, torch.dtype, str | Device]


def fault(task: CompileTask) -> str | None:
    """Why a candidate is not worth device time, found by compiling it; None if nothing is wrong.

    The binary stays in Triton's cache, where the sweep finds it.
    """
    return judged(task)[1]


def judged(task: CompileTask) -> tuple[Compiled | None, str | None]:
    """A candidate's compiled main kernel (None if it failed to compile), and its fault or None."""
    name, candidate, shape, M, rank, dtype, where = task
    o = operands_at(shape, M, rank, dtype, torch.device("meta"))
    device = target_of(where).device
    tiles = default_tiles(device, M, padded_rank(rank), dtype)
    try:
        engine = candidate.engine(name, tiles, device.multiprocessors)
        launch = passes_of(o)[name].launches(engine)[0]
        compiled = compile_launch(launch, where)
    except Exception as error:
        return None, reason_of(error)
    return compiled, "; ".join(faults(launch, compiled, where)) or None


def reason_of(error: Exception) -> str:
    """The error's type and its last line, before which compilers print the kernel."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def compile_check(
    tasks: Sequence[CompileTask], workers: int, deadline: float, say: Callable[[str], None]
) -> list[str | None]:
    """:func:`fault` of each task, in other processes; missing the deadline is a fault too."""
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
    """Let processes started in this context compile kernels instead of interpreting them."""
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def sweep(
    name: str,
    o: LayerOperands | BlockOperands,
    shape: Shape | Block,
    tiles: Tiles,
    chosen: Sequence[Candidate],
    device: torch.device,
    multiprocessors: int,
    rounds: int,
) -> tuple[list[TileRow], list[Dropped]]:
    """Time the candidates ``chosen``, of which the first is the default, and the bare GEMM.

    A candidate that does not run, or whose results differ from those of PyTorch's operations, is
    dropped with the reason; this includes the default. ``tiles`` are those of the other passes.
    """
    work = passes_of(o)[name]
    expected = work.reference()  # not in fp64: copies would not fit beside the operands
    steps: dict[str, Callable[[int], object]] = {}
    dropped: list[Dropped] = []
    for candidate in chosen:
        try:
            engine = candidate.engine(name, tiles, multiprocessors)
            with poisoned_empty():
                _check(work.run(engine), expected, SAME[o.x.dtype])
        except torch.OutOfMemoryError:
            raise  # the operands do not fit, whatever the tile: the whole shape is left out
        except Exception as error:
            dropped.append(Dropped(name, str(candidate), reason_of(error)))
        else:
            steps[str(candidate)] = partial(_run, work, engine)
    if steps and work.floor() is not None:
        steps[FLOOR] = lambda turn: work.floor()
    for step in steps.values():
        step(0)
    samples = interleaved(steps, rounds=rounds, stopwatch=kernel_stopwatch(device))
    return _rows(name, shape, o.x.shape[0], str(chosen[0]), samples), dropped


def _run(work: Pass, engine: Engine, turn: int) -> object:
    return work.run(engine)


def _check(produced: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], same: float) -> None:
    """Compare results; ``same`` is for the operands' dtype, which limits an fp32 gradient too."""
    for got, truth in zip(produced, expected, strict=True):
        error = float((got.float() - truth.float()).norm() / truth.float().norm())
        if not error <= same:  # a NaN fails too
            raise ArithmeticError(f"differs from PyTorch's result by {error:.2e} (relative)")


def _rows(
    name: str, shape: Shape | Block, M: int, default: str, samples: Mapping[str, Sequence[float]]
) -> list[TileRow]:
    """The rows of all candidates, fastest first."""
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
            over_default=median / found[default][1] if default in found else None,
            over_floor=None if floor is None else median / floor,
        )
        for key, (q1, median, q3) in found.items()
    ]
    return sorted(rows, key=lambda row: row.median)
