"""`fastbound unlearn`: flags to settings, and nothing else; the work is in `demo` and `loop`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbound.unlearning.config import UnlearnConfig

HELP = "make a language model forget some rows and keep others"
DESCRIPTION = """\
Gradient difference through low-rank adapters: the loss on the retain rows falls while the loss on
the forget rows rises. Without --model a small model first learns both files, and each adapter runs
at --lr and at ten times --lr: with no arguments at all, a complete demonstration on fictitious
authors that come with the package. With --model only the requested adapter runs.
"""
EPILOG = """\
Rows are JSON lines or CSV with question and answer, or text; or id:config:split of a data set on
the hub. The output folder gets the adapter, log.jsonl, report.json and curves.png.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every default that is None here is the one of `UnlearnConfig`."""
    what = parser.add_argument_group("what to unlearn")
    what.add_argument("--model", metavar="DIR_OR_ID", help="model to change (default: a small one)")
    what.add_argument("--forget", metavar="ROWS", help="rows to forget (default: two authors)")
    what.add_argument("--retain", metavar="ROWS", help="rows to keep (default: eighteen authors)")
    what.add_argument(
        "--output", metavar="DIR", default="unlearned", help="output folder (default: unlearned)"
    )
    what.add_argument("--resume", action="store_true", help="go on with the run in --output")
    what.add_argument("--quick", action="store_true", help="a short demonstration, without --model")
    what.add_argument("--template", help="text with {question} and {answer}, or chat")
    what.add_argument("--max-length", type=int, metavar="N", help="most tokens a row (256)")

    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--adapter", help="bounded or lora (default: bounded; both in the demo)")
    adapter.add_argument(
        "--rank", type=_rank, metavar="N", help="rank of ΔW, or auto: by gradients (8)"
    )
    adapter.add_argument(
        "--rank-budget", type=int, metavar="N", help="most parameters of --rank auto (as rank 8)"
    )
    adapter.add_argument("--alpha", type=float, metavar="X", help="slope times rank (rank)")
    adapter.add_argument(
        "--bound", metavar="X", help="most |ΔW|: a number, 2*rms, alpha, or auto: 4*rms (auto)"
    )
    adapter.add_argument(
        "--target-modules", metavar="NAMES", help="mlp, suffixes with commas between, or a regex"
    )

    training = parser.add_argument_group("training")
    training.add_argument("--lr", type=float, metavar="X", help="highest rate (1e-3; demo 3e-3)")
    training.add_argument("--warmup", type=float, metavar="X", help="share of steps rising (0.1)")
    training.add_argument("--weight-decay", type=float, metavar="X", help="of A and B (0)")
    training.add_argument("--clip", type=float, metavar="X", help="largest gradient norm (none)")
    training.add_argument(
        "--epochs", type=float, metavar="X", help="over forget rows (10; demo 250 steps)"
    )
    training.add_argument("--batch-size", type=int, metavar="N", help="forget rows a batch (8)")
    training.add_argument("--accumulation", type=int, metavar="N", help="batches a step (1)")
    training.add_argument("--forget-weight", type=float, metavar="X", help="of its loss (1)")
    training.add_argument("--retain-weight", type=float, metavar="X", help="of its loss (1)")
    training.add_argument(
        "--loss",
        action="append",
        dest="losses",
        metavar="NAME[=WEIGHT]",
        help="instead of both, repeated: gradient_ascent, retain, npo, simnpo, ihl, kl, idk, dpo",
    )
    training.add_argument("--seed", type=int, metavar="N", help="of every random choice (0)")
    training.add_argument("--device", help="auto, cpu or cuda (auto)")
    training.add_argument("--dtype", help="float32 or bfloat16 (float32)")
    training.add_argument(
        "--cross-entropy", help="from logits: whole, chunked, liger or auto (auto)"
    )
    training.add_argument(
        "--shard", action="store_true", default=None, help="weights over processes (FSDP2)"
    )
    training.add_argument("--gradient-checkpointing", action="store_true", default=None)

    watching = parser.add_argument_group("watching and stopping")
    watching.add_argument("--eval-every", type=int, metavar="N", help="steps (once an epoch)")
    watching.add_argument("--eval-rows", type=int, metavar="N", help="most rows a side (400)")
    watching.add_argument("--log-every", type=int, metavar="N", help="steps (10)")
    watching.add_argument("--checkpoint-every", type=int, metavar="N", help="steps (as eval)")
    watching.add_argument("--forget-target", type=float, metavar="X", help="stop at this loss")
    watching.add_argument("--retain-limit", type=float, metavar="X", help="stop past this loss")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; the table goes to standard output.

    Raises:
        InputError, NonFiniteError: see `unlearn` and `demonstrate`.
    """
    from fastbound.errors import InputError
    from fastbound.unlearning.data.rows import authors, load_rows

    if arguments.model is not None and arguments.quick:
        raise InputError("--quick shortens the demonstration, which takes no --model")
    for side, other in (("forget", "retain"), ("retain", "forget")):
        if getattr(arguments, side) is None and (getattr(arguments, other) or arguments.model):
            raise InputError(f"--{side} is missing: give the rows to {side}")
    forget = load_rows(arguments.forget or authors("forget"))
    retain = load_rows(arguments.retain or authors("retain"))
    config = _config(arguments, len(forget))
    output = Path(arguments.output)
    table: str | None
    if arguments.model is None:
        table = _demonstrate(arguments, config, forget, retain, output)
    else:
        table = _unlearn(arguments, config, forget, retain, output)
    if table is not None:
        print(f"{table}\n\nWritten to {output}: report.json, curves.png and the adapters")
    return 0


