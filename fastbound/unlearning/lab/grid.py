"""The grid of cells: small models made once, then every cell not yet finished, on all cores.

lab.json       settings and rows; what `--resume` compares
model-N/       the small model of seed N, trained by the grid itself
cells.jsonl    one line a finished cell, appended
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from fastbound.errors import InputError, StoppedError
from fastbound.output import writing
from fastbound.unlearning.data.encoding import encode_all, padding
from fastbound.unlearning.data.rows import Row, check_disjoint
from fastbound.unlearning.demo.small_model import LEARNED, SmallModelConfig, learn
from fastbound.unlearning.lab.adapters import parse_adapter
from fastbound.unlearning.lab.cell import (
    Cell,
    CellConfig,
    Rows,
    run_cell,
    score_model,
    with_wrong_answers,
)
from fastbound.unlearning.model import load_pretrained
from fastbound.unlearning.runs.folder import check_free, read_json, write_json
from fastbound.unlearning.runs.identity import digest
from fastbound.unlearning.runs.lines import CheckedLines

MARKER = "lab.json"
CELLS = "cells.jsonl"
_MAX_LENGTH = 256
ADAPTERS = (
    "lora",
    "lora-clamp",
    "lora-clip",
    "sine@alpha",
    "sine@1",
    "sine@4",
    "sine@16",
    "tanh@4",
    "product@4",
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SMALL = SmallModelConfig(hidden_size=64, intermediate_size=176, vocabulary=1024, lr=4e-3)


@dataclass(frozen=True)
class Grid:
    """What the map spans, and how each cell is run.

    Attributes:
        adapters: as `parse_adapter` reads them; the bound is part of the name.
        rates, ranks: of every adapter.
        seeds: 0, 1, ...: of the small model, the factors and the order of rows.
        cell: of every cell.
        model: the small model.
    """

    adapters: Sequence[str] = ADAPTERS
    rates: Sequence[float] = RATES
    ranks: Sequence[int] = (8,)
    seeds: int = 5
    cell: CellConfig = field(default_factory=CellConfig)
    model: SmallModelConfig = SMALL

    def __post_init__(self) -> None:
        for name in self.adapters:
            parse_adapter(name)
        for name, values in (("lr", self.rates), ("rank", self.ranks), ("seeds", [self.seeds])):
            if not values or not all(0 < value < float("inf") for value in values):
                raise InputError(f"{name} must be positive and finite, got {list(values)}")
        keys = [cell.key for cell in self.cells()]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise InputError(f"cell {twice} is there twice: give each adapter, lr and rank once")
        if self.cell.steps < 1:
            raise InputError(f"steps must be >= 1, got {self.cell.steps}")

    def cells(self) -> list[Cell]:
        """Every cell, whole seeds first."""
        return [
            Cell(seed, rank, lr, adapter)
            for seed in range(self.seeds)
            for rank in self.ranks
            for lr in self.rates
            for adapter in self.adapters
        ]


def run_grid(
    forget: Sequence[Row],
    retain: Sequence[Row],
    grid: Grid,
    output: Path,
    *,
    workers: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run what is not finished yet; the finished cells of this grid, in its order.

    Adapters, rates, ranks and seeds may differ from those of an earlier run of the folder; rows and
    the settings of cell and model may not.

    Args:
        workers: processes of one thread each; None: one a core.

    Raises:
        InputError: rows, settings or output folder cannot be used.
        StoppedError: a worker was killed; the finished cells are kept.
    """
    from tqdm.auto import tqdm

    if workers is not None and workers < 1:
        raise InputError(f"workers must be >= 1, got {workers}")
    check_disjoint(forget, retain)
    if len(retain) < 3:
        raise InputError(f"the truth ratio needs at least 3 retain rows, got {len(retain)}")
    with writing(output):
        check_free(output, MARKER, resume=resume)
        _begin(output, forget, retain, grid)
        cells = grid.cells()
        finished = read_cells(output)
        left = [cell for cell in cells if cell.key not in finished]
        if left:
            count = min(workers or os.cpu_count() or 1, len(left))
            lines = _lines(output)
            with (
                _workers(count) as pool,
                tqdm(total=len(left), disable=not progress, unit="cell", dynamic_ncols=True) as bar,
            ):
                _make_models(pool, output, sorted({cell.seed for cell in left}), bar)
                running = [pool.submit(_run, str(output), cell) for cell in left]
                for future in as_completed(running):
                    result = future.result()
                    lines.add(result)
                    finished[_cell(result).key] = result
                    bar.set_postfix_str(f"{result['adapter']} lr {result['lr']:g}")
                    bar.update()
    return [finished[cell.key] for cell in cells]


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this block, and with this process however it ends.

    Raises StoppedError where one of them was killed.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_start_worker)
    try:
        with pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in set(active_children()) - others:
                    worker.kill()
                raise
    except BrokenProcessPool:
        raise StoppedError(
            "a worker process was killed, as the system does where memory runs out: --resume goes "
            f"on with what is left; fewer --workers than {count} take less memory"
        ) from None


