"""The tuner's bench on a real device: it compiles, launches, checks and times candidates."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fastbound.dispatch.defaults import Tiles, padded_rank
from fastbound.dispatch.device import Device
from fastbound.dispatch.plan import Plan
from fastbound.dispatch.timing import interleaved, kernel_stopwatch
from fastbound.operator import ops
from fastbound.operator.call import Term
from fastbound.operator.engine import Engine, engine_of
from fastbound.operator.ops import given
from fastbound.performance.passes import Candidate, operands_at
from fastbound.performance.shapes import Block
from fastbound.performance.tuning.candidates import Point
from fastbound.performance.tuning.sweep import CompileTask, compile_check, reason_of, sweep
from fastbound.performance.tuning.tune import Timings
from fastbound.truth.exactness import CORRECT, exact, require_truth
from fastbound.truth.operands import BlockOperands, LayerOperands

CHECKED_ROWS = 256  # rows of y and dx that are checked; dA and dB are sums over all rows

_Binary = tuple[str, str, int, str]


class DeviceBench:
    """The :class:`~.tune.Bench` of a device; on a CPU, in the interpreter, times mean nothing.

    ``say`` receives messages about progress and about candidates that are left out.
    """

    def __init__(
        self,
        device: torch.device,
        described: Device,
        dtype: torch.dtype = torch.bfloat16,
        *,
        rounds: int = 15,
        workers: int | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.device, self.described, self.dtype = device, described, dtype
        self.rounds, self.say = rounds, say
        self.workers = min(12, os.cpu_count() or 1) if workers is None else workers
        self._found: dict[_Binary, str | None] = {}
        self._point: Point | None = None
        self._operands: LayerOperands | BlockOperands | None = None

    def faults(
        self, names: Sequence[str], point: Point, chosen: Sequence[Candidate], deadline: float
    ) -> list[str | None]:
        """The fault of each candidate, or None; ``say`` is told of every fault.

        Each binary is compiled once: for aligned shapes it depends on the rank and a block's form,
        but not on the sizes. In the interpreter no candidate has a fault.
        """
        if not self.described.has_matrix_units:
            return [None] * len(chosen)
        tasks: dict[_Binary, CompileTask] = {
            binary: (name, c, point.shape, point.M, point.rank, self.dtype, self.described)
            for c in chosen
            for name in names
            if (binary := _binary(name, c, point)) not in self._found
        }
        found = compile_check(list(tasks.values()), self.workers, deadline, self.say)
        self._found.update(zip(tasks, found, strict=True))
        judged = [self._fault([_binary(name, c, point) for name in names]) for c in chosen]
        for c, fault in zip(chosen, judged, strict=True):
            if fault is not None:
                self.say(f"{point}: {', '.join(names)}: {c} is left out: {fault}")
        return judged

    def _fault(self, binaries: Sequence[_Binary]) -> str | None:
        return next((fault for one in binaries if (fault := self._found[one]) is not None), None)

    def sweep(
        self, name: str, point: Point, chosen: Sequence[Candidate]
    ) -> Mapping[Candidate, float]:
        o, tiles = self._at(point), point.default_tiles(self.described, self.dtype)
        size = self.described.multiprocessors
        rows, dropped = sweep(name, o, point.shape, tiles, chosen, self.device, size, self.rounds)
        for one in dropped:
            self.say(f"{one.name}, {one.candidate}: {one.reason}")
        medians = {row.candidate: row.median for row in rows}
        return {c: medians[str(c)] for c in chosen if str(c) in medians}

    def strategies(self, point: Point, tiles: Tiles) -> Timings:
        o = self._at(point)
        if not isinstance(o, LayerOperands):
            raise TypeError(f"{point}: only layers have strategies, and this is a block")
        truth = exact(o, slice(0, CHECKED_ROWS))
        steps: dict[str, Callable[[int], object]] = {}
        faults: dict[str, str] = {}
        for name in ("fused", "split", "torch"):
            held = None if name == "torch" else tiles
            engine = engine_of(Plan(name, "tuning", held, self.described.multiprocessors))
            step = partial(_forward_and_backward, o, engine)
            try:
                for (result, expected), value in zip(truth.items(), step(), strict=True):
                    part = value if result in o.trained else value[:CHECKED_ROWS]
                    require_truth(result, part, expected, CORRECT[self.dtype])
            except torch.OutOfMemoryError:
                raise  # the operands do not fit: the whole shape is left out
            except Exception as error:  # wrong, or refused by the compiler or the driver
                faults[name] = reason_of(error)
            else:
                steps[name] = step
        del truth
        stopwatch = kernel_stopwatch(self.device)
        return Timings(interleaved(steps, rounds=self.rounds, stopwatch=stopwatch), faults)

    def _at(self, point: Point) -> LayerOperands | BlockOperands:
        if self._operands is None or self._point != point:
            self._operands = None  # freed before the next are made
            self._operands = operands_at(point.shape, point.M, point.rank, self.dtype, self.device)
            self._point = point
        return self._operands


def _binary(name: str, candidate: Candidate, point: Point) -> _Binary:
    form = point.shape.form if isinstance(point.shape, Block) else ""
    return name, str(candidate), padded_rank(point.rank), form


def _forward_and_backward(o: LayerOperands, engine: Engine, turn: int = 0) -> tuple[Tensor, ...]:
    """y, dx, dA and dB, computed by an engine."""
    term = Term(o.A, o.B, o.scaling, o.omega)
    y, S = ops.compute_forward(o.x, o.weight, None, None, *term, engine=engine)
    needs = (o.x.dtype, True, True, True)
    gradients = ops.compute_backward(o.dy, o.x, S, o.weight, *needs, *term, engine=engine)
    return (y, *(given(gradient) for gradient in gradients))
