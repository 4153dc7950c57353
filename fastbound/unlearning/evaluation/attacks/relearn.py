"""Relearning: a few steps on a tenth of the forget rows, on retain rows, or on unrelated ones.

Hu et al. 2024, "Jogging the memory of unlearned models through targeted relearning attacks": where
rows that were not relearned come back, they were hidden, not forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from fastbound.errors import NonFiniteError
from fastbound.unlearning.data.encoding import Encoded, collate, padding
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.evaluation.attacks.subject import (
    BEFORE,
    REFERENCE,
    UNLEARNED,
    Records,
    Subject,
    as_dict,
    percent,
    recovered,
)
from fastbound.unlearning.evaluation.picture import BLUE, GREY, LEGEND, RED
from fastbound.unlearning.losses import answer_tokens
from fastbound.unlearning.metrics.answers import Score
from fastbound.unlearning.model import forward, quiet

NAME = "relearn"
MEASUREMENTS = 10  # of a curve, beside its start
RANK = 16  # of LoRA
_COLOURS = {"forget": RED, "retain": BLUE, "unrelated": GREY}


def run(
    subject: Subject, rows: Mapping[str, Sequence[Encoded]], records: Records
) -> dict[str, Any]:
    """Curves of the forget rows that are not relearned, for each kind of rows that is.

    Args:
        rows: "forget", at least two and none of them twice, and "retain" and "unrelated" where
            there are some.

    Raises NonFiniteError where relearning at this rate does not stay finite.
    """
    config = subject.config
    forget = list(rows["forget"])
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(forget), generator=generator).tolist()
    again = min(len(forget) - 1, max(1, round(config.share * len(forget))))
    held = evenly([forget[i] for i in sorted(order[again:])], config.rows)
    taught = {"forget": [forget[i] for i in order[:again]]}
    taught.update({side: list(each) for side, each in rows.items() if side != "forget" and each})
    every = [row for each in rows.values() for row in each]
    before = None
    if BEFORE in subject.models:
        before = subject.score(subject.load(BEFORE, every), held)
    curves = []
    for name in (UNLEARNED, REFERENCE):
        for side, each in taught.items() if name in subject.models else ():
            scores = _relearned(subject, subject.load(name, every), each, held)
            start, known = scores[0][1], before if name == UNLEARNED else None
            curves.append(
                {
                    "model": name,
                    "rows": side,
                    "taught": len(each),
                    "steps": [
                        {
                            "step": step,
                            **as_dict(score, recovered(score, start, known)),
                        }
                        for step, score in scores
                    ],
                }
            )
    return {
        "measured": len(held),
        "before": None if before is None else as_dict(before),
        "curves": curves,
    }


def _relearned(
    subject: Subject, model: nn.Module, rows: Sequence[Encoded], held: Sequence[Encoded]
) -> list[tuple[int, Score]]:
    """The held rows by step, while the model is trained on `rows`."""
    config = subject.config
    model, weights = _trained(model, config.weights, config.seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)
    pad, size = padding(subject.tokenizer), min(config.batch_size, len(rows))
    queue: list[int] = []
    scores = [(0, subject.score(model, held))]
    points = {round(config.steps * k / MEASUREMENTS) for k in range(1, MEASUREMENTS + 1)}
    model.train()
    for step in range(1, config.steps + 1):
        if len(queue) < size:
            queue += torch.randperm(len(rows), generator=generator).tolist()
        chosen, queue = queue[:size], queue[size:]
        batch = collate([rows[i] for i in chosen], pad).to(device)
        optimizer.zero_grad(set_to_none=True)
        logits = forward(model, batch.input_ids, batch.attention_mask)
        loss = answer_tokens(logits, batch.labels).loss.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        if not math.isfinite(loss.item()):
            raise NonFiniteError(
                f"relearning stopped being finite at step {step}: try a lower --lr than "
                f"{config.lr:g}, or --dtype float32"
            )
        optimizer.step()
        if step in points:
            scores.append((step, subject.score(model, held)))
    return scores


def _trained(model: nn.Module, which: str, seed: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model and what relearning trains of it."""
    if which == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        with quiet():
            model = cast(nn.Module, get_peft_model(cast(Any, model), settings))
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return model, [p for p in model.parameters() if p.requires_grad]


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """Head and lines: a curve each, at its start, its half and its end."""
    found = [["model", "relearned", "rows", "accuracy at 0", "half", "end", "recovered at the end"]]
    for curve in result["curves"]:
        steps = curve["steps"]
        shown = [steps[0], steps[len(steps) // 2], steps[-1]]
        found.append(
            [
                curve["model"],
                curve["rows"],
                str(curve["taught"]),
                *(percent(each["accuracy"]) for each in shown),
                percent(steps[-1]["recovered"]),
            ]
        )
    return found


def draw(panel: Any, result: Mapping[str, Any]) -> None:
    """Accuracy on the held rows by step."""
    for curve in result["curves"]:
        own = curve["model"] == UNLEARNED
        panel.plot(
            [each["step"] for each in curve["steps"]],
            [each["accuracy"] for each in curve["steps"]],
            color=_COLOURS[curve["rows"]],
            linestyle="-" if own else ":",
            marker=".",
            label=curve["rows"] + ("" if own else " (reference)"),
        )
    if result["before"] is not None:
        panel.axhline(result["before"]["accuracy"], color="0.3", ls="--", lw=1, label="before")
    panel.set_title(f"Relearning: {result['measured']} forget rows not relearned")
    panel.set_xlabel("step of relearning")
    panel.set_ylabel("share of answer tokens right")
    panel.set_ylim(-0.02, 1.02)
    panel.legend(**LEGEND)
