"""One evaluation of one model: batches, progress, and pieces on disk that survive a killed run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastbound.errors import NonFiniteError
from fastbound.performance.progress import progress
from fastbound.unlearning.data.encoding import IGNORED, Encoded, collate, padding
from fastbound.unlearning.evaluation.generation import continuations
from fastbound.unlearning.evaluation.templates import end_of_text
from fastbound.unlearning.metrics.memorisation import exact_memorisation, extraction_strength
from fastbound.unlearning.metrics.privacy import min_k
from fastbound.unlearning.metrics.tokens import AnswerScore, answer_scores
from fastbound.unlearning.model import forward
from fastbound.unlearning.runs.lines import CheckedLines

T = TypeVar("T")


class Pieces:
    """The values of finished batches.

    Args:
        lines: the file in which they are kept; None keeps them nowhere.
    """

    def __init__(self, lines: CheckedLines | None = None) -> None:
        self._lines = lines
        self._values: dict[tuple[str, int], list[Any]] = {}
        for piece in () if lines is None else lines.read():
            self._values[piece["name"], piece["batch"]] = piece["values"]

    def get(self, name: str, batch: int) -> list[Any] | None:
        return self._values.get((name, batch))

    def put(self, name: str, batch: int, values: list[Any]) -> None:
        self._values[name, batch] = values
        if self._lines is not None:
            self._lines.add({"name": name, "batch": batch, "values": values})


@dataclass
class Session:
    """A model under evaluation.

    Attributes:
        model: causal language model of transformers, in eval mode, on its device.
        tokenizer: its tokenizer.
        batch_size: rows per batch.
        pieces: the values that are already computed.
        progress: whether to show a bar for each part.
        reference: another model, for the membership attack "reference".
    """

    model: Any
    tokenizer: Any
    batch_size: int
    pieces: Pieces
    progress: bool = True
    reference: Any = None

    def __post_init__(self) -> None:
        self.end = end_of_text(self.tokenizer)
        self.pad = padding(self.tokenizer)

    def each(
        self,
        name: str,
        items: Sequence[T],
        compute: Callable[[list[T]], list[Any]],
        *,
        length: Callable[[T], int],
        batch_size: int | None = None,
    ) -> list[Any]:
        """Apply `compute` to batches of similar length, longest first; values in item order.

        Batches depend only on the items, so that a resumed run computes the same values.
        """
        size = batch_size or self.batch_size
        order = sorted(range(len(items)), key=lambda i: -length(items[i]))
        found: list[Any] = [None] * len(items)
        with progress(len(items), name, "row", shown=self.progress) as bar:
            for batch, start in enumerate(range(0, len(items), size)):
                places = order[start : start + size]
                values = self.pieces.get(name, batch)
                if values is None:
                    values = compute([items[i] for i in places])
                    self.pieces.put(name, batch, values)
                for place, value in zip(places, values, strict=True):
                    found[place] = value
                bar.update(len(places))
        return found

    def answers(self, name: str, rows: Sequence[Encoded]) -> list[dict[str, Any]]:
        """For each row its mean loss, number of labelled tokens, EM and ES."""
        return self.each(
            name,
            rows,
            lambda part: [_answer(score) for score in self._scores(part)],
            length=lambda row: len(row.ids),
        )

    def first_choices(self, name: str, rows: Sequence[Encoded]) -> list[dict[str, Any]]:
        """For each row its mean loss, labelled tokens, and the model's first choices for them.

        `correct` says whether all choices equal the labels; `text` is the choices as text.
        """

        def compute(part: list[Encoded]) -> list[dict[str, Any]]:
            scores, logits, labels = self.scored(part)
            labelled = labels[:, 1:] != IGNORED
            chosen = [
                row[at].tolist()
                for row, at in zip(logits[:, :-1].argmax(-1), labelled, strict=True)
            ]
            texts = self.tokenizer.batch_decode(chosen, skip_special_tokens=True)
            return [
                {
                    "loss": score.loss,
                    "tokens": len(score.correct),
                    "correct": bool(score.correct.all()),
                    "text": text,
                }
                for score, text in zip(scores, texts, strict=True)
            ]

        return self.each(name, rows, compute, length=lambda row: len(row.ids))

    def attacks(
        self, name: str, rows: Sequence[Encoded], *, k: float, convention: str
    ) -> list[float]:
        """For each row its Min-K % score; open-unlearning's convention omits the last token."""

        def compute(part: list[Encoded]) -> list[float]:
            scores = self._scores(part)
            if convention == "open-unlearning":
                scores = [score.without_end() for score in scores]
            return [min_k(score.log_probabilities, k, convention=convention) for score in scores]

        return self.each(name, rows, compute, length=lambda row: len(row.ids))

    def texts(self, name: str, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> list[str]:
        """Greedy continuations as text."""

        def compute(part: list[tuple[Sequence[int], int]]) -> list[str]:
            new = continuations(
                self.model, [p for p, _ in part], [m for _, m in part], pad=self.pad, end=self.end
            )
            return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))

        items = list(zip(prompts, most, strict=True))
        return self.each(name, items, compute, length=lambda item: len(item[0]))

    def _scores(self, rows: Sequence[Encoded]) -> list[AnswerScore]:
        return self.scored(rows)[0]

    @torch.no_grad()
    def scored(
        self, rows: Sequence[Encoded], model: Any = None
    ) -> tuple[list[AnswerScore], Tensor, Tensor]:
        """Scores, logits and labels of a batch. Raises NonFiniteError if a loss is not finite.

        Args:
            model: the model to use instead of the one under evaluation.
        """
        model = self.model if model is None else model
        batch = collate(rows, self.pad).to(model.device)
        logits = forward(model, batch.input_ids, batch.attention_mask)
        scores = answer_scores(logits, batch.labels)
        for row, score in zip(rows, scores, strict=True):
            if not math.isfinite(score.loss):
                raise NonFiniteError(
                    f"{row.where}: the loss is {score.loss}; the model is broken or overflows in "
                    f"{model.dtype}: try --dtype float32"
                )
        return scores, logits, batch.labels


def _answer(score: AnswerScore) -> dict[str, Any]:
    inner = score.without_end().correct
    return {
        "loss": score.loss,
        "tokens": len(score.correct),
        # An answer that consists only of its end of text has no token to repeat.
        "exact_memorisation": exact_memorisation(inner) if len(inner) else None,
        "extraction_strength": extraction_strength(inner) if len(inner) else None,
    }
