"""Reading the records of a file of rows, in the format that its suffix names."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbound.errors import InputError

Record = Mapping[str, Any]

LINES = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*LINES, *TABLES, ".parquet", *(f"{plain}.gz" for plain in (*LINES, *TABLES)))
_BARE_RETURN = re.compile(r"\r(?!\n)")
_STAND_IN = "\ufdd0"  # Unicode reserves it for use inside programs
_DIGITS = 4300  # Python does not convert longer numerals to an integer
# How files that are not UTF-8 text begin.
_BEGINNINGS = {
    b"\x1f\x8b": "is compressed by gzip: its name must end in .gz",
    b"PAR1": "is a parquet file: its name must end in .parquet",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: save its rows in one of the other formats",
    b"\xff\xfe": "is UTF-16 or UTF-32: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run git lfs pull",
}


def suffix_of(path: Path) -> str | None:
    """The one of `SUFFIXES` that the name ends in, ignoring case; None if there is none."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def file_records(path: Path) -> Iterable[tuple[int, Record]]:
    """Every record with its number from 1: the row in a table or array, otherwise the line.

    Raises:
        InputError: the file is missing or does not have the format of its suffix; the message names
            the place.
    """
    suffix = suffix_of(path)
    if not os.path.isfile(path):  # unlike Path.is_file(), False for an impossible name
        kind = "is a folder: name a file in it" if os.path.isdir(path) else "does not exist"
        raise InputError(f"{path} {kind}")
    if suffix is None:
        raise InputError(f"{path}: the name must end in {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _parquet_records(path)
    text = read_text(path)
    plain = suffix.removesuffix(".gz")
    if plain in TABLES:
        return _table_records(path, text, TABLES[plain])
    if text.lstrip().startswith("["):
        return _array_records(path, text)
    return _json_records(path, text)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, decompressed if .gz, with its line ends. Raises `InputError`."""
    packed = path.name.lower().endswith(".gz")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if packed else content
    except (OSError, EOFError, zlib.error) as error:  # gzip's own error is an OSError
        raise InputError(f"{path} cannot be read: {error}") from None
    for beginning, remedy in _BEGINNINGS.items():
        if content.startswith(beginning):
            raise InputError(f"{path} {remedy}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}; save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(
            f"{path}, line {line}: contains NUL characters, so it is UTF-16 or was cut off; "
            "save it as UTF-8"
        )
    return text


def parse_json(text: str, where: str, remedy: str, *, lines: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        where: where the text comes from, for messages.
        remedy: what to do about text that is not JSON.
        lines: whether messages also name the line.

    Raises:
        InputError: it is not JSON, or has something no row can have: a name twice in one object, an
            integer of thousands of digits, thousands of nested levels.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise InputError(f"{where}: field {twice!r} is given more than once in one object")
        for name, value in pairs:
            if value is _LONG:
                raise InputError(
                    f"{where}: field {name!r} is an integer of more than {_DIGITS} digits; "
                    "write it as text or leave it out"
                )
        return record

    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=_integer)
    except json.JSONDecodeError as error:
        where += f", line {error.lineno}" if lines else ""
        raise InputError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); {remedy}"
        ) from None
    except RecursionError:
        raise InputError(
            f"{where}: nests arrays or objects too deeply to be read; leave that field out"
        ) from None


_LONG = object()


def _integer(digits: str) -> Any:
    return int(digits) if len(digits) <= _DIGITS else _LONG


def _array_records(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    """One array, as in MUSE's own folder: of objects, or of texts without a field name."""
    values = parse_json(text, str(path), "write one array, or one object per line", lines=True)
    for number, value in enumerate(values, start=1):
        if not isinstance(value, (str, dict)):
            raise InputError(
                f"{path}, row {number}: expected an object or a text in the array, "
                f"got {type(value).__name__}"
            )
        yield number, {"text": value} if isinstance(value, str) else value


def _json_records(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    if _over_lines(text):
        yield 1, parse_json(text, str(path), "write one array, or one object per line", lines=True)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = parse_json(line, f"{path}, row {number}", "write one object per line")
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, row {number}: expected a JSON object, got {type(record).__name__}; "
                "write one object per line"
            )
        yield number, record


def _over_lines(text: str) -> bool:
    """Whether the text is a single object that is written over several lines."""
    first = text.lstrip().partition("\n")[0].rstrip()
    return first.startswith("{") and first.endswith(("{", "[", ",", ":"))


def _table_records(path: Path, text: str, delimiter: str) -> list[tuple[int, Record]]:
    if "\n" in text:
        # A bare carriage return is then part of a text, quoted or not, as TDEC's own code reads its
        # files; Python's reader would end the row there.
        text = _BARE_RETURN.sub(_STAND_IN, text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(len(text) + 1)
    header: list[str] = []
    found: list[tuple[int, Record]] = []
    done = 0  # lines of the rows read so far
    try:
        for values in reader:
            done = reader.line_num
            if not values:
                continue
            if not header:
                header = _header(path, values)
                continue
            if len(values) > len(header):
                raise InputError(
                    f"{path}, row {len(found) + 1}: more fields than the header; quote texts "
                    "that contain the separator"
                )
            values = [value.replace(_STAND_IN, "\r") for value in values]
            # A short row lacks the remaining fields.
            found.append((len(found) + 1, dict(zip(header, values, strict=False))))
    except csv.Error as error:
        lines = f"line {done + 1}"
        if reader.line_num > done + 1:
            lines = f"lines {done + 1} to {reader.line_num}"
        raise InputError(f"{path}, {lines}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    return found


def _header(path: Path, names: Sequence[str]) -> list[str]:
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise InputError(f"{path}: the header has {times} columns {name!r}; rename all but one")
    return list(names)


def _parquet_records(path: Path) -> list[tuple[int, Record]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path}: reading parquet needs pyarrow; install it, or save the rows as .jsonl"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's own kinds, OSError, and what its decoders raise
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} is not a readable parquet file: {reason}") from None
    return list(enumerate(rows, start=1))
