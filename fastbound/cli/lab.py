"""The flags of `fastbound lab`."""

from __future__ import annotations

import argparse

HELP = "map which adapters forget, and keep the rest, at which learning rates"
DESCRIPTION = """\
Trains a small model until it knows its rows, once per seed; then makes it forget some of them by
gradient difference, with every adapter at every learning rate, and draws what is left of the rest:
utility and retain loss over the learning rate, the size of the change and the gradient norm over
the steps. With --model it maps a pretrained model that knows the rows; --general then also asks
questions that are in neither file.
"""
EPILOG = """\
An adapter is lora, lora-clamp (every entry of A and B limited to 1), lora-clip (the gradient's norm
limited to 1), lora-decay (weight decay of A and B), or a bounded one with its bound: sine, tanh or
product. sine@0.5*spectral keeps the change within half the spectral norm of W, sine@4 keeps each
entry within 4 x RMS(W), and sine@alpha within alpha. All have LoRA's slope at zero, except
product@omega=100, which is sin(100 * B A) as in the method's paper.

Options follow in any order, as in lora+attention+ihl:
  +attention      on the attention projections instead of the MLPs; with +mlp on both
  +ihl, +simnpo, +flooding, +wga, +satimp, +ceu, +pdu
                  this loss on the rows to forget, in place of gradient ascent (docs/losses.md);
                  numbers follow it, as in +flooding@level=2.7
  +ceiling        push a token no further than fastbound unlearn does
  +fila           for LoRA, start as LoKU does, with the part of W that matters to those rows
  +stop           end like fastbound unlearn, once the rows are forgotten and the others kept
  +ranks          the same number of parameters, spread over the layers by gradients

The output folder gets cells.jsonl, summary.json, utility.png, size.png, gradient.png and
config.yaml, which --config takes. With --resume you may add adapters, rates, ranks or
seeds.

examples:
  fastbound lab --quick --output map
  fastbound lab --adapters lora+stop,lora+ceiling,sine@0.5*spectral --lr 1e-3,1e-2 --output map
"""
RUN = "fastbound.unlearning.lab.command:run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; every default that is None here is the grid's own."""
    rows = parser.add_argument_group("model and rows")
    rows.add_argument(
        "--forget",
        metavar="FILE",
        help="rows to forget, as for fastbound unlearn (default: two invented authors)",
    )
    rows.add_argument(
        "--retain", metavar="FILE", help="rows to keep (default: eighteen invented authors)"
    )
    rows.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a pretrained model that knows both files (default: one small model per seed)",
    )
    rows.add_argument(
        "--general",
        metavar="FILE",
        help="with --model, questions with answer and perturbed_answer that are in neither file, "
        "such as TOFU's world facts (default: none)",
    )

    grid = parser.add_argument_group("grid; lists are separated by commas")
    grid.add_argument(
        "--adapters",
        metavar="LIST",
        help="adapters, as described below (default: a list for small models, another with "
        "--model; summary.json names them)",
    )
    grid.add_argument(
        "--lr",
        metavar="LIST",
        help="learning rates (default: 0.001,0.003,0.01,0.03,0.1; with --model also 0.0003)",
    )
    grid.add_argument(
        "--ranks", metavar="LIST", help="ranks of every adapter (default: 8; with --model 16)"
    )
    grid.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="run the seeds 0 to N - 1 (default: 5; with --model 3)",
    )
    grid.add_argument(
        "--steps", type=int, metavar="N", help="steps per run (default: 300; with --model 80)"
    )
    grid.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="rows to forget per step, with as many rows to keep (default: 8)",
    )
    grid.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="the most tokens of a row; one that has more is refused (default: 256)",
    )
    grid.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="float32 or bfloat16, of the frozen weights (default: float32)",
    )
    grid.add_argument(
        "--eval-rows",
        type=int,
        metavar="N",
        help="the most rows per side that are scored (default: all; with --model 40)",
    )
    grid.add_argument(
        "--quick",
        action="store_true",
        help="a smaller grid for the tiny model: 3 rates, 2 seeds and 150 steps (default: the "
        "whole grid)",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", default="lab", help="output folder (default: lab)")
    run.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes of one thread each (default: one per core, as far as memory allows)",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue the map in --output (default: refuse a folder that holds one)",
    )
