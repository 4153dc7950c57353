"""(device, shape, dtype) -> Plan: which path runs, and with which tiles.

A plan is a pure function of its key and its table, and for "auto" never an error. Without a
measurement the strategy is "split", whose GEMM is cuBLAS's. A table (``tables``) decides for the
shapes at which it was measured and lends its tiles to shapes near them. Otherwise the plan names
the candidates that the first call measures (``first_use``). An unknown GPU gets the tiles of its
family (``defaults.tile_family``). What cannot run in Triton (fp64, a rank above 64, no Triton)
runs in PyTorch. ``Plan.reason`` says why.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from fastbound.dispatch.choices import Place
from fastbound.dispatch.defaults import (
    Tiles,
    filled_share,
    filled_tiles,
    padded_rank,
    tile_family,
    unaligned_tiles,
)
from fastbound.dispatch.device import Device, describe
from fastbound.dispatch.entries import BlockEntry, Entry
from fastbound.dispatch.first_use import LEAST_ROWS
from fastbound.dispatch.tables import PlanTable, row_bucket, software, table_for
from fastbound.kernels.tiles import DESCRIPTOR_ALIGNMENT

PLANNING = ("measured", "fixed")
LEAST_SHARE = 0.93  # the share of the device that the blocks of a fused GEMM must fill
BACKENDS = ("auto", "fused", "split", "torch", "reference")
MAX_TRITON_RANK = 64  # of a layer, and of each projection of a block
# Families whose matrix unit does not support fp32, which the product form's contraction needs.
WITHOUT_PRODUCT = ("gfx1100",)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """The path of one layer's products at one shape.

    ``strategy`` is "fused" (Triton throughout), "split" (Triton around a cuBLAS GEMM with
    beta = 1), "torch" or "reference"; the last two have no tiles. For a block as a whole it is
    "block" (one operator) or "layers". `explain` also reports "base" (no adapter is active) and
    "refused" (calling the layer raises an error). ``reason`` says why. ``candidates`` are the
    strategies that the first call measures, the default first; ``strategy`` is then what runs if
    it cannot measure.
    """

    strategy: str
    reason: str
    tiles: Tiles | None = None
    multiprocessors: int = 1
    candidates: tuple[str, ...] = ()

    def by(self, strategy: str, reason: str | None = None) -> Plan:
        """This plan, settled on a strategy."""
        tiles = None if strategy in ("torch", "layers") else self.tiles
        reason = self.reason if reason is None else reason
        return replace(self, strategy=strategy, reason=reason, tiles=tiles)


class PlanKey(NamedTuple):
    """Everything that a plan depends on except tables; the key of the cache (``route_for``).

    ``M`` is the actual number of rows; row counts up to the same power of two share tiles and
    binaries. ``form``, as :func:`fastbound.dispatch.entries.block_form` names it, is the form of an
    MLP block, whose first two projections side by side have ``rank``; None for a layer.
    ``over_base`` says that another layer computes x Wᵀ, so that there is no GEMM to fuse with.
    ``part`` is one of ``choices.PARTS``. ``layout``, one of ``choices.LAYOUTS``, says how the
    weight is stored if x is contiguous, or that one of the two is strided. ``product`` says that
    the adapter has the product form, whose GEMMs take W + ΔW at any rank.
    """

    device: Device | torch.device
    M: int
    N: int
    K: int
    rank: int
    dtype: torch.dtype
    backend: str = "auto"
    form: str | None = None
    over_base: bool = False
    part: str = "forward"
    layout: str = "rows"
    dropout: bool = False
    product: bool = False


def plan_key(
    device: torch.device,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
    backend: str = "auto",
    form: str | None = None,
    over_base: bool = False,
    part: str = "forward",
    layout: str = "rows",
    dropout: bool = False,
    product: bool = False,
) -> PlanKey:
    """The key of x [M, K] on a torch device; for meta, on the device that is pretended."""
    where = describe(device) if device.type == "meta" else device
    how = (backend, form, over_base, part, layout, dropout, product)
    return PlanKey(where, M, N, K, rank, dtype, *how)


def place_of(key: PlanKey, found: Plan) -> Place:
    """The place under which the first call's choice for a key is stored; ``found`` is its plan."""
    tiles = hashlib.sha256(repr(found.tiles).encode()).hexdigest()[:12] if found.tiles else ""
    return Place(
        **{name: getattr(key, name) for name in ("part", "N", "K", "layout", "dropout", "product")},
        M=row_bucket(key.M),
        R=padded_rank(key.rank),
        dtype=str(key.dtype).removeprefix("torch."),
        form=key.form or "",
        over_base=key.over_base,
        fills="fused" in found.candidates,
        tiles=tiles,
    )


