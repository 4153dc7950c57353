"""One small model learns all rows and then forgets some, with a bounded adapter and with LoRA."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastbound.errors import InputError
from fastbound.figures import QUICK
from fastbound.files import writing
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.rows import Row, check_disjoint
from fastbound.unlearning.demo.small_model import LEARNED, SmallModelConfig, learn
from fastbound.unlearning.evaluation.examples import examples_of, lines_of
from fastbound.unlearning.model import load_pretrained
from fastbound.unlearning.runs.folder import RESULT, check_free, read_json, write_json
from fastbound.unlearning.runs.report import EXAMPLES, Run, write_report
from fastbound.unlearning.training.loop import unlearn

MARKER = "demo.json"
_MODEL = "model"
FACTOR = 10.0  # the second learning rate over the first


@dataclass(frozen=True)
class Demonstration:
    """What is run: each adapter at `config.lr` and at ten times that, from the same model.

    Attributes:
        config: settings of every run, apart from the adapter and the rate.
        small: the small model.
        adapters: which adapters, in the order of the table.
        quick: a shortened demonstration, whose picture says so.
    """

    config: UnlearnConfig
    small: SmallModelConfig = field(default_factory=SmallModelConfig)
    adapters: Sequence[Literal["bounded", "lora"]] = ("bounded", "lora")
    quick: bool = False

    def __post_init__(self) -> None:
        if self.config.lr == "auto":
            raise InputError(
                f"the demonstration runs at a rate and at {FACTOR:g} times that rate: give lr a "
                'number, not "auto"'
            )

    @property
    def rate(self) -> float:
        return float(self.config.lr)

    def runs(self) -> dict[str, UnlearnConfig]:
        """Folder name -> settings."""
        return {
            f"{adapter}-lr{lr:g}": dataclasses.replace(self._config(adapter), lr=lr)
            for lr in (self.rate, FACTOR * self.rate)
            for adapter in self.adapters
        }

    def _config(self, adapter: Literal["bounded", "lora"]) -> UnlearnConfig:
        """For LoRA without what only a bounded adapter has. If omega was given in place of alpha,
        alpha is then None, which is LoRA's own default."""
        if adapter == "bounded":
            return self.config
        return dataclasses.replace(self.config, adapter=adapter, form="factors", omega=None)


def demonstrate(
    forget: Sequence[Row],
    retain: Sequence[Row],
    demonstration: Demonstration,
    output: Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> str:
    """Run it, write `report.json` and `curves.png` to `output`, and return what to print.

    On a CPU it runs on one thread. A resumed demonstration keeps the model and the runs that are
    finished, and continues the one that was interrupted.

    Raises:
        InputError: rows, settings or output folder cannot be used.
        NonFiniteError: a run stopped; the others are kept.
    """
    check_disjoint(forget, retain)
    with writing(output), _one_thread(_device(demonstration.config)):
        return _demonstrate(forget, retain, demonstration, output, resume, progress)


def _demonstrate(
    forget: Sequence[Row],
    retain: Sequence[Row],
    demonstration: Demonstration,
    output: Path,
    resume: bool,
    progress: bool,
) -> str:
    check_free(output, MARKER, resume=resume)
    _begin(output, forget, retain, demonstration)
    learned = _learn([*forget, *retain], demonstration, output / _MODEL, progress)
    runs = []
    for name, each in demonstration.runs().items():
        folder = output / name
        if not ((folder / RESULT).exists() and (folder / EXAMPLES).exists()):
            if progress:
                print(f"{name}:", file=sys.stderr, flush=True)
            model, tokenizer = load_pretrained(str(output / _MODEL))
            result = unlearn(
                model,
                tokenizer,
                forget,
                retain,
                each,
                output=folder,
                resume=(folder / "run.json").exists(),
                progress=progress,
            )
            held = examples_of(result, tokenizer, forget, retain)
            write_json(folder / EXAMPLES, {"examples": held})
        runs.append(Run.read(folder))
    about = {
        "model": {**asdict(demonstration.small), **learned},
        "rows": {"forget": len(forget), "retain": len(retain)},
    }
    fastest = [run for run in runs if run.lr == FACTOR * demonstration.rate]
    told = write_report(
        output,
        runs,
        about=about,
        questions=lines_of({_after(run): run.examples for run in fastest}),
        timed=False,
        quick=demonstration.quick,
    )
    if demonstration.quick:
        told = f"A {QUICK}.\n\n{told}"
    if learned["training_loss"] > demonstration.small.known_loss:
        told = (
            f"The small model had not learned its rows when it stopped after {learned['epochs']} "
            f"epochs (loss {learned['training_loss']:.3f}), so what follows says little.\n\n{told}"
        )
    return told


def _after(run: Run) -> str:
    return f"after, {run.label.partition(',')[0]}"


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU: a model this small gains nothing from a second thread, which waits for a core.

    With two busy neighbours on two cores, two threads take several times as long as one.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _begin(
    output: Path, forget: Sequence[Row], retain: Sequence[Row], demonstration: Demonstration
) -> None:
    identity = {
        "config": demonstration.config.as_dict(),
        "small": asdict(demonstration.small),
        "adapters": list(demonstration.adapters),
        "rows": [[row.question, row.answer] for row in [*forget, *retain]],
    }
    marker = output / MARKER
    if not marker.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(marker, identity)
        return
    held = read_json(marker)
    for name, value in identity.items():
        if held.get(name) != value:
            raise InputError(
                f"{output} holds a demonstration with other {name}: resume with the same "
                "settings and files, or give another output folder"
            )


def _learn(
    rows: Sequence[Row], demonstration: Demonstration, folder: Path, progress: bool
) -> dict[str, Any]:
    """Train the small model into `folder`, unless it is there; returns what that took."""
    if not folder.exists():
        config = demonstration.config
        learned = learn(
            rows,
            demonstration.small,
            max_length=config.max_length,
            template=config.template,
            seed=config.seed,
            device=_device(config),
            progress=progress,
        )
        learned.save(folder)
    return read_json(folder / LEARNED)


def _device(config: UnlearnConfig) -> torch.device:
    """Where the loop would run: on the accelerator, if there is one and it is allowed."""
    from accelerate import Accelerator

    return torch.device(Accelerator(cpu=config.device == "cpu", mixed_precision="no").device)
