"""`fastbound unlearn`: its flags become settings; `demo` and `training.loop` do the work."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastbound.errors import InputError
from fastbound.files import writing
from fastbound.unlearning.config import ADAPTERS, UnlearnConfig
from fastbound.unlearning.data.rows import authors, load_rows
from fastbound.unlearning.demo.demo import MARKER as DEMONSTRATION
from fastbound.unlearning.demo.demo import Demonstration, demonstrate
from fastbound.unlearning.demo.small_model import SmallModelConfig, shape_of
from fastbound.unlearning.evaluation.examples import examples_of, lines_of
from fastbound.unlearning.losses.objective import Weight
from fastbound.unlearning.model import check_device, check_plain, load_pretrained, load_shape
from fastbound.unlearning.runs.folder import RUN, check_free, write_json
from fastbound.unlearning.runs.report import EXAMPLES, Run, write_report
from fastbound.unlearning.training.estimate import estimate
from fastbound.unlearning.training.loop import unlearn
from fastbound.unlearning.training.processes import end_processes, starts_first


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags ask for, and print what came of it.

    Raises:
        InputError, NonFiniteError: see `unlearn` and `demonstrate`.
    """

    if arguments.model is not None and arguments.quick:
        raise InputError(
            "--quick shortens the demonstration, which has no --model: leave one of them out"
        )
    for side, other in (("forget", "retain"), ("retain", "forget")):
        if getattr(arguments, side) is None and (getattr(arguments, other) or arguments.model):
            raise InputError(f"--{side} is missing: give the rows to {side}")
    forget = load_rows(arguments.forget or authors("forget"))
    retain = load_rows(arguments.retain or authors("retain"))
    config = _config(arguments, len(forget))
    check_device(config.device)
    output = Path(arguments.output)
    marker = DEMONSTRATION if arguments.model is None else RUN
    if arguments.dry_run:
        check_free(output, marker, resume=arguments.resume)
        _tell(arguments, config, forget, retain)
        return 0
    table: str | None
    first = starts_first()
    keeping = arguments.keeping_config(output, marker, _options(arguments, config))
    with (
        writing(output) if first else contextlib.nullcontext(),
        keeping if first else contextlib.nullcontext(),
    ):
        if arguments.model is None:
            table = _demonstrate(arguments, config, forget, retain, output)
        else:
            table = _unlearn(arguments, config, forget, retain, output)
    if table is not None:
        print(f"{table}\n\nWritten to {output}: report.json, curves.png and the adapters")
    return 0


def _tell(arguments: argparse.Namespace, config: UnlearnConfig, forget: Any, retain: Any) -> None:
    """Print what the run would take, from the model's shapes alone. Raises InputError."""
    if arguments.model is None:
        demonstration, retain = _demonstration(arguments, config, forget, retain)
        model, tokenizer = shape_of(
            [*forget, *retain], demonstration.small, config.max_length, config.template
        )
        runs = demonstration.runs()
        what = (
            f"A small model first learns {len(forget) + len(retain)} rows. Then, from that model, "
            f"{len(runs)} runs: {', '.join(runs)}. Each of them:"
        )
    else:
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        model, tokenizer = load_shape(
            arguments.model, dtype, trust_remote_code=arguments.trust_remote_code
        )
        what = f"A run on {arguments.model}:"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found = estimate(model, tokenizer, forget, retain, config, processes=processes)
    print("\n".join(["Dry run: nothing is trained or written.", "", what, *found.lines()]))
    found.check()


def _demonstration(
    arguments: argparse.Namespace, config: UnlearnConfig, forget: Any, retain: Any
) -> tuple[Demonstration, Any]:
    """With the rows to keep that it takes."""
    adapters = ADAPTERS if arguments.adapter is None else (config.adapter,)
    if not arguments.quick:
        return Demonstration(config, SmallModelConfig(), adapters), retain
    small = SmallModelConfig(hidden_size=64, intermediate_size=176, vocabulary=1024)
    return Demonstration(config, small, adapters, quick=True), retain[: 2 * len(forget)]


def _demonstrate(
    arguments: argparse.Namespace, config: UnlearnConfig, forget: Any, retain: Any, output: Path
) -> str:

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("the demonstration runs in one process: give --model, or start only one")
    demonstration, retain = _demonstration(arguments, config, forget, retain)
    return demonstrate(forget, retain, demonstration, output, resume=arguments.resume)


