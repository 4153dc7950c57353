"""The stages of gpu_check that run the library's own tools: the tuner and the profile."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.session import Session
from benchmarks.rivals.cases import SMOKE_BLOCKS, SMOKE_SHAPES, SMOKE_TOKENS
from fastbound.dispatch.device import describe
from fastbound.dispatch.tables import software
from fastbound.performance.prediction import Ceilings, datasheet_of
from fastbound.performance.profiling.profile import (
    Subject,
    describe_mode,
    profile,
    subjects,
    variants,
)
from fastbound.performance.profiling.report import Profile, flatness
from fastbound.performance.shapes import Block, Shape, block_of, linear_shapes, parse_tokens
from fastbound.performance.tuning.bench import DeviceBench
from fastbound.performance.tuning.candidates import Machine, points
from fastbound.performance.tuning.tune import start_table, tune

MODEL, RANK = "llama-3-8b", 16
TUNED_TOKENS = (8192, 1024, 32768)


def tuned(session: Session, deadline: float) -> None:
    """Tune plans for this device; the table goes into the results, not into the user's folder."""
    options, facts = session.options, session.facts
    shapes: list[Shape | Block] = [*linear_shapes(MODEL), block_of(MODEL)]
    if options.tiny:
        shapes = [*SMOKE_SHAPES, *SMOKE_BLOCKS]
    todo = points(shapes, SMOKE_TOKENS[:1] if options.tiny else TUNED_TOKENS, [RANK])
    measured = session.ceilings
    ceilings = datasheet_of(facts.device)
    if measured is not None:
        ceilings = Ceilings(measured.flops, measured.bandwidth)
    described = describe(options.device)
    machine = Machine(described, facts.device, ceilings, software())
    bench = DeviceBench(
        options.device,
        described,
        rounds=3 if options.tiny else 15,
        workers=max(1, options.workers),
        say=session.say,
    )
    store = session.results["tune"] = {"table": None, "failures": [], "not_reached": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        try:
            result = tune(
                todo,
                bench,
                machine,
                start_table(path, machine, resume=False),
                path,
                minutes=max(0.0, deadline - time.monotonic()) / 60,
                step=lambda doing: session.say(f"tune: {doing}"),
            )
        finally:  # an error loses the point that it met, not those before it
            if path.exists():
                store["table"] = json.loads(path.read_text())
    store["failures"] = list(result.failures)
    store["not_reached"] = [str(point) for point in result.not_reached]
    for failure in result.failures:
        session.fail(f"tune: {failure}")


def profiled(session: Session, deadline: float) -> None:
    """Profile the overhead by length, blocks first, until the deadline cuts off further lengths."""
    options = session.options
    model = "gpt-neo-125m" if options.tiny else MODEL
    tokens = SMOKE_TOKENS if options.tiny else parse_tokens("4k:128k")
    store = session.results["profile"] = {"reports": [], "not_reached": []}
    for mode in ("mlp", "linear"):
        for subject in subjects(mode, model):
            report = _one_profile(session, mode, model, subject, tokens, deadline)
            reached = {point.tokens for point in report.points}
            late = [f"{subject.place} at {M} tokens" for M in tokens if M not in reached]
            store["not_reached"] += late
            if report.points:
                store["reports"].append({**asdict(report), "flatness": flatness(report)})
            session.save()
    if store["not_reached"]:
        session.say(f"profile: out of time, {len(store['not_reached'])} lengths were not reached")


def _one_profile(
    session: Session,
    mode: str,
    model: str,
    subject: Subject,
    tokens: Sequence[int],
    deadline: float,
) -> Profile:
    device, dtype = session.options.device, torch.bfloat16
    rounds = 3 if session.options.tiny else 15
    found: list[Any] = []
    forms = None
    for M in tokens:
        if time.monotonic() > deadline:
            break
        session.say(f"profile: {mode}, {subject.place} at {M} tokens")
        forms = forms or variants(subject, RANK, dtype, device)
        measured = profile(subject, forms, [M], device, rounds=rounds)
        for point in measured:
            if point.broken:
                session.fail(f"profile: {point.variant} at {M} tokens: {point.failure}")
        found += measured
    name, versions = session.facts.device, session.facts.versions
    return Profile(
        model, mode, describe_mode(mode), name, "bfloat16", RANK, rounds, versions, found
    )
