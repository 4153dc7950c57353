"""`fastbound evaluate`: its flags become settings; `evaluation.run` does the work."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path

import torch

from fastbound.errors import DamageWarning, InputError, one_of, require
from fastbound.files import writing
from fastbound.unlearning.config import DEVICES, DTYPES
from fastbound.unlearning.evaluation.attacks.command import check_flags
from fastbound.unlearning.evaluation.attacks.command import run as run_attack
from fastbound.unlearning.evaluation.membership import ATTACKS
from fastbound.unlearning.evaluation.run import (
    PICTURE,
    SUMMARY,
    EvaluationConfig,
    evaluate_benchmark,
)
from fastbound.unlearning.evaluation.templates import EmptyAnswerWarning
from fastbound.unlearning.metrics import SameModelWarning
from fastbound.unlearning.metrics.logs import read_log
from fastbound.unlearning.model import check_device, load_adapter, load_pretrained, merged
from fastbound.unlearning.runs.folder import RUN, check_free

_READ_BY = {"template": "tofu", "n": "tdec"}  # flags that one benchmark alone reads


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags ask for, and print the table.

    Raises:
        InputError, NonFiniteError: see `evaluate_benchmark` and `attacks.run.attack`.
    """
    require("evaluation", "fastbound evaluate", "scipy", "sklearn", "rouge_score")
    one_of("device", arguments.device, DEVICES)
    one_of("dtype", arguments.dtype, DTYPES)
    check_device(arguments.device)
    check_flags(arguments)
    if arguments.attack is not None:
        return run_attack(arguments)
    if arguments.benchmark is None:
        raise InputError("give --benchmark (tofu, muse or tdec) or --attack")
    for name, reader in _READ_BY.items():
        if name in arguments.given and arguments.benchmark != reader:
            raise InputError(f"--{name} is for {reader}, {arguments.benchmark} does not read it")
    config = EvaluationConfig(
        benchmark=arguments.benchmark,
        split=arguments.split,
        data=arguments.data,
        convention=arguments.convention,
        template=arguments.template,
        batch_size=arguments.batch_size,
        rows=arguments.rows,
        n=arguments.n,
        membership=_attacks(arguments.membership),
    )
    output = Path(arguments.output)
    chosen = {
        **dataclasses.asdict(config),
        **{name: getattr(arguments, name) for name in ("device", "dtype")},
        "membership": ",".join(config.membership) or None,
        **{name: None for name, reader in _READ_BY.items() if reader != config.benchmark},
    }
    with writing(output), arguments.keeping_config(output, RUN, chosen):
        # Before the model is loaded, which can take minutes.
        check_free(output, RUN, resume=arguments.resume)
        table, caught = _evaluate(arguments, config, output)
    for warning in caught:
        if issubclass(warning.category, (DamageWarning, EmptyAnswerWarning, SameModelWarning)):
            print(f"warning: {warning.message}", file=sys.stderr)
    print(f"{table}\n\nWritten to {output}: {config.chosen.LOG}, {SUMMARY} and {PICTURE}")
    return 0


def _attacks(text: str | None) -> tuple[str, ...]:
    """Names separated by commas; "all" is every attack that needs no other model."""
    names = [] if text is None else [name for name in text.split(",") if name]
    if "all" in names:
        names += [name for name in ATTACKS if name != "reference"]
    return tuple(name for name in names if name != "all")


def _evaluate(
    arguments: argparse.Namespace, config: EvaluationConfig, output: Path
) -> tuple[str, list[warnings.WarningMessage]]:
    """The table, and the warnings on the way."""
    retain = None if arguments.retain_log is None else read_log(arguments.retain_log)
    dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    model, tokenizer = load_pretrained(
        arguments.model, dtype, trust_remote_code=arguments.trust_remote_code
    )
    if arguments.adapter is not None:
        model = load_adapter(model, arguments.adapter)
    cuda = arguments.device != "cpu" and torch.cuda.is_available()
    if "gradnorm" in config.membership:
        model = merged(model)  # the frozen weights under an adapter have no gradient
    reference = None
    if arguments.reference is not None:
        reference, _ = load_pretrained(
            arguments.reference, dtype, trust_remote_code=arguments.trust_remote_code
        )
        reference.to("cuda" if cuda else "cpu")
    model.to("cuda" if cuda else "cpu")
    about = {"model": arguments.model, "adapter": arguments.adapter, "dtype": arguments.dtype}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        table = evaluate_benchmark(
            model,
            tokenizer,
            config,
            output,
            retain_log=retain,
            reference=reference,
            about=about,
            resume=arguments.resume,
        )
    return table, caught