def _unlearn(
    arguments: argparse.Namespace, config: UnlearnConfig, forget: Any, retain: Any, output: Path
) -> str | None:

    # Before the model is loaded, which can take minutes.
    check_free(output, RUN, resume=arguments.resume)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model, tokenizer = load_pretrained(
        arguments.model, dtype, trust_remote_code=arguments.trust_remote_code
    )
    check_plain(model, arguments.model)
    result = unlearn(
        model, tokenizer, forget, retain, config, output=output, resume=arguments.resume
    )
    held = examples_of(result, tokenizer, forget, retain)
    table = None
    if _is_first_process():
        write_json(output / EXAMPLES, {"examples": held})
        about = {
            "model": arguments.model,
            "rows": {"forget": len(forget), "retain": len(retain)},
        }
        run = Run.read(output)
        table = write_report(
            output, [run], about=about, questions=lines_of({"after": run.examples})
        )
    end_processes()
    return table


def _is_first_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _config(arguments: argparse.Namespace, forget_rows: int) -> UnlearnConfig:

    names = {field.name for field in dataclasses.fields(UnlearnConfig)}
    given = {n: v for n, v in vars(arguments).items() if n in names and v is not None}
    for name in ("bound", "form", "omega"):
        if name in given and given.get("adapter") == "lora":
            raise InputError(
                f"--{name} belongs to the bounded adapter, and LoRA has none: leave it out"
            )
    if "bound" in given:
        given["bound"] = _bound(given["bound"])
    if "losses" in given:
        losses = [_loss(text) for text in given["losses"]]
        given["losses"] = dict(losses)
        if len(given["losses"]) < len(losses):
            raise InputError(f"--loss names a loss twice: {', '.join(arguments.losses)}")
    if "target_modules" in given:
        given["target_modules"] = _targets(given["target_modules"])
    if arguments.model is not None:
        return UnlearnConfig(**given)
    given = {**_DEMO, **(_QUICK if arguments.quick else {}), **given}
    config = UnlearnConfig(**given)
    if "epochs" in given:
        return config
    pairs = config.batch_size * config.accumulation
    steps = _QUICK_STEPS if arguments.quick else _DEMO_STEPS
    return dataclasses.replace(config, epochs=steps * pairs / forget_rows)


# The small model takes the same number of short steps, however many rows it is to forget. Since it
# knows nothing but these rows, it has to move further to forget some of them than "auto" lets a
# pretrained model move. It ascends without a ceiling, under which no adapter of it does any damage.
_DEMO = {
    "bound": "4*rms",
    "forget_ceiling": "none",
    "lr": 3e-3,
    "eval_every": 25,
    "log_every": 5,
}
_DEMO_STEPS = 250
_QUICK = {"eval_every": 10}
_QUICK_STEPS = 50


def _options(arguments: argparse.Namespace, config: UnlearnConfig) -> dict[str, Any]:
    """The config as options by which `_config` makes it again, whatever the defaults are then."""
    options = config.as_dict()
    if config.adapter == "lora":
        options |= dict.fromkeys(("bound", "form", "omega"))
    elif config.bound is None:
        options["bound"] = "alpha"
    if arguments.model is None and arguments.adapter is None:
        options["adapter"] = None  # both
    if not isinstance(config.target_modules, str):
        # The comma marks a list, also one of a single name.
        options["target_modules"] = ",".join(config.target_modules) + ","
    if config.losses is not None:
        options["losses"] = [_loss_text(name, each) for name, each in config.losses.items()]
    return options


def _loss_text(name: str, weight: Weight) -> str:
    if not isinstance(weight, Mapping):
        return f"{name}={weight!r}"
    settings = "".join(f",{k}={v!r}" for k, v in weight.items() if k != "weight")
    return f"{name}={weight.get('weight', 1.0)!r}{settings}"


def _loss(text: str) -> tuple[str, Weight]:
    first, *rest = text.split(",")
    name, _, weight = first.partition("=")
    pairs = [each.partition("=") for each in rest]
    try:
        number = float(weight or 1)
        options = {option.strip(): float(value) for option, _, value in pairs}
    except ValueError:
        raise InputError(
            f"--loss must be NAME or NAME=WEIGHT, and OPTION=NUMBER after commas; got {text!r}"
        ) from None
    if len(options) < len(pairs):
        raise InputError(f"--loss names an option twice: {text}")
    if weight and "weight" in options:
        raise InputError(f"--loss gives two weights: {text}")
    return name.strip(), {"weight": number, **options} if options else number


def _targets(text: str) -> str | tuple[str, ...]:
    """One name, or names separated by commas, are suffixes; `fastbound.inject` reads the rest."""
    if text in ("mlp", "all-linear") or not re.fullmatch(r"[\w.\-]+(,[\w.\-]*)*", text):
        return text
    return tuple(filter(None, text.split(",")))


def _bound(text: str) -> float | str | None:
    if text == "alpha":
        return None
    try:
        return float(text)
    except ValueError:
        return text
