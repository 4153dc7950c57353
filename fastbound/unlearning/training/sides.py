"""The encoded rows of a run: to forget, to retain, and "I don't know" if a loss needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbound.errors import InputError
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import (
    Batch,
    Encoded,
    answer_length,
    collate,
    encode_all,
    padding,
)
from fastbound.unlearning.data.rows import Row, check_disjoint, load_rows
from fastbound.unlearning.losses import answer_tokens
from fastbound.unlearning.losses.objective import refusals
from fastbound.unlearning.model import autocast, forward

Pairs = tuple[Sequence[int], Sequence[int]]  # indices of the forget and of the retain rows


@dataclass(frozen=True)
class Sides:
    """The rows of each side.

    Attributes:
        refused: for each row of `forget` its question with "I don't know", or empty.
        pad: the token to pad with.
    """

    forget: Sequence[Encoded]
    retain: Sequence[Encoded]
    refused: Sequence[Encoded]
    pad: int

    def batch(self, pairs: Pairs) -> tuple[Batch, tuple[int, ...]]:
        """The rows to forget, to retain and to refuse in one batch, and how many of each."""
        parts = [[self.forget[i] for i in pairs[0]], [self.retain[i] for i in pairs[1]]]
        if self.refused:
            parts.append([self.refused[i] for i in pairs[0]])
        rows = [row for part in parts for row in part]
        return collate(rows, self.pad), tuple(map(len, parts))

    def answer_lengths(self) -> tuple[list[int], list[int]]:
        """The number of answer tokens in each row to forget and in each row to retain."""
        forget, retain = (
            [answer_length(row) for row in side] for side in (self.forget, self.retain)
        )
        return forget, retain

    def most_positions(self, batch_size: int) -> int:
        """Tokens, padding included, in the largest possible batch of that many pairs."""
        sides = [side for side in (self.forget, self.retain, self.refused) if side]
        return batch_size * len(sides) * max(len(row.ids) for side in sides for row in side)

    def where(self, batches: Iterable[Pairs]) -> list[str]:
        """File and number of every row in some batches, those to forget first."""
        batches = list(batches)
        rows = [self.forget[i] for pairs in batches for i in pairs[0]]
        rows += [self.retain[i] for pairs in batches for i in pairs[1]]
        return [row.where for row in rows]


def encode_sides(
    forget: str | Path | Sequence[Row],
    retain: str | Path | Sequence[Row],
    tokenizer: Any,
    config: UnlearnConfig,
    *,
    refuse: bool,
) -> Sides:
    """Encode both sides; `refuse` adds an "I don't know" for each row to forget.

    Raises:
        InputError: a side is empty, they share a row, or a row cannot be used.
    """
    forget_rows = _rows(forget)
    retain_rows = _rows(retain)
    check_disjoint(forget_rows, retain_rows)
    to_forget, to_retain, refused = (
        encode_all(rows, tokenizer, max_length=config.max_length, template=config.template)
        for rows in (forget_rows, retain_rows, refusals(forget_rows) if refuse else ())
    )
    return Sides(to_forget, to_retain, refused, padding(tokenizer))


def mean_loss(
    rows: Sequence[Encoded],
    pad: int,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Callable[[nn.Module], Iterator[Tensor]]:
    """Losses of one batch each, which add up to the mean cross-entropy over all answer tokens."""
    tokens = sum(map(answer_length, rows))

    def parts(model: nn.Module) -> Iterator[Tensor]:
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], pad).to(device)
            with autocast(device, dtype):
                logits = forward(model, batch.input_ids, batch.attention_mask)
            yield answer_tokens(logits, batch.labels).loss.sum() / tokens

    return parts


def _rows(source: str | Path | Sequence[Row]) -> Sequence[Row]:
    rows = load_rows(source) if isinstance(source, (str, Path)) else source
    if not rows:
        raise InputError("forget and retain need at least one row each")
    return rows
