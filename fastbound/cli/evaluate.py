"""The flags of `fastbound evaluate`."""

from __future__ import annotations

import argparse

HELP = "measure a model on TOFU, MUSE or TDEC, or attack what it has unlearned"
DESCRIPTION = """\
TOFU: truth ratio, forget quality, model utility, extraction strength. MUSE: verbatim and knowledge
memorisation, PrivLeak. TDEC: extraction likelihood, memorisation accuracy, and the validation sets
that the folder holds. Each in the definitions of one named convention, which the report states.
With --attack: does it stay forgotten when it is relearned, quantised, or asked in other words?
"""
EPILOG = """\
The output folder gets the log (TOFU: its aggregated layout), summary.json and evaluation.png. The
log of a model trained without the forget rows is what --retain-log of another run takes. An attack
writes attack.json, attack.md and attack.png; no file of the models is changed.
"""
RUN = "fastbound.unlearning.evaluation.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every default that is None here is the benchmark's own."""
    what = parser.add_argument_group("what to evaluate")
    what.add_argument("--benchmark", help="tofu, muse or tdec")
    what.add_argument("--model", metavar="DIR_OR_ID", required=True, help="the model")
    what.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    what.add_argument("--adapter", metavar="DIR", help="adapter on it, of fastbound or of PEFT")
    what.add_argument(
        "--split", help="tofu: forget01, forget05 or forget10; muse: news or books; tdec: file"
    )
    what.add_argument("--data", metavar="DIR", help="folder of the data (default: the hub)")
    what.add_argument(
        "--retain-log",
        metavar="FILE",
        help="log of a model trained without the forget rows, or open-unlearning's TOFU_EVAL.json",
    )
    what.add_argument(
        "--membership",
        metavar="NAMES",
        help="attacks to score as well, with commas between: loss, zlib, min_k, min_k_plus_plus, "
        "gradnorm, reference; all is every one but the last",
    )
    what.add_argument(
        "--reference",
        metavar="DIR_OR_ID",
        help="a model that never saw the forget rows: for the attack of that name, or to relearn",
    )
    what.add_argument("--output", metavar="DIR", required=True, help="output folder")
    what.add_argument("--resume", action="store_true", help="go on with the one in --output")

    attack = parser.add_argument_group("attacks")
    attack.add_argument(
        "--attack", metavar="NAMES", help="relearn, quantize, paraphrase, with commas, or all"
    )
    attack.add_argument("--forget", metavar="ROWS", help="the rows that were unlearned")
    attack.add_argument("--retain", metavar="ROWS", help="rows that were kept")
    attack.add_argument(
        "--unrelated", metavar="ROWS", help="rows to relearn (default: the shipped authors)"
    )
    attack.add_argument(
        "--before",
        metavar="DIR_OR_ID",
        help="the model before unlearning (default with --adapter: --model without it)",
    )
    attack.add_argument("--steps", type=int, metavar="N", help="of relearning (20)")
    attack.add_argument("--lr", type=float, metavar="X", help="of relearning (1e-4)")
    attack.add_argument("--weights", help="that relearning trains: all or lora (all)")
    attack.add_argument("--seed", type=int, metavar="N", help="of every random choice (0)")

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
