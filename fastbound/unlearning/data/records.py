"""The records of a benchmark's split, from a file in a folder or from the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbound.errors import InputError
from fastbound.unlearning.data.files import SUFFIXES
from fastbound.unlearning.data.rows import read_records

Records = list[tuple[str, Mapping[str, Any]]]


def check_split(benchmark: str, split: str, known: Sequence[str]) -> None:
    """Raise `InputError`, which lists the splits, if the benchmark does not have this one."""
    if split not in known:
        raise InputError(f"{benchmark} has no split {split!r}; it has {', '.join(known)}")


def records(benchmark: str, split: str, data: str | Path | None, hub: str) -> Records:
    """Every record of `split` with its file and row number.

    Args:
        data: folder with a file `split` that has one of the suffixes of `load_rows`; a "/" in the
            split is a subfolder. None means `hub`.
        hub: id:config:split.
    """
    return read_records(hub if data is None else file_of(benchmark, split, data, SUFFIXES))


def file_of(benchmark: str, split: str, data: str | Path, suffixes: Sequence[str]) -> Path:
    """The file of `split` in the folder `data`. Raises `InputError`, which lists the folder."""
    folder = Path(data)
    if not folder.is_dir():
        raise InputError(f"data {folder} is not a folder: give the folder of {benchmark}'s files")
    for suffix in suffixes:
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return path
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    found = [n.removesuffix(end) for n in names for end in suffixes if n.endswith(end)]
    raise InputError(
        f"{folder} has no file {split} ({', '.join(suffixes)}) for {benchmark}; "
        f"it holds {', '.join(found) or 'no such files'}"
    )
