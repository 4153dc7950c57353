"""The rows that an earlier run of the compile report left in its file, so that it can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastbound.kernels import launch as kernels
from fastbound.kernels.launch import Launch

from fastbound.files import replace_files
from fastbound.performance.compilation import binary_of
from fastbound.performance.inspection import Compiled, SteadyLoop

Row = dict[str, Any]


def read_rows(path: Path | None) -> list[Row]:
    """The rows in a report's file; none if there is no file.

    Raises ValueError, naming the file and the remedy, if it holds something else, and OSError if it
    cannot be read or its folder does not exist.
    """
    if path is None:
        return []
    if not path.exists():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {path.parent}; create it first")
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no compile report: {error}; name another file") from error
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"target", "kernel", "registers"} <= row.keys() for row in rows
    ):
        raise ValueError(f"{path} is no compile report: not a list of rows; name another file")
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file as a whole, so that a run that is stopped leaves the rows it had."""
    replace_files({path: json.dumps(rows, indent=1).encode()})


def digest(launch: Launch, target: str) -> str:
    """What a binary follows from on a target, apart from Triton's version, in 16 hex digits."""
    _, *specialised = binary_of(launch, target)
    name = launch.kernel.fn.__name__
    return hashlib.blake2b(f"{_sources()} {name} {specialised}".encode(), digest_size=8).hexdigest()


@cache
def _sources() -> str:
    """A digest of every kernel's source, since kernels call one another across files."""
    state = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


def binaries(rows: Sequence[Row], triton: str) -> dict[tuple[str, str], Compiled]:
    """The compiled kernels of the rows by target and digest; what did not compile is left out."""
    return {
        (row["target"], row["binary"]): _restored(row)
        for row in rows
        if row.get("triton") == triton and row.get("binary") and row["registers"]
    }


def _restored(row: Row) -> Compiled:
    loop = None
    if row["loads_ahead"] is not None:
        loop = SteadyLoop(
            row["in_flight"], row["loads_ahead"], row["loop_length"], row["round_trips"]
        )
    facts = row["registers"], row["spills"], row["shared"], row["instructions"]
    return Compiled(*facts, loop, tuple(row["warnings"]))
