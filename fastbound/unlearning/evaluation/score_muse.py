"""MUSE's evaluation of a model: verbatim and knowledge memorisation, utility, privacy leakage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.unlearning.data.encoding import IGNORED, Encoded
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.evaluation import muse
from fastbound.unlearning.evaluation.generation import until
from fastbound.unlearning.evaluation.session import Session
from fastbound.unlearning.evaluation.templates import end_of_text
from fastbound.unlearning.metrics.conventions import MUSE
from fastbound.unlearning.metrics.texts import rouge

VERBATIM_TOKENS = 128
ANSWER_TOKENS = 32
MAX_LENGTH = 2048
K = 0.4
# What ends an answer: the model goes on with a question of its own.
_STOPS = ("\n\n", "\nQuestion", "Question:")


@dataclass(frozen=True)
class Prompted:
    """Prompts with what a model that remembers adds to them."""

    prompts: Sequence[list[int]]
    expected: Sequence[str]
    most: int
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """Everything that is asked of the model."""

    prompted: dict[str, Prompted]
    texts: dict[str, Sequence[Encoded]]

    @property
    def encoded(self) -> list[Encoded]:
        asked = [
            Encoded(tuple(prompt), (), name)
            for name, part in self.prompted.items()
            for prompt in part.prompts
        ]
        return [*asked, *(row for rows in self.texts.values() for row in rows)]


def prepare(
    corpus: str,
    data: str | Path | None,
    tokenizer: Any,
    *,
    convention: str,
    most_rows: int | None = None,
) -> Prepared:
    """Load and encode all parts of one corpus, "news" or "books"."""
    if corpus not in muse.CORPORA:
        raise InputError(f"muse --split must be one of {', '.join(muse.CORPORA)}; got {corpus!r}")
    end_of_text(tokenizer)

    def load(split: str) -> list[Row]:
        return muse.load(f"{corpus}/{split}", data)[:most_rows]

    verbatim = load("verbmem/forget")
    expected = [row.answer for row in verbatim]
    if convention == MUSE:
        expected = [_first(tokenizer, text, VERBATIM_TOKENS) for text in expected]
    prompted = {
        "forget_verbmem": Prompted(
            [_ids(tokenizer, row.question or "") for row in verbatim], expected, VERBATIM_TOKENS
        )
    }
    for side in ("forget", "retain"):
        rows, shown = load(f"knowmem/{side}_qa"), load(f"knowmem/{side}_qa_icl")
        examples = "".join(f"Question: {r.question}\nAnswer: {r.answer}\n\n" for r in shown)
        prompted[f"{side}_knowmem"] = Prompted(
            [_ids(tokenizer, f"{examples}Question: {row.question}\nAnswer:") for row in rows],
            [row.answer for row in rows],
            ANSWER_TOKENS,
            _STOPS,
        )
    texts: dict[str, Sequence[Encoded]] = {
        side: [_text(row, tokenizer) for row in load(f"privleak/{side}")]
        for side in ("forget", "holdout")
    }
    return Prepared(prompted, texts)


def score(session: Session, prepared: Prepared, *, convention: str) -> dict[str, Any]:
    """A log: ROUGE-L F1 and text for each prompt, Min-40 % score for each text."""
    log: dict[str, Any] = {}
    for name, part in prepared.prompted.items():
        texts = session.texts(name, part.prompts, [part.most] * len(part.prompts))
        texts = [until(text, part.stops) for text in texts]
        log[name] = {
            "rougeL_f1": [
                rouge(expected, text, stemmer=convention != MUSE).rougeL_f1
                for expected, text in zip(part.expected, texts, strict=True)
            ],
            "generated_text": [list(pair) for pair in zip(texts, part.expected, strict=True)],
        }
    log["privleak"] = {
        side: session.attacks(f"privleak {side}", rows, k=K, convention=convention)
        for side, rows in prepared.texts.items()
    }
    return log


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"])


def _first(tokenizer: Any, text: str, tokens: int) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _text(row: Row, tokenizer: Any) -> Encoded:
    ids = _ids(tokenizer, row.answer)
    if len(ids) < 4:  # of three labelled tokens, 40 % is one
        raise InputError(f"{row.where}: a text of {len(ids)} tokens has too few to score")
    return Encoded(tuple(ids), (IGNORED, *ids[1:]), row.where)
