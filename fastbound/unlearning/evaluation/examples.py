"""A few questions with the model's own answers, before unlearning and after, for people to read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import IGNORED, answer_length, encode_all, padding
from fastbound.unlearning.data.limits import check_fits
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.evaluation.generation import continuations
from fastbound.unlearning.model import autocast, autocast_dtype, evaluating
from fastbound.unlearning.training.result import UnlearnResult

SHOWN = 5  # questions of each side
_WIDTH = 100


def chosen(forget: Sequence[Row], retain: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows to show: up to `SHOWN` per side that have a question, evenly spaced."""
    sides = {"forget": forget, "retain": retain}
    asked = {side: [row for row in rows if row.question] for side, rows in sides.items()}
    return {side: list(evenly(rows, SHOWN)) for side, rows in asked.items()}


def answers(
    model: nn.Module, tokenizer: Any, rows: Mapping[str, Sequence[Row]], config: UnlearnConfig
) -> dict[str, list[str]]:
    """The model's own greedy answers, with as many tokens as the right answer has.

    Raises InputError for a row that does not fit the model, or `config.max_length`.
    """
    found: dict[str, list[str]] = {}
    device = next(model.parameters()).device
    for side, each in rows.items():
        if not each:
            found[side] = []
            continue
        encoded = encode_all(
            each, tokenizer, max_length=config.max_length, template=config.template
        )
        check_fits(model, tokenizer, encoded)
        prompts = [
            [i for i, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]
            for row in encoded
        ]
        most = [answer_length(row) for row in encoded]
        with evaluating(model), autocast(device, autocast_dtype(config.dtype)):
            new = continuations(
                model, prompts, most, pad=padding(tokenizer), end=tokenizer.eos_token_id
            )
        found[side] = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
    return found


def examples_of(
    result: UnlearnResult, tokenizer: Any, forget: Sequence[Row], retain: Sequence[Row]
) -> list[dict[str, str]]:
    """The rows to show with both answers, computed with the run's final weights.

    All processes of a run must call this, because the weights may be sharded over them.
    """
    rows = chosen(forget, retain)
    with result.disabled():
        before = answers(result.model, tokenizer, rows, result.config)
    return examples(rows, before, answers(result.model, tokenizer, rows, result.config))


def examples(
    rows: Mapping[str, Sequence[Row]],
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
) -> list[dict[str, str]]:
    """One entry per question, as JSON holds it: side, question, answer, before and after."""
    return [
        {
            "side": side,
            "question": row.question or "",
            "answer": row.answer,
            "before": b,
            "after": a,
        }
        for side, each in rows.items()
        for row, b, a in zip(each, before[side], after[side], strict=True)
    ]


def lines_of(runs: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """The lines for a terminal: each question, followed by the answers before and after.

    Args:
        runs: examples of the same questions, by the name for the answers after a run.
    """
    lines = []
    width = max(map(len, ("before", *runs))) + 2
    for side in dict.fromkeys(each["side"] for held in runs.values() for each in held):
        lines += ["", f"{side.capitalize()} rows, answered by the model itself:"]
        sided = [[each for each in held if each["side"] == side] for held in runs.values()]
        for of_each in zip(*sided, strict=True):
            lines.append(_short("  ", of_each[0]["question"]))
            said = {"before": of_each[0]["before"]}
            said |= {name: each["after"] for name, each in zip(runs, of_each, strict=True)}
            lines += [_short(f"    {name + ':':{width}}", text) for name, text in said.items()]
    return lines


def _short(before: str, text: str) -> str:
    return before + textwrap.shorten(text, _WIDTH - len(before), placeholder=" ...")
