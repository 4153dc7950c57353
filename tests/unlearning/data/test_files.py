"""Files of rows: each form read as what its name says, and what is damaged named with its place."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import warnings
from pathlib import Path

import pytest

from fastbound.unlearning import InputError, Row, load_rows
from fastbound.unlearning.data.rows import RepeatedRowsWarning

QUESTION, ANSWER = "Who, then?", 'Ann\tsaid "me"\nand left.'
ROW = {"question": QUESTION, "answer": ANSWER}


def _lines(path: Path) -> None:
    path.write_text(json.dumps(ROW) + "\n")


def _array(path: Path) -> None:
    path.write_text(json.dumps([ROW], indent=1))


def _table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([list(ROW), list(ROW.values())])


def _parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([ROW]), path)


FORMS = {
    "r.jsonl": _lines,
    "r.ndjson": _lines,
    "r.json": _array,
    "r.csv": lambda path: _table(path, ","),
    "r.tsv": lambda path: _table(path, "\t"),
    "r.parquet": _parquet,
    "R.JSONL": _lines,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_gives_the_same_row(tmp_path: Path, name: str, packed: bool):
    path = tmp_path / name
    FORMS[name](path)
    if packed and name != "r.parquet":
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert load_rows(path) == [Row(QUESTION, ANSWER, f"{path}, row 1")]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path):
    for name, text in (("r.csv", "text\nT\n"), ("r.json", '["T"]'), ("r.jsonl", '{"text": "T"}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [row.answer for row in load_rows(tmp_path / name)] == ["T"]


def test_a_field_of_a_table_may_be_a_whole_book(tmp_path: Path):
    limit = csv.field_size_limit()
    (tmp_path / "r.csv").write_text('text\n"' + "word " * 40_000 + '"\n')
    (row,) = load_rows(tmp_path / "r.csv")
    assert len(row.answer) == 200_000 and csv.field_size_limit() == limit


def test_one_object_over_several_lines_is_one_row(tmp_path: Path):
    (tmp_path / "r.json").write_text(json.dumps(ROW, indent=2))
    assert load_rows(tmp_path / "r.json")[0].answer == ANSWER


def test_null_in_a_column_of_a_table_is_not_given(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"question": None, "answer": None, "text": "T"}, {**ROW, "text": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert [row.question for row in load_rows(tmp_path / "r.parquet")] == [None, QUESTION]


NESTED = "[" * 100_000 + "]" * 100_000
TABLE = "question,answer\nQ1,A1\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", r'{"text": "T \ud83d"}', r"row 1: field 'text' holds half of a surr.*\\ud83d"),
        ("r.jsonl", r'{"text": "T\u0000"}', r"row 1: field 'text' holds a NUL .* as character 2"),
        ("r.json", r'["T", "\udc00"]', "row 2: field 'text' holds half of a surrogate pair"),
        ("r.jsonl", '{"text": "T", "n": ' + "9" * 5000 + "}", "row 1: field 'n' .* 4300 digits"),
        ("r.jsonl", '{"text": "T", "n": ' + NESTED + "}", "row 1: nests .* too deeply"),
        ("r.json", "[" * 100_000, "r.json: nests .* too deeply"),
        ("r.jsonl", '{"text": "T", "text": "U"}', "row 1: field 'text' is given more than once"),
        ("r.jsonl", '{"question": "Q", "answer": null}', "row 1: field 'answer' is null"),
        ("r.jsonl", '{"question": null, "answer": null}', "row 1: field 'question' is null"),
        ("r.jsonl", '{"question": "Q", "reply": "A"}', "'answer' is missing; found .*, 'reply'"),
        ("r.jsonl", '{"question": "Q", "answer": ["A"]}', "'answer' must be text, got list"),
        ("r.jsonl", '{"question": "Q", "answer": 3.5}', "'answer' must be text, got float"),
        ("r.jsonl", '{"text": true}', "'text' must be text, got bool"),
        ("r.jsonl", '{"text": "\u2003\\t\\n"}', "'text' is empty"),
        ("r.json", '{"data": [{"text": "T"}]}', "row 1: .* found 'data'; if 'data' holds the rows"),
        ("r.json", '{\n "data": [\n  {"text": "T"}\n ]\n}', "found 'data'; if 'data' holds"),
        ("r.json", '{\n "Ann": ["She writes."],\n "v": 1}', "found 'Ann', 'v'; if 'Ann' holds"),
        ("r.json", '{\n "text": "T"\n "n": 1\n}', "line 3: not JSON .*Expecting ',' delimiter"),
        ("r.csv", TABLE + 'Q2,"He said \\"hi\\", so"\n', "line 3: not CSV"),
        ("r.csv", TABLE + 'Q2,"A\nB"\nQ3,"A\n', "line 5: not CSV .unexpected end of data"),
        ("r.csv", TABLE + 'Q2,"A\nB\n', "lines 3 to 4: not CSV .unexpected end of data"),
        ("r.csv", "text,text\nT,U\n", "header has 2 columns 'text'"),
        ("r.csv", "question;answer\nQ;A\n", "found 'question;answer'"),
        ("r.tsv", "question\tanswer\nQ\n", "row 1: field 'answer' is missing"),
        ("r.csv", "question,answer\nQ, \n", "row 1: field 'answer' is empty"),
        ("r.parquet", "", "is not a readable parquet file"),
        ("r.jsonl.gz", "text", "cannot be read: Not a gzipped file"),
        ("r.jsonl", "version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("r.xlsx", "text", "name must end in .jsonl, "),
    ],
)
def test_names_place_field_and_remedy_of_what_cannot_be_read(
    tmp_path: Path, name: str, content: str, message: str
):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_rows(tmp_path / name)


# Without the time of day: a test is named after what it is given, in every process alike.
PACKED = gzip.compress(b'{"text": "T"}', mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"text": "T"}'.encode("utf-16"), "is UTF-16 or UTF-32: save it as UTF-8"),
        ("r.jsonl", '{"text": "T"}'.encode("utf-16-le"), "line 1: contains NUL characters"),
        ("r.jsonl", PACKED, "is compressed by gzip: .* end in .gz"),
        ("r.jsonl.gz", PACKED[:-9], "r.jsonl.gz cannot be read"),
        ("r.jsonl", b"PAR1...", "is a parquet file: its name must end in .parquet"),
        ("r.csv", b"PK\x03\x04...", "is a zip archive or a spreadsheet"),
        ("r.jsonl", b'{"text": "T"}\n' + b"\0" * 99, "line 2: contains NUL characters"),
        ("r.csv", b"text\n\xe9\n", "is not UTF-8"),
    ],
)
def test_names_what_a_file_is_that_is_not_what_its_name_says(
    tmp_path: Path, name: str, content: bytes, message: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_rows(tmp_path / name)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch):
    (tmp_path / "r.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"r.parquet: reading parquet needs pyarrow; install it"):
        load_rows(tmp_path / "r.parquet")


@pytest.mark.parametrize("source", ["folder", "none.jsonl", "n" * 300 + ".csv", "a\0b.csv"])
def test_names_a_source_that_is_no_file(tmp_path: Path, source: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"is a folder: name a file|does not exist"):
        load_rows(tmp_path / source)


def test_says_that_rows_are_given_more_than_once(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "T"}\n{"text": "U"}\n{"text": " T "}\n')
    with pytest.warns(RepeatedRowsWarning, match=r"1 of 3 rows .*row 3 is .*row 1.; each counts"):
        assert len(load_rows(path)) == 3
    path.write_text('{"text": "T"}\n{"text": "U"}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rows(path)
