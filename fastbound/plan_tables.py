"""Tables of measured plans: one JSON file for each architecture, written by ``fastbound tune``.

The user's own file is looked for first, then the one that comes with the package. A file that is
damaged, of another version or of another GPU is not used: a warning says so once, and so does the
reason of every plan that would have come from it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fastbound.kernels.tiles import GemmTile, Tile

FORMAT = "fastbound plan table 2"
SHIPPED = Path(__file__).with_name("plans")
STRATEGIES = ("fused", "split", "torch")
DTYPES = ("bfloat16", "float16")
FARTHEST = 2.0  # log2: an entry serves shapes up to a factor of four away, in all

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes for one block


@dataclass(frozen=True)
class Entry:
    """What was found best for weight [N, K] at M rows (a power of two) and padded rank R.

    ``origin`` says where the entry comes from: "measured <date> on <GPU>" or "default".
    """

    N: int
    K: int
    M: int
    R: int
    dtype: str
    strategy: str
    gemm: GemmTile
    gemm_t: GemmTile
    thin: Tile
    reduce: Tile
    origin: str

    def __str__(self) -> str:
        return f"N {self.N}, K {self.K}, {self.M} rows, {self.dtype}, rank up to {self.R}"


@dataclass(frozen=True, eq=False)
class PlanTable:
    """A table as it was read, or none and why.

    ``note`` is what plans say beside their reason: why a file that lies there is not used.
    ``versions`` are those of the software that it was measured with.
    """

    architecture: str
    device: str = ""
    multiprocessors: int = 0
    entries: tuple[Entry, ...] = ()
    path: Path | None = None
    note: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def nearest(self, M: int, N: int, K: int, R: int, dtype: str) -> Entry | None:
        """The entry of this R and dtype whose N, K and M are the fewest doublings away."""
        bucket = row_bucket(M)

        def distance(entry: Entry) -> float:
            return sum(
                abs(math.log2(own / asked))
                for own, asked in ((entry.N, N), (entry.K, K), (entry.M, bucket))
            )

        near = [entry for entry in self.entries if (entry.R, entry.dtype) == (R, dtype)]
        best = min(near, key=distance, default=None)
        return None if best is None or distance(best) > FARTHEST else best


def row_bucket(M: int) -> int:
    """The power of two at or above M >= 1; 0 for no rows."""
    return 1 << (M - 1).bit_length() if M else 0


def user_folder() -> Path:
    """Where ``fastbound tune`` writes, and where tables are looked for first."""
    return Path.home() / ".cache" / "fastbound" / "plans"


@lru_cache(maxsize=16)
def table_for(architecture: str, multiprocessors: int) -> PlanTable | None:
    """The table of a GPU, read once a process; None where no file lies there."""
    return find_table(architecture, multiprocessors, (user_folder(), SHIPPED))


def find_table(
    architecture: str, multiprocessors: int, folders: Sequence[Path]
) -> PlanTable | None:
    """The first usable ``<architecture>.json`` of ``folders``.

    With files but none usable, a table without entries whose note names them; without files, None.
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
    """What was measured with another Triton or torch still runs, and may be less fast."""
    here = software()
    return [
        f"measured with {name} {version}, here is {here.get(name)}"
        for name, version in table.versions.items()
        if here.get(name) != version
    ]


