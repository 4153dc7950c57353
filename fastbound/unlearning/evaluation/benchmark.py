"""What each benchmark is to the evaluation: one module with these names."""

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
    """What a benchmark reads of an evaluation's settings; see `run.EvaluationConfig`."""

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
    """Everything that is asked of the model, as tokens."""

    @property
    def encoded(self) -> Sequence[Encoded]: ...
    @property
    def continued(self) -> Sequence[tuple[Encoded, int]]:
        """Each prompt, with the most tokens that the model adds to it."""


class Benchmark(Protocol):
    """A module of one benchmark."""

    LOG: str
    """The file of its log."""
    CONVENTIONS: tuple[str, ...]
    """Whose definitions it can follow, its default first."""
    DEFAULT_SPLIT: str | None
    """None where a split must be named."""

    def load(self, split: str, data: str | Path | None = None) -> Sequence[Row]:
        """The rows of one split, from a folder or the hub."""

    def prepare(self, settings: Settings, tokenizer: Any) -> Any:
        """Load and encode all that is scored; the first row that cannot be used is named."""

    def compared(self, retain: Log, prepared: Any) -> Mapping[str, tuple[int, int]]:
        """Rows of a retain log and of ours, by the part in which they must agree.

        Raises InputError for a log that cannot be compared with.
        """

    def score(self, session: Session, prepared: Any, settings: Settings) -> dict[str, Any]:
        """The log."""

    def summarise(self, log: Log, retain: Log | None, settings: Settings) -> Summary:
        """The figures of a log, beside those of a model trained without the forget rows."""

    def table(self, summary: Summary) -> list[str]:
        """The lines for a terminal."""

    def draw(self, path: Path, log: Log, retain: Log | None, summary: Summary) -> None:
        """The picture."""
