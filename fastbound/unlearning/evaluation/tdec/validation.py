"""TDEC's validation sets scored: what is left of language modelling, knowledge and dialogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastbound.errors import InputError
from fastbound.unlearning.data.encoding import IGNORED, Encoded, beginning
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.evaluation.generation import until
from fastbound.unlearning.evaluation.session import Session
from fastbound.unlearning.evaluation.tdec import sets
from fastbound.unlearning.metrics.texts import exact_match, unigram_f1

# The original's `input_length` and `output_length`: tokens of a text, and of question and answer.
MAX_LENGTH = 512
REPLY_TOKENS = 32
_NEXT_TURN = ("\nUser ",)


@dataclass(frozen=True)
class Prepared:
    """One set as tokens.

    Attributes:
        scored: a text with every token labelled, or a question with its labelled answer; of
            choices all those of a row after all of the row before.
        prompts: the questions alone, for dialogues.
    """

    rows: Sequence[Row]
    scored: Sequence[Encoded]
    prompts: Sequence[Encoded] = ()

    @property
    def encoded(self) -> list[Encoded]:
        return [*self.scored, *self.prompts]


def prepare(
    data: str | Path | None, tokenizer: Any, *, most_rows: int | None = None
) -> dict[str, Prepared]:
    """Load and encode every set that the folder holds."""
    return {
        name: _prepare(name, sets.read(name, path)[:most_rows], tokenizer)
        for name, path in sets.find(data).items()
    }


def score(session: Session, prepared: Mapping[str, Prepared]) -> dict[str, dict[str, Any]]:
    """For each set its scores row by row, by the kind of set.

    text        mean loss and tokens
    completion  summed loss; whether the first choices are the word; F1 of both; both
    choice      summed loss of every choice; whether the right one has the lowest
    dialogue    mean loss and tokens of the reply; F1 of the generated one; both
    """
    return {name: _SCORES[_kind(name)](session, name, part) for name, part in prepared.items()}


def summarise(log: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy, F1, loss and perplexity of each set, as far as it has them, and its rows.

    Accuracy and F1 are means over rows. A loss is nats a token over all tokens of the set, of
    completions nats a word; the original's is a mean over batches, which is this for one batch.
    """
    return {name: _summary(_kind(name), scores) for name, scores in log.items()}


def _kind(name: str) -> str:
    for kind, names in (
        ("text", sets.TEXTS),
        ("completion", sets.COMPLETIONS),
        ("dialogue", sets.DIALOGUES),
    ):
        if name in names:
            return kind
    return "choice"


def _prepare(name: str, rows: Sequence[Row], tokenizer: Any) -> Prepared:
    if name in sets.TEXTS:
        return Prepared(rows, [_text(row, tokenizer) for row in rows])
    scored = [
        _continued(row.question or "", answer, row.where, tokenizer)
        for row in rows
        for answer in (row.choices if isinstance(row, sets.ChoiceRow) else (row.answer,))
    ]
    if name not in sets.DIALOGUES:
        return Prepared(rows, scored)
    asked = [Encoded(tuple(_ids(tokenizer, r.question or "")), (), r.where) for r in rows]
    return Prepared(rows, scored, asked)


def _text(row: Row, tokenizer: Any) -> Encoded:
    ids = _ids(tokenizer, row.answer)
    if len(ids) < 2:
        raise InputError(f"{row.where}: a text of {len(ids)} tokens has none to predict")
    return Encoded(tuple(ids), (IGNORED, *ids[1:]), row.where)


def _continued(question: str, answer: str, where: str, tokenizer: Any) -> Encoded:
    """Question and answer tokenised apart, cut on the left where both are too long."""
    before = _ids(tokenizer, question)
    after = _ids(tokenizer, answer, add_special_tokens=False)
    if not before or not after:
        raise InputError(f"{where}: no token is left of the {'answer' if before else 'question'}")
    ids = (before + after)[-MAX_LENGTH:]
    # The first token has nothing before it that predicts it.
    known = max(1, len(ids) - len(after))
    return Encoded(tuple(ids), (*[IGNORED] * known, *ids[known:]), where)