def plan_for(key: PlanKey, planning: str = "measured") -> Plan:
    """:func:`plan` with the table of measurements for the key's device, if there is one.

    With ``planning`` "fixed" only the package's own tables count, and the plan has no candidates.
    """
    device = key.device if isinstance(key.device, Device) else describe(key.device)
    table = None
    if device.architecture.startswith(("sm_", "gfx")):
        table = table_for(device.architecture, device.multiprocessors, planning == "fixed")
    found = plan(key._replace(device=device), table)
    if found.candidates and (planning == "fixed" or isinstance(key.device, Device)):
        why = "planning is fixed" if planning == "fixed" else "the device is not in this machine"
        return replace(found, candidates=(), reason=f"{why}: {found.reason}")
    return found


def plan(key: PlanKey, table: PlanTable | None = None) -> Plan:
    """The plan for x [M, K], weight [N, K] and factors of ``rank`` in compute dtype ``dtype``.

    ``table`` has the measurements of this device, if any. Raises ValueError for an unknown backend,
    for "fused" or "split" if Triton cannot run, and for "fused" over a base layer.
    """
    described, M, N, K, rank, dtype, backend, form, over_base, part, *_ = key
    device = described if isinstance(described, Device) else describe(described)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "fused" and over_base:
        raise ValueError(
            'backend="fused" cannot run here: the base layer computes x Wᵀ itself; use "auto"'
        )
    if backend in ("torch", "reference"):
        return Plan(backend, f'backend="{backend}" was asked for')
    if M == 0:
        return Plan("torch", "no rows: nothing to launch")
    most = MAX_TRITON_RANK if form is None else most_block_rank(device)
    each = rank if form is None else rank // 2  # the rank of a single projection
    if key.product:  # no kernel of this form depends on the rank
        rank = each = 1
    if part == "whole":
        if backend == "auto" and MAX_TRITON_RANK >= each > most:
            return Plan("layers", _beyond(each, most))
        return _whole(device, M, backend)
    obstacle = _triton_obstacle(device, each, most, dtype)
    if key.product and obstacle is None and tile_family(device) in WITHOUT_PRODUCT:
        obstacle = f"product form: the matrix unit of {device.architecture} does not support fp32"
    if obstacle is not None:
        if backend == "auto":
            return Plan("torch", obstacle)
        raise ValueError(f'backend="{backend}" cannot run here: {obstacle}; use "auto"')
    if backend == "auto" and device.architecture == "interpreter":
        return Plan("torch", "CPU: the Triton interpreter runs only when asked for by name")
    odd = _unaligned(N, K, dtype)
    R, bucket = padded_rank(rank), row_bucket(M)
    loose = odd or key.layout == "strided"
    tiles = unaligned_tiles(device, R) if loose else filled_tiles(device, bucket, (N, K), R, dtype)
    reason = f"default tiles of {tile_family(device)}"
    of_block = ""
    entry = None
    if table is not None and not odd and dtype is not torch.float32 and not key.product:
        name = str(dtype).removeprefix("torch.")
        entry = table.nearest(M, N, K, R, name)
        if entry is not None:
            reason = f"{entry.origin}: {entry}, in {table.path}"
            tiles = _with_entry(tiles, entry)
        elif table.path is not None:
            reason += f": no similar shape in {table.path}"
        if table.note:
            reason += f" ({table.note})"
        if form is not None:
            own = table.nearest_block(M, N, R // 2, name, form)
            tiles, of_block = _with_block(tiles, own, table)
    if backend != "auto":
        held = None if backend == "torch" else tiles
        reason = f'backend="{backend}" was asked for{of_block}'
        return Plan(backend, reason, held, device.multiprocessors)
    unfused = _unfused(key._replace(device=device), odd, tiles)
    if entry is not None and table is not None and _settles(entry, bucket, N, K, table):
        if entry.strategy == "torch":
            return Plan("torch", reason)
        strategy = "split" if unfused else entry.strategy
        if strategy != entry.strategy:
            reason = f"{unfused}; {reason}"
        return Plan(strategy, reason + of_block, tiles, device.multiprocessors)
    candidates: tuple[str, ...] = ("split", "torch") if unfused else ("split", "torch", "fused")
    said = f"{unfused}; {reason}" if unfused else reason
    if M < LEAST_ROWS:
        candidates, said = (), f"few rows: below {LEAST_ROWS} nothing is timed; {reason}"
    return Plan("split", said + of_block, tiles, device.multiprocessors, candidates)


def _whole(device: Device, M: int, backend: str) -> Plan:
    """How a block runs: as one operator or by layers, which must be known before its forward."""
    reason = "one operator saves less for backward"
    if backend != "auto":
        return Plan("block", f'backend="{backend}" was asked for')
    if M < LEAST_ROWS:
        return Plan("block", f"{reason}; few rows: below {LEAST_ROWS} nothing is timed")
    known = device.architecture in ("cpu", "interpreter")
    known = known or device.architecture.startswith(("sm_", "gfx"))
    return Plan("block", reason, candidates=("block", "layers") if known else ())


def most_block_rank(device: Device) -> int:
    """The largest rank of a block's kernels: RDNA's registers hold less than the others'."""
    return MAX_TRITON_RANK // 2 if tile_family(device) == "gfx1100" else MAX_TRITON_RANK


def _settles(entry: Entry, bucket: int, N: int, K: int, table: PlanTable) -> bool:
    """Whether an entry was measured for exactly this shape, with the installed software."""
    same = (bucket, N, K) == (entry.M, entry.N, entry.K)
    return same and all(software().get(name) == v for name, v in table.versions.items())


def _unfused(key: PlanKey, odd: str, tiles: Tiles) -> str:
    """Why the GEMM of a key should not be Triton's whatever a measurement says, or ""."""
    if key.product:
        return "product form: W + ΔW and its gradient in Triton, the GEMMs by cuBLAS"
    if key.dtype is torch.float32:
        return "fp32: cuBLAS honours the fp32 precision setting"
    if odd:
        return f"rows of {odd} are not a multiple of 16 bytes"
    if key.over_base:
        return "over a base there is no GEMM to fuse with"
    if key.layout == "strided":
        return "strided operands: a fused GEMM would load them element by element"
    device, M = key.device, key.M
    if not isinstance(device, Device):
        raise TypeError(f"{device} must be described first (fastbound.dispatch.device.describe)")
    transposed = (key.part == "backward") != (key.layout == "columns")
    tile = tiles.gemm_t if transposed else tiles.gemm
    widths = [key.K if key.part == "backward" else key.N]
    if key.form is not None:
        widths = [key.N, key.K]
    share = min(filled_share(M, width, tile, device.multiprocessors) for width in widths)
    if share < LEAST_SHARE:
        return f"a fused GEMM would fill {share:.2f} of the device, less than {LEAST_SHARE}"
    return ""


def _with_entry(tiles: Tiles, entry: Entry) -> Tiles:
    """The tiles with a layer's as measured."""
    return replace(
        tiles, gemm=entry.gemm, gemm_t=entry.gemm_t, thin=entry.thin, reduce=entry.reduce
    )


def _with_block(tiles: Tiles, entry: BlockEntry | None, table: PlanTable) -> tuple[Tiles, str]:
    """The tiles with a block's own two as measured, and a note of where they come from."""
    if entry is not None:
        tiles = replace(tiles, activate=entry.activate, gated=entry.gated)
        return tiles, f"; activate and gated {entry.origin}: {entry}, in {table.path}"
    if table.path is not None:
        return tiles, f"; activate and gated by default: no similar block in {table.path}"
    return tiles, ""


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_obstacle(device: Device, rank: int, most: int, dtype: torch.dtype) -> str | None:
    if device.architecture in ("cpu", "mps", "xpu"):
        return f"device {device.architecture}: the kernels are for CUDA and ROCm"
    if device.architecture != "interpreter" and not device.has_matrix_units:
        return f"{device.architecture}: no matrix units for bf16 (NVIDIA's from sm_80 on have them)"
    if not _has_triton():
        return "the package triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"{dtype}: the kernels support fp32, fp16 and bf16"
    return _beyond(rank, most) if rank > most else None


def _beyond(rank: int, most: int) -> str:
    return f"rank {rank}: the kernels support ranks up to {most}"


def _unaligned(N: int, K: int, dtype: torch.dtype) -> str:
    """The sizes whose rows vector loads cannot read: "K 4093", "K 33 and N 65", or ""."""
    sizes = {"K": K, "N": N}
    odd = [
        f"{name} {size}"
        for name, size in sizes.items()
        if size * dtype.itemsize % DESCRIPTOR_ALIGNMENT
    ]
    return " and ".join(odd)
