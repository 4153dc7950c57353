"""The flags of `fastbound evaluate`."""

from __future__ import annotations

import argparse

HELP = "measure a model on TOFU, MUSE or TDEC, or try to bring back what it has forgotten"
DESCRIPTION = """\
With --benchmark it measures a model on TOFU (truth ratio, forget quality, model utility, extraction
strength), MUSE (verbatim and knowledge memorisation, PrivLeak) or TDEC (extraction likelihood,
memorisation accuracy, and the validation sets in its folder). Published definitions of these
measures differ; the report names the one it used, which --convention chooses.

With --attack it tries to bring back what the model has forgotten: by relearning a few rows, by
quantising the weights, and by asking in other words.
"""
EPILOG = """\
The output folder of a benchmark gets its log (for TOFU in the layout of open-unlearning),
summary.json, evaluation.png and config.yaml, which --config takes. The log of a model that was
trained without the forget rows is what --retain-log of another run takes. An attack writes
attack.json, attack.md and attack.png; it changes no file of a model.

examples:
  fastbound evaluate --benchmark tofu --model my-model --adapter run/adapter --output scores
  fastbound evaluate --attack all --forget forget.jsonl --model my-model --adapter run/adapter \\
      --output attacked
"""
RUN = "fastbound.unlearning.evaluation.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every default that is None here is the benchmark's own."""
    what = parser.add_argument_group("model, benchmark and output")
    what.add_argument(
        "--benchmark",
        metavar="NAME",
        help="tofu, muse or tdec (default: none; give either this or --attack)",
    )
    what.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        required=True,
        help="the model to measure: a folder made by save_pretrained, or an id on the hub",
    )
    what.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that a model brings with it (default: refuse such a model)",
    )
    what.add_argument(
        "--adapter",
        metavar="DIR",
        help="the folder of an adapter of fastbound or PEFT to put on the model (default: none)",
    )
    what.add_argument(
        "--split",
        metavar="NAME",
        help="tofu: forget01, forget05 or forget10 (default: forget10); muse: news or books "
        "(default: news); tdec: the name of its file, which must be given",
    )
    what.add_argument(
        "--data",
        metavar="DIR",
        help="a folder with the benchmark's files (default: download them from the hub)",
    )
    what.add_argument(
        "--retain-log",
        metavar="FILE",
        help="the log of a model that was trained without the forget rows, or open-unlearning's "
        "TOFU_EVAL.json; forget quality and PrivLeak need it (default: none)",
    )
    what.add_argument(
        "--membership",
        metavar="NAMES",
        help="membership attacks to score as well, separated by commas: loss, zlib, min_k, "
        "min_k_plus_plus, gradnorm and reference, or all, which means each of them but reference "
        "(default: none)",
    )
    what.add_argument(
        "--reference",
        metavar="DIR_OR_ID",
        help="a model that never saw the forget rows, for --membership reference and to compare "
        "with in attacks (default: none)",
    )
    what.add_argument("--output", metavar="DIR", required=True, help="output folder")
    what.add_argument(
        "--resume",
        action="store_true",
        help="continue the evaluation in --output (default: refuse a folder that holds one)",
    )

    attack = parser.add_argument_group("attacks, with --attack")
    attack.add_argument(
        "--attack",
        metavar="NAMES",
        help="relearn, quantize and paraphrase, separated by commas, or all (default: none)",
    )
    attack.add_argument(
        "--forget", metavar="ROWS", help="the rows that were unlearned (no default)"
    )
    attack.add_argument(
        "--retain", metavar="ROWS", help="rows that were kept, to relearn as well (default: none)"
    )
    attack.add_argument(
        "--unrelated",
        metavar="ROWS",
        help="unrelated rows to relearn (default: the invented authors of the package)",
    )
    attack.add_argument(
        "--before",
        metavar="DIR_OR_ID",
        help="the model before unlearning (default: --model without --adapter, if there is one)",
    )
    attack.add_argument("--steps", type=int, metavar="N", help="relearning steps (default: 20)")
    attack.add_argument(
        "--lr", type=float, metavar="X", help="learning rate of relearning (default: 1e-4)"
    )
    attack.add_argument(
        "--weights", metavar="KIND", help="relearning trains all weights, or lora (default: all)"
    )
    attack.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="the most tokens of a row; one that has more is refused (default: 256)",
    )
    attack.add_argument(
        "--seed", type=int, metavar="N", help="seed of every random choice (default: 0)"
    )

    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--convention",
        metavar="NAME",
        help="whose definitions hold; tofu: open-unlearning, tofu or tofu-paper; muse: "
        "open-unlearning or muse (default: open-unlearning; tdec has one only)",
    )
    how.add_argument(
        "--template",
        default="phi",
        metavar="NAME",
        help="how questions are asked: llama2, phi, stablelm, pythia, or chat for the tokenizer's "
        "own template; in attacks also text with {question} and {answer} (default: phi)",
    )
    how.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="rows per batch (default: 16)"
    )
    how.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="use N rows of each set, the first ones, in attacks spread evenly (default: all)",
    )
    how.add_argument(
        "--n",
        type=int,
        default=10,
        metavar="N",
        help="length of the n-grams in TDEC's extraction likelihood EL_n (default: 10)",
    )
    how.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu or cuda (default: auto, a GPU if there is one)",
    )
    how.add_argument(
        "--dtype",
        default="float32",
        metavar="DTYPE",
        help="float32 or bfloat16, of the weights (default: float32)",
    )
