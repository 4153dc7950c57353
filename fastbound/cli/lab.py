"""The flags of `fastbound lab`."""

from __future__ import annotations

import argparse

HELP = "map which adapter forgets and keeps the rest at which learning rate"
DESCRIPTION = """\
Trains one small model a seed until it knows its rows, then forgets some of them by gradient
difference with every adapter at every learning rate, and draws what is left: utility and retain
loss against the rate, the size of the change and the gradient norm against steps. With --model it
maps a pretrained model that knows the rows; --general asks what was never in them.
"""
EPILOG = """\
An adapter is lora, lora-clamp (factors within 1), lora-clip (gradient norm within 1), or sine, tanh
or product with its bound: sine@0.5*spectral keeps ΔW within half the spectral norm of W, sine@4
within 4 x RMS(W) per entry, sine@alpha within alpha. All have the slope of LoRA but
product@omega=100, which is sin(100·B A) as the method's paper has it. With +ranks behind it
(sine@4+ranks) the same parameters are spread over layers by gradients, as --rank auto of unlearn
does. One process a core. The output folder gets cells.jsonl, summary.json, utility.png, size.png
and gradient.png; --resume goes on with it, also with more adapters, rates, ranks or seeds.
"""
RUN = "fastbound.unlearning.lab.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every default that is None here is the grid's own."""
    rows = parser.add_argument_group("rows (default: those that the package ships)")
    rows.add_argument("--forget", metavar="FILE", help="rows to forget, as of fastbound unlearn")
    rows.add_argument("--retain", metavar="FILE", help="rows to keep")
    rows.add_argument("--model", metavar="DIR_OR_ID", help="a model that knows both (small ones)")
    rows.add_argument(
        "--general", metavar="FILE", help="questions with perturbed_answer, as TOFU's world facts"
    )

    grid = parser.add_argument_group("grid, each a list separated by commas")
    grid.add_argument("--adapters", metavar="LIST", help="see below (ten of them)")
    grid.add_argument("--lr", metavar="LIST", help="rates (0.001,0.003,0.01,0.03,0.1)")
    grid.add_argument("--ranks", metavar="LIST", help="ranks (8)")
    grid.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (5)")
    grid.add_argument("--steps", type=int, metavar="N", help="steps per cell (300; model 80)")
    grid.add_argument("--batch-size", type=int, metavar="N", help="forget rows per step (8)")
    grid.add_argument("--dtype", help="float32 or bfloat16 (float32)")
    grid.add_argument("--eval-rows", type=int, metavar="N", help="most rows scored (all; model 40)")
    grid.add_argument("--quick", action="store_true", help="3 rates, 2 seeds, 150 steps")

    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", default="lab", help="output folder (lab)")
    run.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")
    run.add_argument("--resume", action="store_true", help="go on with the one in --output")
