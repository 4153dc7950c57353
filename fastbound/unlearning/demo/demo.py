"""The whole story on one small model: it learns the rows, then forgets some, bounded and not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastbound.errors import InputError
from fastbound.files import writing
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import encode_all, padding
from fastbound.unlearning.data.rows import Row, check_disjoint
from fastbound.unlearning.demo.cost import compare_cost
from fastbound.unlearning.demo.small_model import LEARNED, SmallModelConfig, learn
from fastbound.unlearning.evaluation.examples import examples_of, lines_of
from fastbound.unlearning.model import load_pretrained
from fastbound.unlearning.runs.folder import RESULT, check_free, read_json, write_json
from fastbound.unlearning.runs.report import EXAMPLES, Run, write_report
from fastbound.unlearning.training.loop import unlearn

MARKER = "demo.json"
_MODEL = "model"
FACTOR = 10.0  # the second learning rate is so many times the first


@dataclass(frozen=True)
class Demonstration:
    """What is run: each adapter at `config.lr` and at ten times that, from the same model.

    Attributes:
        config: of every run but for adapter and rate.
        small: the small model.
        adapters: which adapters, in the order of the table.
        cost_steps: steps timed for the comparison with PEFT's layer.
    """

    config: UnlearnConfig
    small: SmallModelConfig = field(default_factory=SmallModelConfig)
    adapters: Sequence[Literal["bounded", "lora"]] = ("bounded", "lora")
    cost_steps: int = 15

    @property
    def rate(self) -> float:
        if self.config.lr == "auto":
            raise InputError(
                f"the demonstration runs at a rate and at {FACTOR:g} times that rate: give lr a "
                'number, not "auto"'
            )
        return self.config.lr

    def runs(self) -> dict[str, UnlearnConfig]:
        """Folder name -> settings."""
        return {
            f"{adapter}-lr{lr:g}": dataclasses.replace(self._config(adapter), lr=lr)
            for lr in (self.rate, FACTOR * self.rate)
            for adapter in self.adapters
        }

    def _config(self, adapter: Literal["bounded", "lora"]) -> UnlearnConfig:
        """LoRA's without what only a bounded adapter has; alpha is then None, LoRA's own default,
        where omega was given in its place."""
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
    """Run it, write `report.json` and `curves.png` to `output`, and return the table.

    A resumed demonstration keeps the model and the runs that are finished, and goes on with the
    one that was interrupted.

    Raises:
        InputError: rows, settings or output folder cannot be used.
        NonFiniteError: a run stopped; the others are kept.
    """
    check_disjoint(forget, retain)
    with writing(output):
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
    config = demonstration.config
    learned = _learn([*forget, *retain], demonstration, output / _MODEL, progress)
    runs = []
    for name, each in demonstration.runs().items():
        folder = output / name
        if not (folder / RESULT).exists():
            if progress:
                print(f"{name}:", flush=True)
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
    model, tokenizer = load_pretrained(str(output / _MODEL))
    model.to(_device(config))
    encoded = {
        side: encode_all(rows, tokenizer, max_length=config.max_length, template=config.template)
        for side, rows in (("forget", forget), ("retain", retain))
    }
    cost = compare_cost(
        model,
        encoded["forget"],
        encoded["retain"],
        padding(tokenizer),
        config,
        steps=demonstration.cost_steps,
    )
    about = {
        "model": {**asdict(demonstration.small), **learned},
        "rows": {"forget": len(forget), "retain": len(retain)},
    }
    table = write_report(output, runs, about=about, cost=cost)
    table += "\n".join(["", *lines_of(runs[0].examples)])
    if learned["training_loss"] > demonstration.small.known_loss:
        table += (
            f"\n\nThe small model had not learned its rows when it stopped after "
            f"{learned['epochs']} epochs (loss {learned['training_loss']:.3f})."
        )
    return table


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
    """Train the small model into `folder`, in one move, unless it is there; what it took."""
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
    """Where the loop would run: on the accelerator if there is one and it is not refused."""
    from accelerate import Accelerator

    return torch.device(Accelerator(cpu=config.device == "cpu", mixed_precision="no").device)
