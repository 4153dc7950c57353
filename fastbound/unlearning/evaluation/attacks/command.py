"""`fastbound evaluate --attack`: settings from its flags; the work is in `attacks.run`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbound.errors import InputError
from fastbound.unlearning.evaluation.attacks.run import PICTURE, REPORT, RESULT, attack
from fastbound.unlearning.evaluation.attacks.subject import (
    ATTACKS,
    BEFORE,
    REFERENCE,
    UNLEARNED,
    AttackConfig,
)
from fastbound.unlearning.model import load_adapter, load_pretrained, merged

OWN = ("forget", "retain", "unrelated", "before", "steps", "lr", "weights", "max_length",
       "seed")  # fmt: skip
NOT_OURS = ("benchmark", "split", "data", "retain_log", "convention", "n", "membership")


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise InputError for a flag of the other kind of evaluation, and for forget rows lacking."""
    given = set(getattr(arguments, "given", {}))
    if arguments.attack is None:
        own = sorted(given & set(OWN))
        if own:
            raise InputError(f"{_flag(own[0])} is for --attack: add that, or leave it out")
        return
    other = sorted(given & set(NOT_OURS))
    if other:
        raise InputError(
            f"{_flag(other[0])} is for --benchmark, and an attack takes its rows as --forget and "
            "--retain: leave it out"
        )
    if arguments.resume:
        raise InputError("an attack has nothing to --resume: give another --output")
    if arguments.forget is None:
        raise InputError("--attack needs --forget: the rows that the model has unlearned")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; the tables go to standard output.

    Raises:
        InputError, NonFiniteError: see `attack`.
    """
    names = [name for name in arguments.attack.split(",") if name]
    config = AttackConfig(
        attacks=ATTACKS if names == ["all"] else tuple(names),
        template=arguments.template,
        rows=arguments.rows,
        batch_size=arguments.batch_size,
        **{
            name: getattr(arguments, name)
            for name in ("steps", "lr", "weights", "max_length", "seed")
            if getattr(arguments, name) is not None
        },
    )
    dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    cuda = arguments.device != "cpu" and torch.cuda.is_available()
    tokenizers: list[Any] = []

    def loading(name: str, adapter: str | None = None) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            model, tokenizer = load_pretrained(
                name, dtype, trust_remote_code=arguments.trust_remote_code
            )
            tokenizers.append(tokenizer)
            if adapter is not None:
                model = load_adapter(model, adapter)
            return merged(model).to("cuda" if cuda else "cpu")

        return load

    models = {UNLEARNED: loading(arguments.model, arguments.adapter)}
    if arguments.before is not None:
        models[BEFORE] = loading(arguments.before)
    elif arguments.adapter is not None:
        models[BEFORE] = loading(arguments.model)
    if arguments.reference is not None:
        models[REFERENCE] = loading(arguments.reference)
    for load in models.values():  # a name or an adapter that is wrong is refused before any work
        load()
    chosen = {
        **dataclasses.asdict(config),
        **{name: getattr(arguments, name) for name in ("device", "dtype")},
        "attack": ",".join(config.attacks),
    }
    with arguments.keeping_config(Path(arguments.output), RESULT, chosen):
        table = attack(
            models,
            tokenizers[0],
            arguments.forget,
            config,
            retain=arguments.retain,
            unrelated=arguments.unrelated,
            output=arguments.output,
            about={n: getattr(arguments, n) for n in ("model", "adapter", "before", "reference")},
        )
    print(f"{table}\n\nWritten to {arguments.output}: {RESULT}, {REPORT} and {PICTURE}")
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
