"""The steps of gpu_check that measure times: what is measured, and in which order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.session import Session, Step
from benchmarks.report.rows import BenchmarkRow
from benchmarks.rivals.calls import measure_calls
from benchmarks.rivals.cases import (
    DTYPES,
    GPU_TOKENS,
    MODEL_BLOCKS,
    MODEL_SHAPES,
    SMOKE_BLOCKS,
    SMOKE_SHAPES,
    SMOKE_TOKENS,
    Block,
    Case,
    Shape,
)
from benchmarks.rivals.competitors import BLOCK_COMPETITORS, LAYER_COMPETITORS, Competitor
from benchmarks.rivals.measuring import Measurement, described, measure
from fastbound.dispatch.defaults import Tiles
from fastbound.dispatch.device import Device, describe
from fastbound.dispatch.plan import Plan, plan_for, plan_key
from fastbound.dispatch.timing import interleaved, kernel_stopwatch, quartiles
from fastbound.operator.block_ops import block_key
from fastbound.operator.engine import engine_of
from fastbound.performance.passes import LAYER_PASSES, operands_at, passes_of
from fastbound.performance.prediction import prediction_of
from fastbound.performance.tuning.candidates import candidates
from fastbound.performance.tuning.sweep import CompileTask, compile_check, sweep

LEFT_OUT = "compiled"  # compiling every case would take minutes
FIRST_TOKENS = (8192, 1024, 32768)
RANK, DTYPE = 16, "bfloat16"


@dataclass(frozen=True)
class KernelRow:
    """One kernel with a cold cache: seconds, operations, and the least bytes that it must move.

    ``ceiling`` is the least seconds at the measured ceilings, or None if they were not measured.
    """

    kernel: str
    shape: str
    M: int
    median: float
    q1: float
    q3: float
    rounds: int
    flops: int
    nbytes: int
    ceiling: float | None


def benchmark_steps(session: Session) -> list[Step]:
    """Llama-3-8B at three lengths, its kernels, the cost of a call, its MLP, then the rest."""
    tiny = session.options.tiny
    if tiny:
        first = [Case(SMOKE_SHAPES[0], SMOKE_TOKENS[0], DTYPE, rank=4)]
        rest: list[Case] = []
        single = first
        blocks = [Case(SMOKE_BLOCKS[0], SMOKE_TOKENS[0], DTYPE, rank=4)]
    else:
        llama = [shape for shape in MODEL_SHAPES if shape.model == "llama-3-8b"]
        first = [Case(shape, M, DTYPE, RANK) for M in FIRST_TOKENS for shape in llama]
        every = [Case(shape, M, DTYPE, RANK) for M in GPU_TOKENS for shape in MODEL_SHAPES]
        rest = [case for case in every if case not in first]
        single = [Case(llama[0], M, DTYPE, RANK) for M in FIRST_TOKENS]
        block = next(block for block in MODEL_BLOCKS if block.model == "llama-3-8b")
        blocks = [Case(block, M, DTYPE, RANK) for M in FIRST_TOKENS]
    small = Case(MODEL_SHAPES[0], 16, DTYPE, RANK) if not tiny else first[0]
    calls = [small] if tiny else [small, replace(single[0], M=1024)]

    return [
        *(
            (f"layer {case}", partial(_compared, session, case, LAYER_COMPETITORS))
            for case in first
        ),
        *((f"kernels {case}", partial(_kernel_rows, session, case)) for case in single),
        *((f"calls {case}", partial(_call_rows, session, case)) for case in calls),
        *(
            (f"block {case}", partial(_compared, session, case, BLOCK_COMPETITORS))
            for case in blocks
        ),
        *((f"kernels {case}", partial(_kernel_rows, session, case)) for case in blocks),
        *((f"layer {case}", partial(_compared, session, case, LAYER_COMPETITORS)) for case in rest),
    ]


@dataclass(frozen=True)
class Skipped:
    """A competitor that was not measured on a case, with the reason."""

    case: str
    competitor: str
    reason: str


def _compared(
    session: Session, case: Case, competitors: Sequence[Competitor]
) -> Mapping[str, Sequence[Any]]:
    device, dtype = session.options.device, DTYPES[case.dtype]
    named = [c for c in competitors if c.name != LEFT_OUT]
    obstacles = {c.name: c.obstacle(device.type, dtype) for c in named}
    skipped = [Skipped(str(case), name, why) for name, why in obstacles.items() if why]
    running: list[Competitor] = [c for c in named if not obstacles[c.name]]
    rounds = 3 if session.options.tiny else 40 if case.M <= 4096 else 20
    measured = measure(case, running, device, rounds=rounds)
    rows = []
    for name, measurement in measured.items():
        if isinstance(measurement.failure, torch.OutOfMemoryError):
            skipped.append(Skipped(str(case), name, "out of memory"))
        elif measurement.failure is not None:
            error = measurement.failure
            session.fail(f"{name} on {case}: {type(error).__name__}: {error}")
        else:
            rows += list(_rows(case, name, measurement))
    return {"rows": rows, "skipped": skipped}


def _rows(case: Case, name: str, measurement: Measurement) -> Iterator[BenchmarkRow]:
    for direction, seconds in measurement.samples.items():
        q1, median, q3 = quartiles(seconds)
        stats = {"median": median, "q1": q1, "q3": q3, "min": min(seconds), "rounds": len(seconds)}
        yield BenchmarkRow.of(described(case, name, direction, measurement), stats)


def _kernel_rows(session: Session, case: Case) -> Mapping[str, Sequence[Any]]:
    """Time each kernel alone, with the tiles that dispatch chooses, and a layer's bare GEMMs.

    For a block these are its own two passes; its other passes are those of layers.
    """
    device = session.options.device
    tiles, size = _plan(device, case.shape, case.M, case.rank)
    o = operands_at(case.shape, case.M, case.rank, DTYPES[DTYPE], device)
    engine = engine_of(Plan("fused", "the tiles of dispatch", tiles, size))
    work: dict[str, tuple[int, int]] = {}
    steps: dict[str, Callable[[int], object]] = {}
    for name, one in passes_of(o).items():
        for i, launch in enumerate(one.launches(engine)):
            key = name if i == 0 else f"{name}, finish {i}"
            predicted = prediction_of(launch)
            work[key] = (predicted.flops, predicted.nbytes)
            steps[key] = _launcher(launch.run)
        if one.floor() is not None:
            X, W, *_ = one.arguments
            moved = X.element_size() * (X.numel() + W.numel() + X.shape[0] * W.shape[0])
            work[f"{name}, bare"] = (2 * X.numel() * W.shape[0], moved)
            steps[f"{name}, bare"] = _launcher(one.floor)
    for step in steps.values():
        step(0)
    rounds = 3 if session.options.tiny else 20
    samples = interleaved(steps, rounds=rounds, stopwatch=kernel_stopwatch(device))
    rows = []
    for name, seconds in samples.items():
        q1, median, q3 = quartiles(seconds)
        flops, nbytes = work[name]
        least = None if session.ceilings is None else session.ceilings.seconds(flops, nbytes)
        rows.append(
            KernelRow(
                name, str(case.shape), case.M, median, q1, q3, len(seconds), flops, nbytes, least
            )
        )
    return {"kernels": rows}


def _launcher(run: Callable[[], object]) -> Callable[[int], object]:
    return lambda turn: run()


def _call_rows(session: Session, case: Case) -> Mapping[str, Sequence[Any]]:
    rounds = 3 if session.options.tiny else 100
    rows, failures = measure_calls(case, session.options.device, rounds)
    for failure in failures:
        if failure.competitor in ("fused", "split"):
            session.fail(f"{failure.competitor}, {failure.how}: {failure.message}")
    skipped = [Skipped(f.case, f.competitor, f"{f.how}: {f.message}") for f in failures]
    return {"calls": rows, "skipped": skipped}


def tile_steps(session: Session, store: dict[str, Any], deadline: float) -> list[Step]:
    """Compile every candidate, and return one sweep per pass and length."""
    options = session.options
    device, tiny = options.device, options.tiny
    shape = SMOKE_SHAPES[0] if tiny else next(s for s in MODEL_SHAPES if s.model == "llama-3-8b")
    tokens = SMOKE_TOKENS[:1] if tiny else FIRST_TOKENS
    where = "sm_90" if tiny else describe(device)
    tried = {
        (name, M): candidates(name, _plan(device, shape, M, RANK)[0], tiny=tiny)
        for M in tokens
        for name in LAYER_PASSES
    }
    faults = _faults(session, store, where, shape, tried, deadline)

    def step(name: str, M: int) -> Mapping[str, Sequence[Any]]:
        tiles, size = _plan(device, shape, M, RANK)
        o = operands_at(shape, M, RANK, DTYPES[DTYPE], device)
        default, *others = tried[name, M]
        kept = [default, *(c for c in others if faults.get((name, str(c))) is None)]
        rows, dropped = sweep(name, o, shape, tiles, kept, device, size, 3 if tiny else 15)
        return {"rows": rows, "dropped": dropped}

    return [(f"{name} at {M} tokens", partial(step, name, M)) for name, M in tried]


def _faults(
    session: Session,
    store: dict[str, Any],
    where: str | Device,
    shape: Shape,
    tried: Mapping[tuple[str, int], Sequence[Any]],
    deadline: float,
) -> dict[tuple[str, str], str]:
    """Each candidate's fault, found by compiling; a candidate is compiled once for all lengths."""
    tasks: dict[tuple[str, str], CompileTask] = {}
    for (name, M), chosen in tried.items():
        for candidate in chosen:
            task = (name, candidate, shape, M, RANK, DTYPES[DTYPE], where)
            tasks.setdefault((name, str(candidate)), task)
    session.say(f"tiles: compiling {len(tasks)} candidates")
    workers = max(1, session.options.workers)
    half = (time.monotonic() + deadline) / 2  # candidates not compiled by then are left out
    found = compile_check(list(tasks.values()), workers, half, session.say)
    faults = {key: why for key, why in zip(tasks, found, strict=True) if why is not None}
    store["dropped"] += [
        {"name": name, "candidate": candidate, "reason": why}
        for (name, candidate), why in faults.items()
    ]
    session.say(f"tiles: {len(faults)} of {len(tasks)} candidates dropped after compiling")
    return faults


def _plan(device: torch.device, shape: Shape | Block, M: int, rank: int) -> tuple[Tiles, int]:
    sizes = (device, M, shape.N, shape.K)
    if isinstance(shape, Block):
        found = plan_for(block_key(*sizes, (rank,), DTYPES[DTYPE], "fused", shape.form))
    else:
        found = plan_for(plan_key(*sizes, rank, DTYPES[DTYPE], "fused"))
    if found.tiles is None:
        raise ValueError(f"dispatch gives no tiles for {shape} at {M} tokens on {device}")
    return found.tiles, found.multiprocessors
