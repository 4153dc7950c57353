"""The grid of cells: it makes the small models once, then runs every unfinished cell on all cores.

lab.json       settings and rows, which `--resume` compares
model-N/       the small model of seed N, trained by the grid itself
model/         a pretrained model's scores before unlearning, in learned.json
cells.jsonl    one line per finished cell, appended
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from fastbound.errors import InputError, StoppedError, count_fields, counted, positive
from fastbound.files import writing
from fastbound.performance.progress import progress as progress_of
from fastbound.unlearning.data.encoding import encode_all, padding
from fastbound.unlearning.data.limits import check_fits
from fastbound.unlearning.data.rows import Row, check_disjoint
from fastbound.unlearning.demo.small_model import LEARNED, SmallModelConfig, learn
from fastbound.unlearning.evaluation.tofu import TofuRow
from fastbound.unlearning.lab.cell import Cell, CellConfig, Rows, with_wrong_answers
from fastbound.unlearning.lab.names import parse_adapter
from fastbound.unlearning.lab.run import run_cell
from fastbound.unlearning.lab.scoring import score_model
from fastbound.unlearning.lab.subject import (
    Pretrained,
    Subject,
    check_memory,
    check_same,
    folder_of,
    load,
    look,
    subject_of,
)
from fastbound.unlearning.runs.folder import check_free, read_json, write_json
from fastbound.unlearning.runs.identity import digest
from fastbound.unlearning.runs.lines import CheckedLines

MARKER = "lab.json"
CELLS = "cells.jsonl"
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
    "product@omega=100",
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# For a pretrained model: bounds in the weights' own unit, run as `fastbound unlearn` does.
PRETRAINED_ADAPTERS = (
    "lora",
    "lora-clip",
    "lora-decay",
    "sine@2*rms",
    "sine@0.1*spectral",
    "sine@0.25*spectral",
    "sine@0.5*spectral",
    "sine@1*spectral",
    "sine@2*spectral",
    "tanh@0.5*spectral",
    "product@0.5*spectral",
    "product@omega=100",
)
PRETRAINED_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PRETRAINED_CELL = CellConfig(steps=80, warmup=0.1, slope=1.0, eval_rows=40)
SMALL = SmallModelConfig(hidden_size=64, intermediate_size=176, vocabulary=1024, lr=4e-3)


@dataclass(frozen=True)
class Grid:
    """What the map covers, and how each cell is run.

    Attributes:
        adapters: as `parse_adapter` reads them, held as `Adapter.name`.
        rates, ranks: those at which every adapter runs.
        seeds: how many; seed 0, 1, ... sets the small model, the factors and the order of rows.
        cell: the settings of every cell.
        model: the small model, or the pretrained one.
    """

    adapters: Sequence[str] = ADAPTERS
    rates: Sequence[float] = RATES
    ranks: Sequence[int] = (8,)
    seeds: int = 5
    cell: CellConfig = field(default_factory=CellConfig)
    model: Subject = SMALL

    def __post_init__(self) -> None:
        names = tuple(parse_adapter(text).name for text in self.adapters)
        object.__setattr__(self, "adapters", names)
        for name, values in (("lr", self.rates), ("rank", self.ranks)):
            if not values:
                raise InputError(f"{name} must have at least one value, got none")
        for rate in self.rates:
            positive("lr", rate)
        object.__setattr__(self, "ranks", tuple(counted("rank", each) for each in self.ranks))
        count_fields(self, ["seeds"])
        keys = [cell.key for cell in self.cells()]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise InputError(f"cell {twice} appears twice: give each adapter, lr and rank once")

    def cells(self) -> list[Cell]:
        """Every cell, seed by seed."""
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
    general: Sequence[TofuRow] = (),
    resume: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run the cells that are not finished yet; returns those of this grid, in its order.

    Adapters, rates, ranks and seeds may differ from those of an earlier run of the folder; rows and
    the settings of cell and model may not.

    Args:
        workers: processes of one thread each; None: one per core, as far as memory allows.
        general: questions that are in neither file, with wrong answers to compare the right one
            with.

    Raises:
        InputError: rows, settings or output folder cannot be used.
        StoppedError: a worker was killed; the finished cells are kept.
    """
    if workers is not None:
        workers = counted("workers", workers)
    check_disjoint(forget, retain)
    if len(retain) < 3:
        raise InputError(f"the truth ratio needs at least 3 retain rows, got {len(retain)}")
    with writing(output):
        check_free(output, MARKER, resume=resume)
        if isinstance(grid.model, Pretrained):
            cores = os.cpu_count() or 1
            workers, said = check_memory(grid.model, grid.cell, workers, cores, grid.adapters)
            if progress:
                print(said, file=sys.stderr)
        _begin(output, forget, retain, general, grid)
        cells = grid.cells()
        finished = read_cells(output)
        left = [cell for cell in cells if cell.key not in finished]
        if left:
            count = min(workers or os.cpu_count() or 1, len(left))
            lines = _lines(output)
            with (
                _workers(count) as pool,
                progress_of(len(left), "mapping", "cell", shown=progress) as bar,
            ):
                _make_models(pool, grid.model, output, sorted({cell.seed for cell in left}), bar)
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

    Raises StoppedError if one of them was killed.
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
            "a worker process was killed, as the system does when memory runs out: --resume "
            f"continues with the rest; fewer --workers than {count} need less memory"
        ) from None


