"""The entries of a plan table: what was fastest for one shape, and its form in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastbound.dispatch.device import SHARED_LIMIT, Device
from fastbound.kernels.tiles import GemmTile, Tile
from fastbound.truth.formula import ACTIVATIONS

STRATEGIES = ("fused", "split", "torch")
DTYPES = ("bfloat16", "float16")


def block_form(activation: str, gated: bool) -> str:
    """The kind of block by which tables distinguish blocks, such as "gated silu", "plain relu"."""
    return f"{'gated' if gated else 'plain'} {activation}"


FORMS = tuple(block_form(name, gated) for name in ACTIVATIONS for gated in (True, False))


@dataclass(frozen=True)
class Entry:
    """What was fastest for weight [N, K] at M rows (a power of two) and padded rank R.

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


@dataclass(frozen=True)
class BlockEntry:
    """An MLP block's own tiles for [M, N] between its GEMMs, at padded rank R per projection.

    They serve only blocks of the same ``form`` (see :func:`block_form`), because a tile that
    compiles without spills for one form may spill for another. K does not matter to them.
    """

    N: int
    M: int
    R: int
    dtype: str
    form: str
    activate: Tile
    gated: Tile
    origin: str

    def __str__(self) -> str:
        return f"{self.form}, N {self.N}, {self.M} rows, {self.dtype}, rank up to {self.R}"


def read_entry(content: Any, architecture: str) -> Entry:
    """An entry from its JSON. Raises KeyError, TypeError or ValueError, saying what is wrong."""
    tiles = _tiles(content)
    entry = Entry(
        **_sizes(content, "N", "K", "M", "R"),
        dtype=_one_of(content, "dtype", DTYPES),
        strategy=_one_of(content, "strategy", STRATEGIES),
        gemm=_tile(GemmTile, tiles, "gemm"),
        gemm_t=_tile(GemmTile, tiles, "gemm_t"),
        thin=_tile(Tile, tiles, "thin"),
        reduce=_tile(Tile, tiles, "reduce"),
        origin=typed(content, "origin", str),
    )
    shared = SHARED_LIMIT.get(architecture, max(SHARED_LIMIT.values()))
    device = Device(architecture, shared=shared)
    for name, gemm in (("gemm", entry.gemm), ("gemm_t", entry.gemm_t)):
        if gemm.descriptors and not device.has_descriptors:
            raise ValueError(f"{name} tile {gemm}: {architecture} has no tensor descriptors")
        if gemm.stores > 1 and not gemm.descriptors:
            raise ValueError(f"{name} tile {gemm}: stores above 1 requires descriptors")
        if not fits(gemm, device):
            raise ValueError(f"{name} tile {gemm} needs more shared memory than {architecture} has")
    return entry


def read_block_entry(content: Any) -> BlockEntry:
    """A block's entry from its JSON; raises what :func:`read_entry` raises."""
    tiles = _tiles(content)
    return BlockEntry(
        **_sizes(content, "N", "M", "R"),
        dtype=_one_of(content, "dtype", DTYPES),
        form=_one_of(content, "form", FORMS),
        activate=_tile(Tile, tiles, "activate"),
        gated=_tile(Tile, tiles, "gated"),
        origin=typed(content, "origin", str),
    )


def as_json(entry: Entry | BlockEntry) -> dict[str, Any]:
    """The JSON that :func:`read_entry` and :func:`read_block_entry` read."""
    flat = asdict(entry)
    tiles = {name: flat.pop(name) for name, value in asdict(entry).items() if type(value) is dict}
    return {**flat, "tiles": tiles}


def _tiles(content: Any) -> Any:
    if not isinstance(content, dict):
        raise TypeError(f"entry {content!r} is not an object")
    return typed(content, "tiles", dict)


def _sizes(content: Mapping[str, Any], *names: str) -> dict[str, int]:
    sizes = {name: typed(content, name, int) for name in names}
    for name, size in sizes.items():
        if size < 1 or (name in "MR" and size & (size - 1)):
            raise ValueError(f"{name} is {size}: sizes are positive, and M and R powers of two")
    return sizes


def fits(gemm: GemmTile, device: Device) -> bool:
    """Whether a tile's operands, of 2 bytes per element, fit in a device's shared memory.

    This is necessary but not sufficient: only compilation shows what else a kernel keeps there.
    """
    operands = (gemm.block_m + gemm.block_n) * gemm.block_k
    needed = 2 * max(1, gemm.stages - 1) * operands  # all stages but the one in registers
    if gemm.descriptors:
        needed = 2 * gemm.stages * operands
        if device.has_asynchronous_products:  # this block's store overlaps the next one's loads
            needed += 2 * gemm.block_m * gemm.block_n // gemm.stores
    return needed <= device.shared_limit


_ALLOWED = {"warps": (1, 2, 4, 8, 16), "stores": (1, 2, 4)}


def _tile(kind: Any, tiles: Mapping[str, Any], name: str) -> Any:
    content = typed(tiles, name, dict)
    expected = {each.name for each in fields(kind)}
    if set(content) != expected:
        raise ValueError(f"{name} tile has the keys {sorted(content)}, not {sorted(expected)}")
    for key, value in content.items():
        if key == "descriptors":
            valid = isinstance(value, bool)
        elif type(value) is not int:
            valid = False
        elif key.startswith("block"):
            valid = 16 <= value <= 1024 and value & (value - 1) == 0
        else:
            valid = value in _ALLOWED.get(key, range(1, 65))
        if not valid:
            raise ValueError(f"{name} tile: {key} {value!r}")
    return kind(**content)


def typed(content: Mapping[str, Any], name: str, kind: type) -> Any:
    """``content[name]``; raises TypeError if it is not of type ``kind``."""
    value = content[name]
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r}, not of type {kind.__name__}")
    return value


def _one_of(content: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    value = content[name]
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(choices)}")
    return str(value)
