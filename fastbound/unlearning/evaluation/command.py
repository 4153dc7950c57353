"""`fastbound evaluate`: flags to settings, and nothing else; the work is in `evaluate_run`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

HELP = "measure a model on TOFU, MUSE or TDEC"
DESCRIPTION = """\
TOFU: truth ratio, forget quality, model utility, extraction strength. MUSE: verbatim and knowledge
memorisation, PrivLeak. TDEC: extraction likelihood, memorisation accuracy, and the validation sets
that the folder holds. Each in the definitions of one named convention, which the report states.
"""
EPILOG = """\
The output folder gets the log (TOFU: its aggregated layout), summary.json and evaluation.png. The
log of a model trained without the forget rows is what --retain-log of another run takes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every default that is None here is the benchmark's own."""
    what = parser.add_argument_group("what to evaluate")
    what.add_argument("--benchmark", required=True, help="tofu, muse or tdec")
    what.add_argument("--model", metavar="DIR_OR_ID", required=True, help="the model")
    what.add_argument("--adapter", metavar="DIR", help="adapter on it, of fastbound or of PEFT")
    what.add_argument(
        "--split", help="tofu: forget01, forget05 or forget10; muse: news or books; tdec: file"
    )
    what.add_argument("--data", metavar="DIR", help="folder of the data (default: the hub)")
    what.add_argument(
        "--retain-log", metavar="FILE", help="log of a model trained without the forget rows"
    )
    what.add_argument("--output", metavar="DIR", required=True, help="output folder")
    what.add_argument("--resume", action="store_true", help="go on with the one in --output")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--convention",
        help="tofu: open-unlearning, tofu or tofu-paper; muse: open-unlearning, muse",
    )
    how.add_argument("--template", default="phi", help="llama2, phi, stablelm, pythia, chat (phi)")
    how.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows a batch (16)")
    how.add_argument("--rows", type=int, metavar="N", help="the first N of each set (all)")
    how.add_argument("--n", type=int, default=10, metavar="N", help="of EL_n (10)")
    how.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    how.add_argument("--dtype", default="float32", help="float32 or bfloat16 (float32)")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; the table goes to standard output.

    Raises:
        InputError, NonFiniteError: see `evaluate_benchmark`.
    """
    import torch

    from fastbound.errors import InputError
    from fastbound.unlearning.config import DEVICES, DTYPES
    from fastbound.unlearning.evaluation.run import (
        LOGS,
        PICTURE,
        SUMMARY,
        EvaluationConfig,
        evaluate_benchmark,
        load_adapter,
    )
    from fastbound.unlearning.evaluation.templates import EmptyAnswerWarning
    from fastbound.unlearning.metrics import SameModelWarning
    from fastbound.unlearning.metrics.logs import read_log
    from fastbound.unlearning.pretrained import load_pretrained
    from fastbound.unlearning.runs.folder import RUN, check_free

    for name, known in (("device", DEVICES), ("dtype", DTYPES)):
        if getattr(arguments, name) not in known:
            raise InputError(
                f"{name} must be one of {', '.join(known)}; got {getattr(arguments, name)!r}"
            )
    config = EvaluationConfig(
        benchmark=arguments.benchmark,
        split=arguments.split,
        data=arguments.data,
        convention=arguments.convention,
        template=arguments.template,
        batch_size=arguments.batch_size,
        rows=arguments.rows,
        n=arguments.n,
    )
    output = Path(arguments.output)
    check_free(output, RUN, resume=arguments.resume)  # before minutes of loading
    retain = None if arguments.retain_log is None else read_log(arguments.retain_log)
    dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    model, tokenizer = load_pretrained(arguments.model, dtype)
    if arguments.adapter is not None:
        model = load_adapter(model, arguments.adapter)
    cuda = arguments.device != "cpu" and torch.cuda.is_available()
    if arguments.device == "cuda" and not cuda:
        raise InputError("device cuda: PyTorch sees no GPU here; give auto or cpu")
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
            about=about,
            resume=arguments.resume,
        )
    for warning in caught:
        if issubclass(warning.category, (EmptyAnswerWarning, SameModelWarning)):
            print(f"warning: {warning.message}", file=sys.stderr)
    print(f"{table}\n\nWritten to {output}: {LOGS[config.benchmark]}, {SUMMARY} and {PICTURE}")
    return 0
