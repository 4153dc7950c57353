"""TDEC's evaluation of a model: extraction likelihood and memorisation accuracy of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbound.errors import InputError, NonFiniteError
from fastbound.unlearning.data.encoding import Encoded, collate
from fastbound.unlearning.evaluation import score_validation, tdec
from fastbound.unlearning.evaluation.generation import continuations, stop_tokens
from fastbound.unlearning.evaluation.session import Session
from fastbound.unlearning.evaluation.templates import end_of_text
from fastbound.unlearning.metrics.memorisation import extraction_likelihood, memorisation_accuracy
from fastbound.unlearning.model import forward


@dataclass(frozen=True)
class Prepared:
    """The sequences to extract, and the validation sets that stand beside them."""

    sequences: Sequence[Encoded]
    validation: Mapping[str, score_validation.Prepared]

    @property
    def encoded(self) -> list[Encoded]:
        validation = (row for part in self.validation.values() for row in part.encoded)
        return [*self.sequences, *validation]


def prepare(
    split: str,
    data: str | Path | None,
    tokenizer: Any,
    *,
    n: int = 10,
    most_rows: int | None = None,
) -> Prepared:
    """Load the sequences as at most 200 tokens each, every one longer than `n`."""
    end_of_text(tokenizer)
    rows = []
    for row in tdec.sequences(split, data)[:most_rows]:
        ids = row.tokens or tuple(tokenizer(row.answer, verbose=False)["input_ids"])
        ids = ids[: tdec.TARGET_LENGTH]
        if len(ids) <= n:
            raise InputError(f"{row.where}: {len(ids)} tokens are too few for EL_{n}: lower --n")
        if max(ids) >= len(tokenizer):
            raise InputError(
                f"{row.where}: token {max(ids)} is not in the tokenizer's {len(tokenizer)}: the "
                "file was made with another tokenizer"
            )
        rows.append(Encoded(ids, ids, row.where))
    sets = score_validation.prepare(data, tokenizer, most_rows=most_rows)
    return Prepared(rows, sets)


def score(session: Session, prepared: Prepared, *, n: int = 10) -> dict[str, Any]:
    """A log: EL_n and MA of each sequence, each saved as soon as it is known; validation sets."""
    found = session.each(
        f"EL_{n} and MA",
        prepared.sequences,
        lambda part: [_sequence(session, row.ids, n) for row in part],
        length=lambda row: len(row.ids),
        batch_size=1,
    )
    return {
        "n": n,
        "extraction_likelihood": [each["el"] for each in found],
        "memorisation_accuracy": [each["ma"] for each in found],
        "validation": score_validation.score(session, prepared.validation),
    }


def _sequence(session: Session, ids: Sequence[int], n: int) -> dict[str, float]:
    predicted = first_choices(session, ids)
    found = prefix_continuations(session, ids, predicted)
    return {
        "el": extraction_likelihood(found, ids, n),
        "ma": memorisation_accuracy(predicted, ids),
    }


@torch.no_grad()
def first_choices(session: Session, ids: Sequence[int]) -> list[int]:
    """argmax p(. | x_<i) for i = 1 .. T-1, from one forward."""
    batch = collate([Encoded(tuple(ids), tuple(ids), "")], session.pad).to(session.model.device)
    logits = forward(session.model, batch.input_ids, batch.attention_mask)
    if not torch.isfinite(logits).all():  # argmax would choose a token all the same
        raise NonFiniteError(
            "logits of a sequence are not finite; the model is broken or overflows in "
            f"{session.model.dtype}: try --dtype float32"
        )
    return list(logits[0, :-1].argmax(-1).tolist())


def prefix_continuations(
    session: Session, ids: Sequence[int], predicted: Sequence[int]
) -> list[list[int]]:
    """Greedy continuation of every prefix x_<i, i = 1 .. T-1, up to T tokens in all.

    Where the model's first choice is x_i itself, the continuation is x_i and then that of the next
    prefix: only prefixes that the model gets wrong are generated.
    """
    from tqdm.auto import tqdm

    T = len(ids)
    wrong = [i for i in range(1, T) if predicted[i - 1] != ids[i]]
    generated: dict[int, list[int]] = {}
    with tqdm(
        total=len(wrong),
        desc="prefixes",
        disable=not session.progress,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        for start in range(0, len(wrong), session.batch_size):
            part = wrong[start : start + session.batch_size]
            prompts, most = [ids[:i] for i in part], [T - i for i in part]
            new = continuations(session.model, prompts, most, pad=session.pad, end=session.end)
            generated.update(zip(part, new, strict=True))
            bar.update(len(part))
    stops = stop_tokens(session.model, session.end)
    found: list[list[int]] = []
    after: list[int] = []
    for i in reversed(range(1, T)):
        own = [] if ids[i] in stops else [ids[i], *after]
        after = generated.get(i, own)
        found.append(after)
    return found[::-1]