def _demonstrate(
    arguments: argparse.Namespace, config: UnlearnConfig, forget: Any, retain: Any, output: Path
) -> str:
    from fastbound.errors import InputError
    from fastbound.unlearning.config import ADAPTERS
    from fastbound.unlearning.demo.demo import Demonstration, demonstrate
    from fastbound.unlearning.demo.small_model import SmallModelConfig

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("the demonstration runs in one process: give --model, or start only one")
    adapters = ADAPTERS if arguments.adapter is None else (config.adapter,)
    demonstration = Demonstration(config, SmallModelConfig(), adapters)
    if arguments.quick:
        small = SmallModelConfig(hidden_size=64, intermediate_size=176, vocabulary=1024)
        demonstration = Demonstration(config, small, adapters, cost_steps=5)
        retain = retain[: 2 * len(forget)]
    return demonstrate(forget, retain, demonstration, output, resume=arguments.resume)


def _unlearn(
    arguments: argparse.Namespace, config: UnlearnConfig, forget: Any, retain: Any, output: Path
) -> str | None:
    import torch

    from fastbound.unlearning.demo.report import Run, write_report
    from fastbound.unlearning.pretrained import load_pretrained
    from fastbound.unlearning.runs.folder import RUN, check_free
    from fastbound.unlearning.training.loop import unlearn
    from fastbound.unlearning.training.processes import end_processes

    check_free(output, RUN, resume=arguments.resume)  # before minutes of loading
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model, tokenizer = load_pretrained(arguments.model, dtype)
    unlearn(model, tokenizer, forget, retain, config, output=output, resume=arguments.resume)
    table = None
    if _is_first_process():
        about = {
            "model": arguments.model,
            "rows": {"forget": len(forget), "retain": len(retain)},
        }
        table = write_report(output, [Run.read(output)], about=about)
    end_processes()
    return table


def _is_first_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _config(arguments: argparse.Namespace, forget_rows: int) -> UnlearnConfig:
    from fastbound.unlearning.config import UnlearnConfig

    names = {field.name for field in dataclasses.fields(UnlearnConfig)}
    given = {n: v for n, v in vars(arguments).items() if n in names and v is not None}
    if "bound" in given:
        given["bound"] = _bound(given["bound"])
    if "losses" in given:
        given["losses"] = dict(_loss(text) for text in given["losses"])
    if "," in given.get("target_modules", ""):
        given["target_modules"] = tuple(filter(None, given["target_modules"].split(",")))
    if arguments.model is not None:
        return UnlearnConfig(**given)
    given = {**_DEMO, **(_QUICK if arguments.quick else {}), **given}
    config = UnlearnConfig(**given)
    if "epochs" in given:
        return config
    pairs = config.batch_size * config.accumulation
    steps = _QUICK_STEPS if arguments.quick else _DEMO_STEPS
    return dataclasses.replace(config, epochs=steps * pairs / forget_rows)


# The small model takes the same few short steps however many rows there are to forget.
_DEMO = {"lr": 3e-3, "eval_every": 25, "log_every": 5}
_DEMO_STEPS = 250
_QUICK = {"eval_every": 10}
_QUICK_STEPS = 50


def _loss(text: str) -> tuple[str, float]:
    from fastbound.errors import InputError

    name, _, weight = text.partition("=")
    try:
        return name, float(weight or 1)
    except ValueError:
        raise InputError(f"--loss must be NAME or NAME=WEIGHT; got {text!r}") from None


def _rank(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def _bound(text: str) -> float | str | None:
    if text == "alpha":
        return None
    try:
        return float(text)
    except ValueError:
        return text