def _ids(tokenizer: Any, text: str, **settings: bool) -> list[int]:
    text = beginning(text, tokenizer, MAX_LENGTH)
    return list(tokenizer(text, verbose=False, **settings)["input_ids"])[:MAX_LENGTH]


def _score_texts(session: Session, name: str, part: Prepared) -> dict[str, Any]:
    found = session.answers(name, part.scored)
    return {field: [each[field] for each in found] for field in ("loss", "tokens")}


def _score_completions(session: Session, name: str, part: Prepared) -> dict[str, Any]:
    found = session.first_choices(name, part.scored)
    words = [row.answer.strip() for row in part.rows]
    texts = [each["text"].strip() for each in found]
    return {
        "loss": [each["loss"] * each["tokens"] for each in found],
        "correct": [
            each["correct"] or exact_match(word, text)
            for word, text, each in zip(words, texts, found, strict=True)
        ],
        "f1": [unigram_f1(word, text) for word, text in zip(words, texts, strict=True)],
        "generated_text": [list(pair) for pair in zip(texts, words, strict=True)],
    }


def _score_choices(session: Session, name: str, part: Prepared) -> dict[str, Any]:
    flat = iter(session.answers(name, part.scored))
    rows = [row for row in part.rows if isinstance(row, sets.ChoiceRow)]
    losses = [
        [each["loss"] * each["tokens"] for each in islice(flat, len(row.choices))] for row in rows
    ]
    chosen = [int(np.argmin(each)) for each in losses]
    correct = [choice == row.right for choice, row in zip(chosen, rows, strict=True)]
    return {"choice_loss": losses, "correct": correct}


def _score_dialogues(session: Session, name: str, part: Prepared) -> dict[str, Any]:
    log = _score_texts(session, name, part)
    most = [REPLY_TOKENS] * len(part.prompts)
    texts = [
        until(text, _NEXT_TURN)
        for text in session.texts(f"{name} texts", [p.ids for p in part.prompts], most)
    ]
    pairs = [(text, row.answer) for text, row in zip(texts, part.rows, strict=True)]
    log["f1"] = [unigram_f1(reply, text) for text, reply in pairs]
    log["generated_text"] = [list(pair) for pair in pairs]
    return log


_SCORES: Mapping[str, Callable[[Session, str, Prepared], dict[str, Any]]] = {
    "text": _score_texts,
    "completion": _score_completions,
    "choice": _score_choices,
    "dialogue": _score_dialogues,
}


def _summary(kind: str, scores: Mapping[str, Any]) -> dict[str, float]:
    summary: dict[str, float] = {"rows": len(next(iter(scores.values())))}
    if "correct" in scores:
        summary["accuracy"] = float(np.mean(scores["correct"]))
    if "f1" in scores:
        summary["f1"] = float(np.mean(scores["f1"]))
    if "tokens" in scores:
        summary["loss"] = float(np.average(scores["loss"], weights=scores["tokens"]))
    elif "loss" in scores:
        summary["loss"] = float(np.mean(scores["loss"]))
    if kind == "text":
        summary["perplexity"] = float(np.exp(summary["loss"]))
    return summary


def table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line per set."""
    columns = {"accuracy": ".4f", "f1": ".4f", "loss": ".4f", "perplexity": ".2f"}
    if not found:
        return []
    head = f"{'validation set':24}{'rows':>6}" + "".join(f"{name:>12}" for name in columns)
    lines = [head, "─" * len(head)]
    for name, each in found.items():
        cells = (f"{each[c]:{form}}" if c in each else "" for c, form in columns.items())
        lines.append(f"{name:24}{each['rows']:6}" + "".join(f"{cell:>12}" for cell in cells))
    return [line.rstrip() for line in lines]
