"""From rows to tokens: the template, which tokens are labelled, and padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbound.errors import InputError
from fastbound.unlearning.data.rows import Row, as_text

IGNORED = -100  # the label that cross-entropy ignores, here and in transformers
_CHARACTERS = 64  # few tokens have this many characters
TEMPLATE = "Question: {question}\nAnswer: {answer}"


@dataclass(frozen=True)
class Encoded:
    """One row as tokens.

    Attributes:
        ids: tokens of prompt, answer and end of text.
        labels: the same as `ids` for answer and end of text, `IGNORED` for the prompt.
        where: file and number of the row, for messages.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length: three int64 tensors `[rows, length]`."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        moved = (t.to(device) for t in (self.input_ids, self.attention_mask, self.labels))
        return Batch(*moved)


def check_template(template: str) -> None:
    """Raise `InputError` unless it is "chat" or contains {question} and ends in {answer}."""
    if template == "chat":
        return
    if template.count("{question}") != 1 or template.count("{answer}") != 1:
        raise InputError(f"template must hold {{question}} and {{answer}} once each: {template!r}")
    if not template.endswith("{answer}"):
        raise InputError(f"template must end in {{answer}}: {template!r}")


def encode(row: Row, tokenizer: Any, *, max_length: int = 256, template: str = TEMPLATE) -> Encoded:
    """Tokens and labels of one row: question tokens are `IGNORED`, the end of text is labelled.

    The whole text is tokenised at once, so that tokens may span the boundary; a token that contains
    part of the answer counts as answer. In a row of plain text every token is labelled.

    Args:
        row: the row to encode.
        tokenizer: a fast tokenizer of transformers with an end-of-text token.
        max_length: the largest number of tokens that a row may have.
        template: text with `{question}` and `{answer}`, or `"chat"` for the tokenizer's own
            chat template (the user asks, the assistant answers).

    Raises:
        InputError: the row has more than `max_length` tokens, or its answer none; its text cannot
            be tokenised; or the tokenizer lacks character offsets or an end-of-text token.
    """
    as_text(row.answer, "the answer", row.where)
    if row.question is not None:
        as_text(row.question, "the question", row.where)
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} has no character offsets: use the fast tokenizer"
        )
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("the tokenizer has no end-of-text token: set tokenizer.eos_token")
    prompt, special = _prompt(row, tokenizer, template)
    kind = "the text takes" if row.question is None else "question and answer take"
    text = prompt + row.answer
    if beginning(text, tokenizer, max_length) != text:
        raise InputError(
            f"{row.where}: {kind} more than {2 * max_length} tokens ({len(text)} characters), more "
            f"than the {max_length} of max_length: shorten the row"
        )
    tokens = tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=True,
        verbose=False,  # our own message below names the row
    )
    ids: list[int] = list(tokens["input_ids"])
    # The answer begins where generation does: after a text's prompt without its last blank, but
    # after a chat's prompt as it stands.
    begin = len(prompt.rstrip() if special else prompt)
    answered = [stop > begin for _, stop in tokens["offset_mapping"]]
    if not any(answered):
        raise InputError(f"{row.where}: the tokenizer makes no token of the answer {row.answer!r}")
    if ids[-1] != end or answered[-1]:
        ids.append(end)
        answered.append(True)
    answered[-1] = True
    if len(ids) > max_length:
        raise InputError(
            f"{row.where}: {kind} {len(ids)} tokens, more than the {max_length} of max_length: "
            f"raise it to {len(ids)} or shorten the row"
        )
    labels = (i if a else IGNORED for i, a in zip(ids, answered, strict=True))
    return Encoded(tuple(ids), tuple(labels), row.where)


def encode_all(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int = 256, template: str = TEMPLATE
) -> list[Encoded]:
    """`encode` every row. Raises InputError, which names the first row that does not fit."""
    check_template(template)
    return [encode(row, tokenizer, max_length=max_length, template=template) for row in rows]


def collate(rows: Sequence[Encoded], pad: int) -> Batch:
    """Pad `rows` on the right with token `pad`; padding is masked and never labelled."""
    length = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    for i, row in enumerate(rows):
        used = len(row.ids)
        input_ids[i, :used] = torch.tensor(row.ids)
        attention_mask[i, :used] = 1
        labels[i, :used] = torch.tensor(row.labels)
    return Batch(input_ids, attention_mask, labels)


def padding(tokenizer: Any) -> int:
    """The token to pad with: the tokenizer's own, or else end of text; it is masked either way."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def _prompt(row: Row, tokenizer: Any, template: str) -> tuple[str, bool]:
    """The text before the answer, and whether special tokens have yet to be added."""
    if row.question is None:
        return "", True
    if template != "chat":
        before, _, _ = template.partition("{answer}")
        return before.replace("{question}", row.question), True
    turns = [{"role": "user", "content": row.question}]
    return chat_text(turns, tokenizer, row.where, add_generation_prompt=True), False


def chat_text(
    turns: Sequence[Mapping[str, str]], tokenizer: Any, where: str, **settings: Any
) -> str:
    """The text that the tokenizer's chat template makes of `turns`, each a role and its content.

    Args:
        where: file and row, for messages.
        settings: passed on to `apply_chat_template`.

    Raises:
        InputError: there is no template, it fails, or it omits what the user or assistant says.
    """
    remedy = "give a text template, or correct the tokenizer's chat_template"
    if not tokenizer.chat_template:
        raise InputError(
            'template "chat": the tokenizer has no chat template; give a text template'
        )
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **settings)
    except Exception as error:  # Jinja's, or whatever an expression in the template raises
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f'{where}: template "chat": the tokenizer\'s template fails ({type(error).__name__}: '
            f"{reason}); {remedy}"
        ) from error
    for turn in turns:
        if turn["role"] != "system" and turn["content"].strip() not in text:
            raise InputError(
                f'{where}: template "chat": the tokenizer\'s template omits or changes what the '
                f"{turn['role']} says; {remedy}"
            )
    return str(text)


def beginning(text: str, tokenizer: Any, most: int) -> str:
    """`text`, or the beginning of a very long one, with more than twice `most` tokens.

    A tokenizer takes 270 times the memory of the text. A long text is therefore not tokenised as a
    whole only to find that it does not fit, or to keep its first tokens; the rest of it affects
    only the tokens near the cut.
    """
    size = _CHARACTERS * most
    while size < len(text):
        if len(tokenizer(text[:size], verbose=False)["input_ids"]) > 2 * most:
            return text[:size]
        size *= 2
    return text


def answer_length(row: Encoded) -> int:
    """The number of tokens to predict: all labelled tokens except a row's very first token."""
    return sum(label != IGNORED for label in row.labels[1:])
