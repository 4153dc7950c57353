"""The flags of `fastbound unlearn`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

HELP = "make a language model forget some rows and keep others"
DESCRIPTION = """\
Trains low-rank adapters by gradient difference: the loss on the rows to forget rises while the loss
on the rows to keep stays low.

Without --model it runs a demonstration: a small model first learns about invented authors that come
with the package (or your own --forget and --retain rows), then forgets two of them, with a bounded
adapter and with plain LoRA, at the rate --lr and at ten times that rate.
"""
EPILOG = """\
Rows have the fields question and answer, or text. They come from a file (JSON, JSON Lines, CSV, TSV
or Parquet) or from a data set of the Hugging Face hub, written as id:config:split. The output
folder gets the adapter, log.jsonl, report.json, curves.png and config.yaml, which --config takes.

examples:
  fastbound unlearn --quick
  fastbound unlearn --model my-model --forget forget.jsonl --retain retain.jsonl --output run
"""
RUN = "fastbound.unlearning.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every default that is None here is the one of `UnlearnConfig`."""
    what = parser.add_argument_group("model, rows and output")
    what.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="the model to change: a folder made by save_pretrained, or an id on the hub (default: "
        "the demonstration's small model)",
    )
    what.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that a model brings with it (default: refuse such a model)",
    )
    what.add_argument(
        "--forget", metavar="ROWS", help="the rows to forget (default: two invented authors)"
    )
    what.add_argument(
        "--retain", metavar="ROWS", help="the rows to keep (default: eighteen invented authors)"
    )
    what.add_argument(
        "--output", metavar="DIR", default="unlearned", help="output folder (default: unlearned)"
    )
    what.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output from its last checkpoint (default: refuse a folder that "
        "holds a run)",
    )
    what.add_argument(
        "--quick",
        action="store_true",
        help="shorten the demonstration to a smaller model, fewer rows and 50 steps; only without "
        "--model (default: the whole demonstration)",
    )
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="print rows, tokens, layers, parameters, memory and steps of the run, and write and "
        "train nothing (default: run)",
    )
    what.add_argument(
        "--template",
        metavar="TEXT",
        help="how a question and its answer become text: a text with {question} and {answer}, or "
        "chat for the tokenizer's own template (default: 'Question: {question}', a line break, "
        "'Answer: {answer}')",
    )
    what.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="the most tokens per row; a longer row is an error, not cut (default: 256)",
    )

    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--adapter",
        metavar="KIND",
        help="bounded, or lora for PEFT's plain LoRA on the same layers (default: bounded; the "
        "demonstration runs both)",
    )
    adapter.add_argument(
        "--rank",
        type=_or_auto(int, "a whole number"),
        metavar="N",
        help="rank of the factors A and B in every layer, or auto to choose it per layer by "
        "gradients (default: 8)",
    )
    adapter.add_argument(
        "--lora-start",
        metavar="NAME",
        help="where LoRA's factors start: zero, or fila for the part of the weights that matters "
        "to the rows to forget and not to those to keep (default: zero)",
    )
    adapter.add_argument(
        "--rank-budget",
        type=int,
        metavar="N",
        help="with --rank auto, the most trained parameters (default: as many as rank 8 takes)",
    )
    adapter.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help="the change grows like (alpha / rank) * B A while it is small, as in LoRA (default: "
        "the rank)",
    )
    adapter.add_argument(
        "--bound",
        metavar="X",
        help="the limit of every entry of the weight's change: a number; a multiple of the layer's "
        "weights, such as 0.5*spectral or 2*rms; alpha; or auto, "
        "which is 0.5*spectral (default: auto; demonstration: 4*rms)",
    )
    adapter.add_argument(
        "--form",
        metavar="FORM",
        help="the change is sin(B) sin(A) for factors, and the sine of the product B A for product "
        "(default: factors)",
    )
    adapter.add_argument(
        "--omega",
        type=float,
        metavar="X",
        help="the frequency inside the sine, in place of --alpha (default: made from alpha and the "
        "bound)",
    )
    adapter.add_argument(
        "--target-modules",
        metavar="NAMES",
        help="the layers to adapt: mlp, all-linear, ends of their names separated by commas, or a "
        "regular expression for whole names (default: mlp)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--lr",
        type=_or_auto(float, "a number"),
        metavar="X",
        help="highest learning rate of AdamW, or auto: the rate that each layer's bound calls for "
        "(default: auto; demonstration: 3e-3)",
    )
    training.add_argument(
        "--warmup",
        type=float,
        metavar="X",
        help="share of all steps in which the learning rate rises from 0; it falls to 0 in the "
        "rest (default: 0.1)",
    )
    training.add_argument(
        "--weight-decay",
        type=float,
        metavar="X",
        help="AdamW's weight decay of A and B (default: 0)",
    )
    training.add_argument(
        "--clip",
        type=float,
        metavar="X",
        help="scale gradients down to this norm if they are larger (default: no clipping)",
    )
    training.add_argument(
        "--epochs",
        type=float,
        metavar="X",
        help="the most passes over the rows to forget (default: 10; demonstration: 250 steps)",
    )
    training.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="rows to forget per batch, with as many rows to keep (default: 8)",
    )
    training.add_argument(
        "--accumulation", type=int, metavar="N", help="batches per step (default: 1)"
    )
    training.add_argument(
        "--forget-weight",
        type=float,
        metavar="X",
        help="weight of the loss on the rows to forget (default: 1)",
    )
    training.add_argument(
        "--retain-weight",
        type=float,
        metavar="X",
        help="weight of the loss on the rows to keep (default: 1)",
    )
    training.add_argument(
        "--loss",
        action="append",
        dest="losses",
        metavar="NAME[=WEIGHT][,OPTION=X]",
        help="a loss to minimise, once per loss: gradient_ascent, retain, npo, simnpo, flooding, "
        "ihl, kl, idk, dpo, wga, satimp, undial, ceu, pdu, rmu or rmu_retain; docs/losses.md has "
        "formulas and options (default: gradient_ascent and retain)",
    )
    training.add_argument(
        "--seed", type=int, metavar="N", help="seed of every random choice (default: 0)"
    )
    training.add_argument(
        "--device",
        metavar="DEVICE",
        help="auto, cpu or cuda (default: auto, a GPU if there is one)",
    )
    training.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="float32 or bfloat16, of the frozen weights and the forward pass; A and B are always "
        "float32 (default: float32)",
    )
    training.add_argument(
        "--cross-entropy",
        metavar="FORM",
        help="form the logits whole, chunked or by liger (liger-kernel, on a GPU); auto forms them "
        "in chunks if they are larger than 256 MiB (default: auto)",
    )
    training.add_argument(
        "--shard",
        action="store_true",
        default=None,
        help="spread the frozen weights over processes with FSDP2 (default: a copy in each)",
    )
    training.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="compute activations again in the backward pass, which takes less memory and more "
        "time (default: keep them)",
    )

    watching = parser.add_argument_group("evaluating and stopping")
    watching.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help="steps between evaluations (default: an epoch, and 5 at least; demonstration: 25)",
    )
    watching.add_argument(
        "--eval-rows",
        type=int,
        metavar="N",
        help="the most rows per side in an evaluation, spread evenly (default: 400)",
    )
    watching.add_argument(
        "--log-every",
        type=int,
        metavar="N",
        help="steps between measurements of the largest change of a weight (default: 10; "
        "demonstration: 5)",
    )
    watching.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="steps between checkpoints (default: one per evaluation)",
    )
    watching.add_argument(
        "--all-steps",
        action="store_const",
        const=False,
        dest="early_stop",
        help="take all steps (default: stop once the forget rows are forgotten and the retain loss "
        "is near its start)",
    )
    watching.add_argument(
        "--forget-target",
        type=float,
        metavar="X",
        help="the loss, in nats per token, from which rows count as forgotten (default: the "
        "logarithm of the vocabulary's size, which is the loss of a uniform guess; with the loss "
        "flooding, three quarters of its level)",
    )
    watching.add_argument(
        "--forget-ceiling",
        type=_or_auto(float, "a number", "none"),
        metavar="X",
        help="the loss, in nats, up to which gradient ascent pushes a token, or none (default: "
        "auto, twice --forget-target; demonstration: none)",
    )
    watching.add_argument(
        "--retain-slack",
        type=float,
        metavar="X",
        help="how far the retain loss may end above its start, in nats per token, to count as kept "
        "(default: 0.1)",
    )
    watching.add_argument(
        "--retain-limit",
        type=float,
        metavar="X",
        help="give up once the retain loss exceeds this, in nats per token (default: no limit)",
    )


def _or_auto(
    number: Callable[[str], float], kind: str, *others: str
) -> Callable[[str], float | str]:
    """Reads an option that is a number, the word auto, or one of `others`."""
    words = ("auto", *others)

    def read(text: str) -> float | str:
        try:
            return text if text in words else number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither {kind} nor {' nor '.join(words)}"
            ) from None

    return read
