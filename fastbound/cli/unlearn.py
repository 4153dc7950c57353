"""The flags of `fastbound unlearn`."""

from __future__ import annotations

import argparse

HELP = "make a language model forget some rows and keep others"
DESCRIPTION = """\
Gradient difference through low-rank adapters: the loss on the retain rows falls while the loss on
the forget rows rises. Without --model a small model first learns both files, and each adapter runs
at --lr and at ten times --lr: with no arguments at all, a complete demonstration on fictitious
authors that come with the package. With --model only the requested adapter runs.
"""
EPILOG = """\
Rows are JSON, CSV, TSV or Parquet with question and answer, or text; or id:config:split of a data
set on the hub. The output folder gets the adapter, log.jsonl, report.json and curves.png.
"""
RUN = "fastbound.unlearning.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every default that is None here is the one of `UnlearnConfig`."""
    what = parser.add_argument_group("what to unlearn")
    what.add_argument("--model", metavar="DIR_OR_ID", help="model to change (default: a small one)")
    what.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
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
        "--bound",
        metavar="X",
        help="most |ΔW|: a number, 0.5*spectral, 2*rms, alpha, or auto: 4*rms (auto)",
    )
    adapter.add_argument(
        "--form", help="of ΔW: factors, sin(B)·sin(A), or product, sin of the product (factors)"
    )
    adapter.add_argument(
        "--omega", type=float, metavar="X", help="frequency inside the sine, instead of --alpha"
    )
    adapter.add_argument(
        "--target-modules",
        metavar="NAMES",
        help="mlp, all-linear, suffixes with commas between, or a regex (mlp)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--lr",
        type=_rate,
        metavar="X",
        help="highest learning rate, or auto: as each layer's bound calls for (auto; demo 3e-3)",
    )
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
        metavar="NAME[=WEIGHT][,OPTION=X]",
        help="instead of both, repeated: gradient_ascent, retain, npo, simnpo, ihl, kl, idk, dpo, "
        "wga, satimp, undial, ceu, pdu, rmu, rmu_retain; docs/losses.md has the options",
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
    watching.add_argument(
        "--log-every", type=int, metavar="N", help="steps between looks at max|ΔW| (10)"
    )
    watching.add_argument("--checkpoint-every", type=int, metavar="N", help="steps (as eval)")
    watching.add_argument(
        "--all-steps",
        action="store_const",
        const=False,
        dest="early_stop",
        help="go on when the rows are forgotten and the others kept, where a run else ends",
    )
    watching.add_argument(
        "--forget-target",
        type=float,
        metavar="X",
        help="forget loss that counts as forgotten (the logarithm of the vocabulary)",
    )
    watching.add_argument(
        "--retain-slack",
        type=float,
        metavar="X",
        help="rise of the retain loss that counts as kept (0.1)",
    )
    watching.add_argument(
        "--retain-limit", type=float, metavar="X", help="give up past this retain loss (none)"
    )


def _rate(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _rank(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None