def software() -> dict[str, str]:
    """The installed versions that a measurement depends on."""
    found = {}
    for name in ("torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_table(path: Path) -> PlanTable:
    """A table from its file.

    Raises ValueError, naming the file and what is wrong, for one that is damaged or of another
    version; OSError where it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: no JSON ({error})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise ValueError(f"{path} is of another version: format {version!r}, not {FORMAT!r}")
    try:
        architecture = _typed(content, "architecture", str)
        return PlanTable(
            architecture,
            _typed(content, "device", str),
            _typed(content, "multiprocessors", int),
            tuple(_entry(entry, architecture) for entry in _typed(content, "entries", list)),
            path,
            versions=_typed(content, "versions", dict),
        )
    except (KeyError, TypeError, ValueError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {detail}") from error


def write_table(path: Path, table: PlanTable) -> None:
    """The whole file anew, never half of it."""
    entries = []
    for entry in table.entries:
        flat = asdict(entry)
        tiles = {name: flat.pop(name) for name in ("gemm", "gemm_t", "thin", "reduce")}
        entries.append({**flat, "tiles": tiles})
    content = {
        "format": FORMAT,
        "architecture": table.architecture,
        "device": table.device,
        "multiprocessors": table.multiprocessors,
        "versions": dict(table.versions),
        "entries": entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def require_same_gpu(table: PlanTable, architecture: str, multiprocessors: int) -> None:
    """Raise ValueError where a table is of another GPU than the one described."""
    if (table.architecture, table.multiprocessors) != (architecture, multiprocessors):
        raise ValueError(
            f"{table.path} is of {table.device} ({table.architecture}, {table.multiprocessors} "
            f"multiprocessors), and this GPU is {architecture} with {multiprocessors}; run "
            "`fastbound tune` here"
        )


def _entry(content: Any, architecture: str) -> Entry:
    if not isinstance(content, dict):
        raise TypeError(f"entry {content!r} is no object")
    tiles = _typed(content, "tiles", dict)
    sizes = {name: _typed(content, name, int) for name in ("N", "K", "M", "R")}
    for name, size in sizes.items():
        if size < 1 or (name in "MR" and size & (size - 1)):
            raise ValueError(f"{name} {size} of an entry")
    entry = Entry(
        **sizes,
        dtype=_one_of(content, "dtype", DTYPES),
        strategy=_one_of(content, "strategy", STRATEGIES),
        gemm=_tile(GemmTile, tiles, "gemm"),
        gemm_t=_tile(GemmTile, tiles, "gemm_t"),
        thin=_tile(Tile, tiles, "thin"),
        reduce=_tile(Tile, tiles, "reduce"),
        origin=_typed(content, "origin", str),
    )
    has_descriptors = architecture.startswith("sm_") and int(architecture[3:]) >= 90
    for name, gemm in (("gemm", entry.gemm), ("gemm_t", entry.gemm_t)):
        if gemm.descriptors and not has_descriptors:
            raise ValueError(f"{name} tile {gemm}: {architecture} has no tensor descriptors")
        if not fits(gemm, architecture):
            raise ValueError(f"{name} tile {gemm} needs more shared memory than {architecture} has")
    return entry


def fits(gemm: GemmTile, architecture: str) -> bool:
    """Whether the operands that a tile keeps in shared memory, 2 bytes each, can be there at all.

    Necessary, not sufficient: what else a kernel keeps only its compilation tells.
    """
    operands = (gemm.block_m + gemm.block_n) * gemm.block_k
    needed = 2 * max(1, gemm.stages - 1) * operands  # all stages but the one in registers
    if gemm.descriptors:  # all stages, and a buffer for the store
        needed = 2 * (gemm.stages * operands + gemm.block_m * gemm.block_n)
    return needed <= SHARED_LIMIT.get(architecture, max(SHARED_LIMIT.values()))


def _tile(kind: Any, tiles: Mapping[str, Any], name: str) -> Any:
    content = _typed(tiles, name, dict)
    expected = {each.name for each in fields(kind)}
    if set(content) != expected:
        raise ValueError(f"{name} tile has {sorted(content)}, not {sorted(expected)}")
    for key, value in content.items():
        if key == "descriptors":
            valid = isinstance(value, bool)
        elif type(value) is not int:
            valid = False
        elif key.startswith("block"):
            valid = 16 <= value <= 1024 and value & (value - 1) == 0
        else:
            valid = value in ((1, 2, 4, 8, 16) if key == "warps" else range(1, 65))
        if not valid:
            raise ValueError(f"{name} tile: {key} {value!r}")
    return kind(**content)


def _typed(content: Mapping[str, Any], name: str, kind: type) -> Any:
    value = content[name]
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r}, not of type {kind.__name__}")
    return value


def _one_of(content: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    value = content[name]
    if value not in choices:
        raise ValueError(f"{name} {value!r}, not one of {', '.join(choices)}")
    return str(value)
