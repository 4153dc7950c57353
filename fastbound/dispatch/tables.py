"""Tables of measured plans: one JSON file per architecture, written by ``fastbound tune``.

The user's own file comes first, then the one in the package. A file that is damaged, or of another
version or another GPU, is not used: one warning says so, and so does the reason of every plan that
would have used it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from fastbound.dispatch.choices import Choice, choice_as_json, read_choice
from fastbound.dispatch.entries import (
    BlockEntry,
    Entry,
    as_json,
    read_block_entry,
    read_entry,
    typed,
)
from fastbound.files import replace_files
from fastbound.version import versions

FORMAT = "fastbound plan table 2"
SHIPPED = Path(__file__).with_name("plans")
FARTHEST = 2.0  # log2: an entry serves shapes that differ by a factor of four at most, in total

_Entry = TypeVar("_Entry", Entry, BlockEntry)


@dataclass(frozen=True, eq=False)
class PlanTable:
    """A table as it was read, or an empty one with the reason why a file was not used.

    Plans append ``note`` to their reason: why a file was not used, or what differs from the
    software that the table was measured with, whose ``versions`` it has. ``choices`` are those of
    first calls (``first_use``), which have files of their own.
    """

    architecture: str
    device: str = ""
    multiprocessors: int = 0
    entries: tuple[Entry, ...] = ()
    path: Path | None = None
    note: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[BlockEntry, ...] = ()
    choices: tuple[Choice, ...] = ()

    def nearest(self, M: int, N: int, K: int, R: int, dtype: str) -> Entry | None:
        """The entry of this R and dtype with the nearest N, K and M in doublings, if near."""
        near = [entry for entry in self.entries if (entry.R, entry.dtype) == (R, dtype)]
        return _nearest(near, N=N, K=K, M=row_bucket(M))

    def nearest_block(self, M: int, N: int, R: int, dtype: str, form: str) -> BlockEntry | None:
        """The block entry of this R, dtype and form with the nearest N and M, if near."""
        near = [b for b in self.blocks if (b.R, b.dtype, b.form) == (R, dtype, form)]
        return _nearest(near, N=N, M=row_bucket(M))


def _nearest(entries: Sequence[_Entry], **asked: int) -> _Entry | None:
    def distance(entry: _Entry) -> float:
        return sum(abs(math.log2(getattr(entry, name) / size)) for name, size in asked.items())

    best = min(entries, key=distance, default=None)
    return None if best is None or distance(best) > FARTHEST else best


def row_bucket(M: int) -> int:
    """The smallest power of two that is at least M, or 0 if M is 0."""
    return 1 << (M - 1).bit_length() if M else 0


def user_folder() -> Path | None:
    """The folder to which ``fastbound tune`` writes, and where tables are looked for first.

    None if the system reports no home folder.
    """
    try:
        return Path.home() / ".cache" / "fastbound" / "plans"
    except RuntimeError:
        return None


@lru_cache(maxsize=16)
def table_for(
    architecture: str, multiprocessors: int, shipped_alone: bool = False
) -> PlanTable | None:
    """The table of a GPU, read once per process, or None if there is no file."""
    own = None if shipped_alone else user_folder()
    folders = [folder for folder in (own, SHIPPED) if folder is not None]
    return find_table(architecture, multiprocessors, folders)


def find_table(
    architecture: str, multiprocessors: int, folders: Sequence[Path]
) -> PlanTable | None:
    """The first usable ``<architecture>.json`` in ``folders``.

    If there are files but none is usable, a table without entries whose note says why; None if
    there are no files.
    """
    notes: list[str] = []
    for folder in folders:
        path = folder / f"{architecture}.json"
        try:
            if not path.is_file():
                continue
            table = read_table(path)
            require_same_gpu(table, architecture, multiprocessors)
        except (OSError, ValueError) as error:
            notes.append(f"plan table not used: {error}")
            warnings.warn(notes[-1], stacklevel=2)
        else:
            return replace(table, note="; ".join([*notes, *_other_versions(table)]))
    return PlanTable(architecture, note="; ".join(notes)) if notes else None


def _other_versions(table: PlanTable) -> list[str]:
    """Notes on a table from another Triton or torch, which still works but may be slower."""
    here = software()
    return [
        f"measured with {name} {version}, installed is {here.get(name)}"
        for name, version in table.versions.items()
        if here.get(name) != version
    ]


def software() -> dict[str, str]:
    """The installed versions that a measurement depends on."""
    return versions("torch", "triton")


def read_table(path: Path) -> PlanTable:
    """The table in a file.

    Raises ValueError, naming the file and what is wrong, if it is damaged or of another version,
    and OSError if it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged: not JSON ({error})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise ValueError(f"{path} has another version: format {version!r}, not {FORMAT!r}")
    try:
        architecture = typed(content, "architecture", str)
        return PlanTable(
            architecture,
            typed(content, "device", str),
            typed(content, "multiprocessors", int),
            tuple(read_entry(entry, architecture) for entry in typed(content, "entries", list)),
            path,
            versions=typed(content, "versions", dict),
            blocks=tuple(read_block_entry(entry) for entry in typed(content, "blocks", list)),
            choices=tuple(read_choice(choice) for choice in content.get("choices", [])),
        )
    except (KeyError, TypeError, ValueError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {detail}") from error


def write_table(path: Path, table: PlanTable) -> None:
    """Replace the file as a whole; a reader never sees half of it."""
    content = {
        "format": FORMAT,
        "architecture": table.architecture,
        "device": table.device,
        "multiprocessors": table.multiprocessors,
        "versions": dict(table.versions),
        "entries": [as_json(entry) for entry in table.entries],
        "blocks": [as_json(entry) for entry in table.blocks],
        "choices": [choice_as_json(choice) for choice in table.choices],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files({path: (json.dumps(content, indent=1) + "\n").encode()})


def require_same_gpu(table: PlanTable, architecture: str, multiprocessors: int) -> None:
    """Raise ValueError if a table was measured on another kind of GPU than the one described."""
    if (table.architecture, table.multiprocessors) != (architecture, multiprocessors):
        raise ValueError(
            f"{table.path} was measured on {table.device} ({table.architecture}, "
            f"{table.multiprocessors} multiprocessors), but this GPU is {architecture} with "
            f"{multiprocessors}; run `fastbound tune` here"
        )
