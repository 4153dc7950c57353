"""From question and answer to tokens and labels, as in each benchmark's own code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastbound.errors import InputError, one_of
from fastbound.unlearning.data.encoding import (
    IGNORED,
    Encoded,
    answer_length,
    beginning,
    chat_text,
)
from fastbound.unlearning.metrics.conventions import OPEN_UNLEARNING


@dataclass(frozen=True)
class Template:
    """The text around a question and before its answer."""

    question_start: str
    question_end: str
    answer: str


_QUESTION_ANSWER = Template("Question: ", "\n", "Answer: ")
FAMILIES = {
    "llama2": Template("[INST] ", " [/INST]", ""),
    "phi": _QUESTION_ANSWER,
    "stablelm": _QUESTION_ANSWER,
    "pythia": _QUESTION_ANSWER,
}
CHAT = "chat"  # the tokenizer's own template
MAX_LENGTH = 500
_MOST = 2**16  # largest number of tokens of a chat, which is never truncated
# open-unlearning fixes both, so that tokens do not depend on the current date.
SYSTEM = "You are a helpful assistant."
DATE = "10 Apr 2025"


def check_family(family: str) -> None:
    """Raise `InputError`, which lists the known ones, for an unknown template family."""
    one_of("template", family, (*FAMILIES, CHAT))


def encode_answer(
    question: str,
    answer: str,
    where: str,
    tokenizer: Any,
    *,
    family: str = "phi",
    convention: str = OPEN_UNLEARNING,
    max_length: int = MAX_LENGTH,
) -> Encoded:
    """Tokens with the answer and one end of text labelled.

    As in both codes, as many tokens are unlabelled as the prompt has, including special tokens:

        open-unlearning   the prompt ends with the tag before the answer ("Answer: ")
        tofu              it ends with the question, so that tag is labelled like the answer

    A text truncated at `max_length` has no end of text in TOFU's code, but has one in
    open-unlearning's.

    Raises:
        InputError: the tokenizer has no end of text, or no label is left after masking.
    """
    end = end_of_text(tokenizer)
    if family == CHAT:
        whole = _chat(question, answer, where, tokenizer)
        asked = _chat(question, None, where, tokenizer)
        if not whole.startswith(asked):
            raise InputError(
                f'{where}: template "chat": with an answer the tokenizer\'s own does not begin as '
                f"it does without, {asked[-40:]!r} at its end: it cannot be told where the answer "
                f"begins; give {', '.join(FAMILIES)}"
            )
        ids = _chat_tokens(tokenizer, whole)
        prompt = len(_chat_tokens(tokenizer, asked))
        cut = False
    else:
        before, tag = _around(question, family)
        ids = _tokens(tokenizer, before + tag + answer, max_length)
        prompt = len(_tokens(tokenizer, _shown(before, tag, convention), max_length))
        cut = prompt == max_length  # nothing of the answer, though an end of text may follow
    if convention == OPEN_UNLEARNING:
        ids = ids if ids and ids[-1] == end else [*ids, end]
    elif len(ids) < max_length:
        ids = [*ids, end]
    labels = [IGNORED] * min(prompt, len(ids)) + ids[prompt:]
    if cut or all(label == IGNORED for label in labels[1:]):
        raise InputError(
            f"{where}: no token of the answer is left to score: its {len(ids)} tokens are all "
            f"prompt (max_length {max_length}); raise max_length or shorten the question"
        )
    return Encoded(tuple(ids), tuple(labels), where)


def encode_prompt(
    question: str,
    tokenizer: Any,
    *,
    family: str = "phi",
    convention: str = OPEN_UNLEARNING,
    max_length: int = MAX_LENGTH,
) -> list[int]:
    """The prompt's tokens: all those that `encode_answer` leaves unlabelled."""
    if family == CHAT:
        where = f"question {question[:60]!r}"
        return _chat_tokens(tokenizer, _chat(question, None, where, tokenizer))
    return _tokens(tokenizer, _shown(*_around(question, family), convention), max_length)


class EmptyAnswerWarning(UserWarning):
    """Some answers have only their end of text labelled, so that their loss is of that token."""


def warn_of_empty_answers(name: str, rows: Sequence[Encoded], end: int) -> None:
    """Warn if some answers have only their end of text labelled: how many, and the first."""
    empty = [row for row in rows if answer_length(row) == 1 and row.labels[-1] == end]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(rows)} answers of {name} are nothing but their end of text "
            f"after masking (first: {empty[0].where}): the tokenizer joins the blank that ends "
            "the prompt to the answer; use another --template",
            EmptyAnswerWarning,
            stacklevel=2,
        )


def end_of_text(tokenizer: Any) -> int:
    """The end-of-text token. Raises `InputError` if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token: set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def _around(question: str, family: str) -> tuple[str, str]:
    check_family(family)
    template = FAMILIES[family]
    return template.question_start + question + template.question_end, template.answer


def _shown(before: str, tag: str, convention: str) -> str:
    return before + tag if convention == OPEN_UNLEARNING else before


def _tokens(tokenizer: Any, text: str, max_length: int) -> list[int]:
    text = beginning(text, tokenizer, max_length)
    return list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])


def _chat(question: str, answer: str | None, where: str, tokenizer: Any) -> str:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    text = chat_text(
        turns, tokenizer, where, add_generation_prompt=answer is None, date_string=DATE
    )
    if beginning(text, tokenizer, _MOST) != text:
        raise InputError(f"{where}: takes more than {2 * _MOST} tokens: shorten the row")
    return text


def _chat_tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