def read_cells(output: Path) -> dict[str, dict[str, Any]]:
    """The finished cells of a folder by key; see `CheckedLines.read` for damaged ones."""
    return {_cell(result).key: result for result in _lines(output).read()}


def read_models(output: Path) -> dict[int, dict[str, Any]]:
    """What each small model took to train, and its scores before unlearning, by seed."""
    return {
        int(path.parent.name.removeprefix("model-")): read_json(path)
        for path in sorted(output.glob(f"model-*/{LEARNED}"))
    }


def _lines(output: Path) -> CheckedLines:
    return CheckedLines(output / CELLS, digest(read_json(output / MARKER)))


def _cell(result: Mapping[str, Any]) -> Cell:
    return Cell(result["seed"], result["rank"], result["lr"], result["adapter"])


def _begin(output: Path, forget: Sequence[Row], retain: Sequence[Row], grid: Grid) -> None:
    identity = {
        "cell": asdict(grid.cell),
        "model": asdict(grid.model),
        "forget": [[row.question, row.answer] for row in forget],
        "retain": [[row.question, row.answer] for row in retain],
    }
    if not (output / MARKER).exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / MARKER, identity)
        return
    held = read_json(output / MARKER)
    for name, value in identity.items():
        if held.get(name) != value:
            raise InputError(
                f"{output} holds a map with other {name}: resume with the same settings and "
                "files, or give another output folder"
            )


def _make_models(pool: ProcessPoolExecutor, output: Path, seeds: Sequence[int], bar: Any) -> None:
    missing = [seed for seed in seeds if not (output / f"model-{seed}").exists()]
    waiting = [pool.submit(_learn, str(output), seed) for seed in missing]
    for done, future in enumerate(as_completed(waiting), start=1):
        future.result()
        bar.set_postfix_str(f"model {done} of {len(missing)} learned")


# What follows runs in a worker process.


def _start_worker() -> None:
    """One thread; Ctrl-C is the parent's, and the end of the parent is the end of the worker."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _learn(output: str, seed: int) -> None:
    """Train the small model of this seed into its folder, in one move."""
    held = read_json(Path(output) / MARKER)
    forget, retain = (_rows(held, side) for side in ("forget", "retain"))
    learned = learn(
        [*forget, *retain],
        SmallModelConfig(**held["model"]),
        max_length=_MAX_LENGTH,
        seed=seed,
        progress=False,
    )
    rows = _encode(forget, retain, learned.tokenizer)
    scores = score_model(learned.model, rows, pad=padding(learned.tokenizer))
    about = {"vocabulary": len(learned.tokenizer), **scores}
    learned.save(Path(output) / f"model-{seed}", about)


def _run(output: str, cell: Cell) -> dict[str, Any]:
    config, rows = _prepared(output, cell.seed)
    model, tokenizer = load_pretrained(str(Path(output) / f"model-{cell.seed}"))
    return run_cell(model, rows, cell, config, pad=padding(tokenizer))


@cache
def _prepared(output: str, seed: int) -> tuple[CellConfig, Rows]:
    held = read_json(Path(output) / MARKER)
    _, tokenizer = load_pretrained(str(Path(output) / f"model-{seed}"))
    rows = _encode(_rows(held, "forget"), _rows(held, "retain"), tokenizer)
    return CellConfig(**held["cell"]), rows


def _rows(held: Mapping[str, Any], side: str) -> list[Row]:
    return [
        Row(question, answer, f"{side}, row {number}")
        for number, (question, answer) in enumerate(held[side], start=1)
    ]


def _encode(forget: Sequence[Row], retain: Sequence[Row], tokenizer: Any) -> Rows:
    encoded = (encode_all(each, tokenizer, max_length=_MAX_LENGTH) for each in (forget, retain))
    forgotten, kept = encoded
    return Rows(forgotten, kept, with_wrong_answers(kept))