def read_cells(output: Path) -> dict[str, dict[str, Any]]:
    """The finished cells of a folder by key; see `CheckedLines.read` for damaged lines."""
    return {_cell(result).key: result for result in _lines(output).read()}


def read_models(output: Path) -> dict[str, dict[str, Any]]:
    """Each small model's training and its scores before unlearning, by seed, or "all"."""
    return {
        path.parent.name.removeprefix("model").removeprefix("-") or "all": read_json(path)
        for path in sorted(output.glob(f"model*/{LEARNED}"))
    }


def _lines(output: Path) -> CheckedLines:
    return CheckedLines(output / CELLS, digest(read_json(output / MARKER)))


def _cell(result: Mapping[str, Any]) -> Cell:
    return Cell(result["seed"], result["rank"], result["lr"], result["adapter"])


def _begin(
    output: Path,
    forget: Sequence[Row],
    retain: Sequence[Row],
    general: Sequence[TofuRow],
    grid: Grid,
) -> None:
    identity = {
        "cell": asdict(grid.cell),
        "model": asdict(grid.model),
        "forget": [[row.question, row.answer] for row in forget],
        "retain": [[row.question, row.answer] for row in retain],
        "general": [[row.question, row.answer, *row.perturbed] for row in general],
    }
    if not (output / MARKER).exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / MARKER, identity)
        return
    held = {"general": [], **read_json(output / MARKER)}
    if isinstance(held.get("cell"), dict):
        held["cell"] = {**asdict(CellConfig()), **held["cell"]}  # an older map lacks what is new
    for name, value in identity.items():
        if held.get(name) != value:
            raise InputError(
                f"{output} holds a map with other {name}: resume with the same settings and "
                "files, or give another output folder"
            )


def _make_models(
    pool: ProcessPoolExecutor, subject: Subject, output: Path, seeds: Sequence[int], bar: Any
) -> None:
    folders = {folder_of(subject, output, seed): seed for seed in seeds}
    missing = [seed for folder, seed in folders.items() if not (folder / LEARNED).exists()]
    waiting = [pool.submit(_learn, str(output), seed) for seed in missing]
    for done, future in enumerate(as_completed(waiting), start=1):
        future.result()
        bar.set_postfix_str(f"model {done} of {len(missing)} ready")


# What follows runs in a worker process.


def _start_worker() -> None:
    """One thread; the parent handles Ctrl-C, and a worker ends when its parent does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _learn(output: str, seed: int) -> None:
    """Train the small model of this seed into its folder, in one move, or score the given one."""
    held = read_json(Path(output) / MARKER)
    subject, config = subject_of(held["model"]), CellConfig(**held["cell"])
    folder = folder_of(subject, Path(output), seed)
    if isinstance(subject, Pretrained):
        model, tokenizer = load(subject, Path(output), seed, config)
        rows = _encode(held, tokenizer, config)
        everything = [*rows.forget, *rows.retain, *rows.wrong, *chain(*rows.general)]
        check_fits(model, tokenizer, everything)
        look(model, tokenizer, rows, config, folder)
        return
    learned = learn(
        [*_rows(held, "forget"), *_rows(held, "retain")],
        subject,
        max_length=config.max_length,
        seed=seed,
        progress=False,
    )
    rows = _encode(held, learned.tokenizer, config)
    check_fits(learned.model, learned.tokenizer, rows.wrong)
    scores = score_model(learned.model, rows, config, pad=padding(learned.tokenizer))
    learned.save(folder, {"vocabulary": len(learned.tokenizer), **scores})


def _run(output: str, cell: Cell) -> dict[str, Any]:
    held = read_json(Path(output) / MARKER)
    config = CellConfig(**held["cell"])
    subject = subject_of(held["model"])
    model, tokenizer = load(subject, Path(output), cell.seed, config)
    if isinstance(subject, Pretrained):
        check_same(model, subject, folder_of(subject, Path(output), cell.seed))
    return run_cell(model, _encode(held, tokenizer, config), cell, config, pad=padding(tokenizer))


def _rows(held: Mapping[str, Any], side: str) -> list[Row]:
    return [
        Row(question, answer, f"{side}, row {number}")
        for number, (question, answer) in enumerate(held[side], start=1)
    ]


def _encode(held: Mapping[str, Any], tokenizer: Any, config: CellConfig) -> Rows:
    encoded = partial(encode_all, tokenizer=tokenizer, max_length=config.max_length)
    forget, retain = (encoded(_rows(held, side)) for side in ("forget", "retain"))
    general = [
        encoded([Row(question, answer, "general") for answer in answers])
        for question, *answers in held.get("general", ())
    ]
    return Rows(forget, retain, with_wrong_answers(retain), general)
