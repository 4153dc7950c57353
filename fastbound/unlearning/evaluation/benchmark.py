"""The interface of a benchmark: one module with these names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fastbound.unlearning.data.encoding import Encoded
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.evaluation.session import Session

Log: TypeAlias = Mapping[str, Any]
Summary: TypeAlias = dict[str, Any]


class Settings(Protocol):
    """The settings of an evaluation that a benchmark reads; see `run.EvaluationConfig`."""

    @property
    def split(self) -> str | None: ...
    @property
    def data(self) -> str | None: ...
    @property
    def convention(self) -> str | None: ...
    @property
    def template(self) -> str: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def n(self) -> int: ...
    @property
    def membership(self) -> tuple[str, ...]: ...


class Prepared(Protocol):
    """All inputs of the model, as tokens."""

    @property
    def encoded(self) -> Sequence[Encoded]: ...
    @property
    def continued(self) -> Sequence[tuple[Encoded, int]]:
        """Each prompt with the largest number of tokens that the model generates for it."""


class Benchmark(Protocol):
    """A module of one benchmark."""

    LOG: str
    """The file of its log."""
    CONVENTIONS: tuple[str, ...]
    """The conventions that it supports, its default first."""
    DEFAULT_SPLIT: str | None
    """None if a split must be named."""

    def load(self, split: str, data: str | Path | None = None) -> Sequence[Row]:
        """The rows of one split, from a folder or the hub."""

    def prepare(self, settings: Settings, tokenizer: Any) -> Any:
        """Load and encode all rows. Raises InputError, which names the first unusable row."""

    def compared(self, retain: Log, prepared: Any) -> Mapping[str, tuple[int, int]]:
        """The numbers of rows, by part, in a retain log and in this evaluation; they must agree.

        Raises InputError for a log that cannot be compared.
        """

    def score(self, session: Session, prepared: Any, settings: Settings) -> dict[str, Any]:
        """The log."""

    def summarise(self, log: Log, retain: Log | None, settings: Settings) -> Summary:
        """The metrics of a log, and those relative to a model trained without the forget rows."""

    def table(self, summary: Summary) -> list[str]:
        """The lines for a terminal."""

    def draw(self, path: Path, log: Log, retain: Log | None, summary: Summary) -> None:
        """The picture."""
