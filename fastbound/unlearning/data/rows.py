"""Forget and retain rows from files or the Hugging Face hub, checked row by row."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbound.errors import InputError
from fastbound.unlearning.data.files import SUFFIXES, Record, file_records, suffix_of

_UNREADABLE = re.compile("[\0\ud800-\udfff]")
_HUB = re.compile(r"(?P<id>[^:]+):(?P<config>[^:]*):(?P<split>[^:]+)")


@dataclass(frozen=True)
class Row:
    """One question with its answer, or one text (`question` is None, `answer` holds the text).

    Attributes:
        question: the prompt; None for a row of plain text.
        answer: the text over which the loss is taken.
        where: file and row number, from 1, for messages.
    """

    question: str | None
    answer: str
    where: str

    @property
    def key(self) -> tuple[str, str]:
        """Rows with the same key count as the same: equal up to white space."""
        return " ".join((self.question or "").split()), " ".join(self.answer.split())


class RepeatedRowsWarning(UserWarning):
    """A source contains some rows more than once; each counts as often as it occurs."""


def load_rows(source: str | Path) -> list[Row]:
    """Read and check every row of `source`.

    Args:
        source: a `.jsonl`, `.ndjson` or `.json` file (one JSON object per line, or one array of
            objects or of texts), a `.csv` or `.tsv` file with a header, any of these compressed as
            `.gz`, a `.parquet` file, or `id:config:split` of a data set on the Hugging Face hub or
            in a local folder (`id::split` if it has a single config). Each row has `question` and
            `answer`, or `text`; other fields are ignored.

    Raises:
        InputError: the source is missing, empty or malformed, or a row lacks a field, or has one
            that is empty or cannot be tokenised; the message names row and field.

    Warns:
        RepeatedRowsWarning: some rows occur more than once.
    """
    rows = [_row(record, where) for where, record in read_records(source)]
    places: dict[tuple[str, str], str] = {}
    again = [row for row in rows if places.setdefault(row.key, row.where) != row.where]
    if again:
        warnings.warn(
            f"{source}: {len(again)} of {len(rows)} rows repeat an earlier one "
            f"({again[0].where} is {places[again[0].key]}); each counts as often as it occurs",
            RepeatedRowsWarning,
            stacklevel=2,
        )
    return rows


def read_records(source: str | Path) -> list[tuple[str, Record]]:
    """Every record of a source of `load_rows`, with any fields, and its file and row number.

    Raises:
        InputError: the source is missing, empty or malformed.
    """
    path = Path(source)
    if suffix_of(path) or os.path.exists(path):
        records = iter(file_records(path))
    elif match := _HUB.fullmatch(str(source)):
        records = _hub_records(**match.groupdict())
    else:
        raise InputError(
            f"{source} is neither a file ({', '.join(SUFFIXES)}) nor id:config:split of a data set"
        )
    found = [(f"{source}, row {number}", record) for number, record in records]
    if not found:
        raise InputError(f"{source} holds no rows: give at least one")
    return found


def check_disjoint(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    """Raise `InputError`, which names both places, if a row is both to forget and to retain."""
    places = {row.key: row.where for row in retain}
    shared = [(row.where, places[row.key]) for row in forget if row.key in places]
    if shared:
        first = f"{shared[0][0]} is also {shared[0][1]}"
        raise InputError(
            f"forget and retain share {len(shared)} row{'s' * (len(shared) > 1)} ({first}): "
            "remove each from one of the two"
        )


def authors(split: str) -> Path:
    """The path of the `"forget"` or `"retain"` file of the fictitious authors shipped with us."""
    return Path(__file__).with_name(f"authors_{split}.jsonl")


def _hub_records(id: str, config: str, split: str) -> Iterator[tuple[int, Record]]:
    import datasets

    source = f"{id}:{config}:{split}"
    try:
        rows = datasets.load_dataset(id, config or None, split=split)
    except Exception as error:  # its loaders pass on whatever network and parsers raise
        raise InputError(
            f"cannot load {source}: {type(error).__name__}: {error}; check id, config, split "
            "and the network, or give a file"
        ) from error
    return enumerate(rows, start=1)


def _row(record: Record, where: str) -> Row:
    # A table has every column in every row: a null means that the field is not given.
    given = {name for name in ("question", "answer", "text") if record.get(name) is not None}
    if given & {"question", "answer"} or (not given and {"question", "answer"} & record.keys()):
        return Row(
            text_field(record, "question", where), text_field(record, "answer", where), where
        )
    if "text" in record:
        return Row(None, text_field(record, "text", where), where)
    found = _found(record) + _inside(record)
    raise InputError(f"{where}: needs 'question' and 'answer', or 'text'; found {found}")


def text_field(record: Record, name: str, where: str) -> str:
    """A field that must be a text. Raises `InputError`, which names row and field."""
    if name not in record:
        raise InputError(f"{where}: field {name!r} is missing; found {_found(record)}")
    return as_text(record[name], f"field {name!r}", where)


def texts_field(record: Record, name: str, where: str) -> list[str]:
    """A field that must be a list of texts. Raises `InputError`: row, field and item."""
    if name not in record:
        raise InputError(f"{where}: field {name!r} is missing; found {_found(record)}")
    values = record[name]
    if not isinstance(values, (list, tuple)) or not values:
        got = "null" if values is None else repr(values)
        raise InputError(f"{where}: field {name!r} must be a list of texts, got {got}")
    return [
        as_text(value, f"item {number} of field {name!r}", where)
        for number, value in enumerate(values, start=1)
    ]


def as_text(value: object, what: str, where: str) -> str:
    """`value`, if it is a text that can be tokenised. Raises `InputError`, which names its place.

    Args:
        what: the field, for the message.
        where: file and row.
    """
    if value is None:
        raise InputError(f"{where}: {what} is null; it must be text")
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} must be text, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{where}: {what} is empty")
    if broken := _UNREADABLE.search(value):
        kind = "a NUL" if broken.group() == "\0" else "half of a surrogate pair"
        raise InputError(
            f"{where}: {what} holds {kind} ({broken.group()!a}) as character "
            f"{broken.start() + 1}, which cannot be tokenised; remove it or correct the text"
        )
    return value


def _found(record: Record) -> str:
    names = (f"{n!r} (null)" if value is None else repr(n) for n, value in record.items())
    return ", ".join(names) or "no field at all"


def _inside(record: Record) -> str:
    """A hint where the rows may be, for a record that is not a row."""
    holding = [name for name, value in record.items() if isinstance(value, (list, Mapping))]
    if not holding:
        return ""
    return f"; if {holding[0]!r} holds the rows, save it alone, as one array of objects or texts"
