"""Quantisation: the merged model in 8 and in 4 bits, whose rounding can undo a small change.

Zhang et al. 2024, "Catastrophic failure of LLM unlearning via quantization", arXiv 2410.16454.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from fastbound.errors import InputError, require
from fastbound.layers.base import is_conv1d
from fastbound.unlearning.data.encoding import Encoded
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.evaluation.attacks.subject import (
    BEFORE,
    UNLEARNED,
    Records,
    Subject,
    as_dict,
    percent,
    recovered,
)
from fastbound.unlearning.evaluation.picture import BLUE, LEGEND, RED

NAME = "quantize"
BITS = (8, 4)
# Weights of a row that share a scale in 4 bits: the first of these that divides its length.
GROUPS = (32, 16, 8, 4, 2)

_INT4 = torch.int4  # type: ignore[attr-defined]


def check_installed() -> None:
    """Raise InputError if torchao is not installed."""
    require("quantized", "The attack quantize", "torchao")


def quantized(model: nn.Module, bits: int) -> nn.Module:
    """All linear layers but the head rounded to nearest, in place: weights alone, symmetric.

    8 bits: a scale for each row of a weight; 4 bits: for each 32 weights of a row (16 and so on
    where 32 does not divide it, the whole row where it is odd). The model goes on computing in its
    own dtype, on any device. A `Conv1D` of transformers, as in GPT-2, becomes the `nn.Linear` that
    computes the same.

    Raises InputError for other bits, and for a model without such a layer.
    """
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    if bits not in BITS:
        raise InputError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits}")
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    for name, module in [*model.named_modules()]:
        if is_conv1d(module):
            model.set_submodule(name, _linear(cast(Any, module)))
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not layers:
        raise InputError(f"{type(model).__name__} has no nn.Linear to quantise")
    for module in layers.values():
        group = next((each for each in GROUPS if module.in_features % each == 0), None)
        config = IntxWeightOnlyConfig(
            weight_dtype=torch.int8 if bits == 8 else _INT4,
            granularity=PerAxis(0) if bits == 8 or group is None else PerGroup(group),
        )
        quantize_(module, config)
    return model


def _linear(conv: Any) -> nn.Linear:
    """The `nn.Linear` with the weights of a `Conv1D`, which holds them transposed."""
    K, N = conv.weight.shape
    layer = nn.Linear(K, N, device="meta")
    layer.weight, layer.bias = nn.Parameter(conv.weight.detach().t().contiguous()), conv.bias
    return layer


def run(
    subject: Subject, rows: Mapping[str, Sequence[Encoded]], records: Records
) -> dict[str, Any]:
    """Forget and retain rows, of the unlearned model and of that from before, by bits."""
    check_installed()
    every = [row for each in rows.values() for row in each]
    sides = {
        side: evenly(rows[side], subject.config.rows)
        for side in ("forget", "retain")
        if rows.get(side)
    }
    scores: dict[str, dict[int | None, Any]] = {}
    for name in (UNLEARNED, BEFORE):
        for bits in (None, *BITS) if name in subject.models else ():
            model = subject.load(name, every)
            model = model if bits is None else quantized(model, bits)
            found = {side: subject.score(model, each) for side, each in sides.items()}
            scores.setdefault(name, {})[bits] = found
    full = scores[UNLEARNED][None]["forget"]
    asked = (UNLEARNED, "forget")
    known = scores[BEFORE][None]["forget"] if BEFORE in scores else None
    return {
        "measured": {side: len(each) for side, each in sides.items()},
        "models": [
            {
                "model": name,
                "bits": bits,
                **{
                    side: as_dict(
                        score, recovered(score, full, known) if (name, side) == asked else None
                    )
                    for side, score in found.items()
                },
            }
            for name, by_bits in scores.items()
            for bits, found in by_bits.items()
        ],
    }


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """Head and lines: a model in so many bits each."""
    sides = list(result["measured"])
    found = [["model", "bits", *(f"{side} {m}" for side in sides for m in ("loss", "accuracy")),
              "recovered"]]  # fmt: skip
    for each in result["models"]:
        values = [
            text
            for side in sides
            for text in (f"{each[side]['loss']:.3f}", percent(each[side]["accuracy"]))
        ]
        bits = "full" if each["bits"] is None else str(each["bits"])
        found.append([each["model"], bits, *values, percent(each["forget"]["recovered"])])
    return found


def draw(panel: Any, result: Mapping[str, Any]) -> None:
    """Accuracy on the forget rows by bits, beside that of the model from before."""
    names = list(dict.fromkeys(each["model"] for each in result["models"]))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        each = [e for e in result["models"] if e["model"] == name]
        panel.bar(
            [k + place * width for k in range(len(each))],
            [e["forget"]["accuracy"] for e in each],
            width * 0.9,
            color=(RED, BLUE)[place],
            label=name,
        )
    labels = ["full" if b is None else f"{b} bit" for b in (None, *BITS)]
    panel.set_xticks([k + (len(names) - 1) * width / 2 for k in range(len(labels))], labels)
    panel.set_ylim(0, 1.02)
    panel.set_title(f"Quantisation: {result['measured']['forget']} forget rows")
    panel.set_ylabel("share of answer tokens right")
    panel.legend(**LEGEND)
