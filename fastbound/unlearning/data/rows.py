"""Forget and retain rows from JSON lines, CSV or the Hugging Face hub, checked row by row."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbound.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv")
_BARE_RETURN = re.compile(r"\r(?!\n)")
_STAND_IN = "\ufdd0"  # Unicode reserves it for use inside programs
_HUB = re.compile(r"(?P<id>[^:]+):(?P<config>[^:]*):(?P<split>[^:]+)")


@dataclass(frozen=True)
class Row:
    """One question with its answer, or one text (`question` is None, `answer` holds the text).

    Attributes:
        question: what the model is given; None for a row of plain text.
        answer: what the loss is taken over.
        where: file and row number, 1-based, for messages.
    """

    question: str | None
    answer: str
    where: str

    @property
    def key(self) -> tuple[str, str]:
        """What makes two rows the same: their words, whatever the white space between them."""
        return " ".join((self.question or "").split()), " ".join(self.answer.split())


def load_rows(source: str | Path) -> list[Row]:
    """Read and check every row of `source`.

    Args:
        source: a `.jsonl` or `.json` file (one JSON object a line, or one array of objects or of
            texts), a `.csv` file with a header, or `id:config:split` of a data set on the Hugging
            Face hub or in a local folder (`id::split` where it has a single config). Each row has
            `question` and `answer`, or `text`; other fields are left alone.

    Raises:
        InputError: the source is missing, empty or malformed, or a row lacks a field or has an
            empty one; row and field are named.
    """
    return [_row(record, where) for where, record in read_records(source)]


def read_records(source: str | Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Every record of what `load_rows` takes, whatever its fields, with file and row number.

    Raises:
        InputError: the source is missing, empty or malformed.
    """
    path = Path(source)
    if path.suffix in SUFFIXES or path.is_file():
        records = _file_records(path)
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
    """Raise `InputError` where a row is to be both forgotten and retained, naming both places."""
    places = {row.key: row.where for row in retain}
    shared = [(row.where, places[row.key]) for row in forget if row.key in places]
    if shared:
        first = f"{shared[0][0]} is also {shared[0][1]}"
        raise InputError(
            f"forget and retain share {len(shared)} row{'s' * (len(shared) > 1)} ({first}): "
            "remove each from one of the two"
        )


def authors(split: str) -> Path:
    """The shipped fictitious authors: path of the `"forget"` or the `"retain"` file."""
    return Path(__file__).with_name(f"authors_{split}.jsonl")


def _file_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: the name must end in {', '.join(SUFFIXES)}")
    text = read_text(path)
    if path.suffix == ".csv":
        return _csv_records(path, text)
    if text.lstrip().startswith("["):
        return _array_records(path, text)
    return _json_records(path, text)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, its line ends as they are, or `InputError`."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}; save it as UTF-8") from None


def _parsed(text: str, path: Path, row: int | None, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if row is None else f"row {row}"
        raise InputError(
            f"{path}, {place}: not JSON ({error.msg}, column {error.colno}); {remedy}"
        ) from None


def _array_records(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """One array, as MUSE's own folder has it: objects, or texts without a field's name."""
    values = _parsed(text, path, None, "write one array, or one object a line")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, (str, dict)):
            raise InputError(
                f"{path}, row {number}: an object or a text was expected in the array, "
                f"got {type(value).__name__}"
            )
        yield number, {"text": value} if isinstance(value, str) else value


def _json_records(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = _parsed(line, path, number, "write one object a line")
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, row {number}: a JSON object was expected, got {type(record).__name__}; "
                "write one object a line"
            )
        yield number, record


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if "\n" in text:
        # A bare carriage return then stands in a text, quoted or not, as TDEC's own code reads its
        # files; Python's reader would end the row there.
        text = _BARE_RETURN.sub(_STAND_IN, text)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for number, record in enumerate(reader, start=1):
            if None in record:
                raise InputError(
                    f"{path}, row {number}: more fields than the header; quote commas in text"
                )
            yield number, {name: _returned(value) for name, value in record.items()}
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _returned(value: str | None) -> str | None:
    return None if value is None else value.replace(_STAND_IN, "\r")


def _hub_records(id: str, config: str, split: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import datasets

    source = f"{id}:{config}:{split}"
    try:
        rows = datasets.load_dataset(id, config or None, split=split)
    except Exception as error:  # its loaders raise whatever the network and the parsers raise
        raise InputError(
            f"cannot load {source}: {type(error).__name__}: {error}; check id, config, split "
            "and the network, or give a file"
        ) from error
    return enumerate(rows, start=1)


def _row(record: Mapping[str, Any], where: str) -> Row:
    if "question" in record or "answer" in record:
        return Row(
            text_field(record, "question", where), text_field(record, "answer", where), where
        )
    if "text" in record:
        return Row(None, text_field(record, "text", where), where)
    found = ", ".join(map(repr, record)) or "no field at all"
    raise InputError(f"{where}: needs 'question' and 'answer', or 'text'; found {found}")


def text_field(record: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must hold text, or `InputError` with row and field."""
    if name not in record or record[name] is None:
        raise InputError(f"{where}: field {name!r} is missing")
    value = record[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{where}: field {name!r} is empty")
    return value
