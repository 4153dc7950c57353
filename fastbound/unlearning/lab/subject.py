"""The models of a map: a small one per seed, trained here, or one pretrained model for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from fastbound.errors import InputError
from fastbound.unlearning.data.encoding import padding
from fastbound.unlearning.demo.small_model import LEARNED, SmallModelConfig
from fastbound.unlearning.lab.adapters import targets
from fastbound.unlearning.lab.cell import CellConfig, Rows
from fastbound.unlearning.lab.names import parse_adapter
from fastbound.unlearning.lab.scoring import score_model
from fastbound.unlearning.model import autocast_dtype, check_place, load_pretrained
from fastbound.unlearning.runs.folder import read_json, write_json
from fastbound.unlearning.runs.identity import model_identity


@dataclass(frozen=True)
class Pretrained:
    """A model that knows the rows: a folder made by `save_pretrained`, or an id on the hub."""

    name: str


Subject = SmallModelConfig | Pretrained


def subject_of(held: Mapping[str, Any]) -> Subject:
    """The subject that `dataclasses.asdict` was called on."""
    return Pretrained(**held) if held.keys() == {"name"} else SmallModelConfig(**held)


def folder_of(subject: Subject, output: Path, seed: int) -> Path:
    """The folder for the small model of a seed, or for the scores of the pretrained one."""
    return output / ("model" if isinstance(subject, Pretrained) else f"model-{seed}")


def load(subject: Subject, output: Path, seed: int, config: CellConfig) -> tuple[Any, Any]:
    """The model and tokenizer of a seed, before unlearning."""
    small = str(folder_of(subject, output, seed))
    name = subject.name if isinstance(subject, Pretrained) else small
    return load_pretrained(name, autocast_dtype(config.dtype) or torch.float32)


def look(model: Any, tokenizer: Any, rows: Rows, config: CellConfig, folder: Path) -> None:
    """Score a pretrained model before unlearning, and keep the scores as `LEARNED` in `folder`."""
    scores = score_model(model, rows, config, pad=padding(tokenizer))
    folder.mkdir(exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    write_json(
        folder / LEARNED,
        {
            "parameters": parameters,
            "vocabulary": model.config.get_text_config().vocab_size,
            "weights": model_identity(model)["weights"],
            **scores,
        },
    )


def check_same(model: Any, subject: Pretrained, folder: Path) -> None:
    """Raise `InputError` if the weights are not those that `look` scored."""
    if model_identity(model)["weights"] != read_json(folder / LEARNED)["weights"]:
        raise InputError(
            f"the weights of model {subject.name!r} have changed since its map in {folder.parent} "
            "began: restore them, or give another output folder"
        )


def check_memory(
    subject: Pretrained,
    config: CellConfig,
    workers: int | None,
    processes: int,
    adapters: Sequence[str] = (),
) -> tuple[int, str]:
    """How many processes fit into memory, and a sentence that says so.

    A process holds the weights and, for the largest batch it can meet, the logits, their fp32 copy
    and its gradient; or, with `+fila` before the first step, an fp32 copy of the adapted weights
    if that is larger. With `workers` None, as many of `processes` run as fit.

    Raises:
        InputError: not even one fits, or fewer than `workers` asks for; or one of the `adapters`,
            by name, finds none of its layers in the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_place(subject.name)
    settings = AutoConfig.from_pretrained(subject.name, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    squares = [0]
    for adapter in map(parse_adapter, adapters):
        layers = targets(model, adapter.modules).values()
        if adapter.starts_from_weight:
            squares.append(sum(4 * layer.weight.numel() for layer in layers))
    size = (autocast_dtype(config.dtype) or torch.float32).itemsize
    weights = sum(p.numel() for p in model.parameters()) * size
    vocabulary = settings.get_text_config().vocab_size
    logits = 2 * config.batch_size * config.max_length * vocabulary * (size + 4 + 4)
    rest = max(logits, *squares)
    each, available = weights + rest, psutil.virtual_memory().available
    fitting = available // each
    if fitting < (workers or 1):
        raise InputError(
            f"{workers or 1} processes of about {each / 1e9:.1f} GB each (weights "
            f"{weights / 1e9:.1f}, the rest {rest / 1e9:.1f}) do not fit into the "
            f"{available / 1e9:.1f} GB of available memory: give --workers "
            f"{max(1, fitting)}, a smaller model or --dtype bfloat16"
        )
    count = workers or min(processes, fitting)
    said = f"{count} processes of about {each / 1e9:.1f} GB each; {available / 1e9:.1f} GB are free"
    return count, said
