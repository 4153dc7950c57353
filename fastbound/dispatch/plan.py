"""(device, shape, dtype) -> Plan: which path runs and with which tiles. Pure, and never an error.

A table of measurements (``plan_tables``) answers where it holds a shape near enough, the defaults
elsewhere: an unknown GPU gets the pointer tiles of Ampere, the smallest common ground. What cannot
run in Triton (fp64, rank above 64, no Triton) runs in PyTorch. ``Plan.reason`` says which it was.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fastbound.dispatch.entries import BlockEntry, Entry
from fastbound.dispatch.tables import PlanTable, row_bucket, table_for
from fastbound.kernels.tiles import DESCRIPTOR_ALIGNMENT, FEW_ROWS, GemmTile, Tile
from fastbound.operator.torch_engine import padded_rank

BACKENDS = ("auto", "fused", "split", "torch", "reference")
MAX_TRITON_RANK = 64
MAX_BLOCK_RANK = MAX_TRITON_RANK // 2  # two projections stand side by side
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Device:
    """``architecture`` is ``sm_90``, ``gfx942``, ``cpu``, ``interpreter`` and the like."""

    architecture: str
    multiprocessors: int = 1


@dataclass(frozen=True)
class Tiles:
    """``gemm`` for y, ``gemm_t`` for dx, ``thin`` (rows x step) for S, ``reduce`` (step x columns).

    The two GEMMs differ in how the weight lies: row by row for y, and read transposed for dx. A
    Conv1D's weight lies the other way round, so its y takes ``gemm_t``.

    For an MLP block also ``activate`` (rows x step) and ``gated``, its backward (step x columns).
    """

    gemm: GemmTile
    gemm_t: GemmTile
    thin: Tile
    reduce: Tile
    activate: Tile
    gated: Tile


@dataclass(frozen=True)
class Plan:
    """The path of one layer's products at one shape.

    ``strategy``: "fused" (Triton throughout), "split" (Triton around a cuBLAS GEMM with beta = 1),
    "torch" or "reference", which have no tiles. `explain` also has "base" (no adapter is active)
    and "refused" (calling the layer raises); ``reason`` says why.
    """

    strategy: str
    reason: str
    tiles: Tiles | None = None
    multiprocessors: int = 1


def plan(
    device: Device,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
    backend: str = "auto",
    table: PlanTable | None = None,
    form: str | None = None,
) -> Plan:
    """The plan for x [M, K], weight [N, K] and factors of ``rank`` in compute dtype ``dtype``.

    ``table`` holds measurements of this device, or None. ``form``, as
    :func:`fastbound.dispatch.entries.block_form` names it, is that of an MLP block whose two first
    projections have ``rank`` side by side. Raises ValueError for an unknown backend,
    and for "fused" or "split" where Triton cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend in ("torch", "reference"):
        return Plan(backend, f'backend="{backend}" was asked for')
    if M == 0:
        return Plan("torch", "no rows: nothing to launch")
    obstacle = _triton_obstacle(device, rank, dtype)
    if obstacle is not None:
        if backend == "auto":
            return Plan("torch", obstacle)
        raise ValueError(f'backend="{backend}" cannot run here: {obstacle}; use "auto"')
    if backend == "auto" and device.architecture == "interpreter":
        return Plan("torch", "CPU: the Triton interpreter runs only when asked for by name")
    odd = _unaligned(N, K, dtype)
    R = padded_rank(rank)
    tiles = filled_tiles(device, M, (N, K), R, dtype)
    strategy, reason = "fused", f"default tiles of {_tile_family(device.architecture)}"
    of_block = ""
    if dtype is torch.float32:
        strategy, reason = "split", "fp32: cuBLAS honours the fp32 precision setting"
    elif odd:
        strategy, reason = "split", f"rows of {odd} are no multiple of 16 bytes"
        tiles = _unaligned_tiles(R)
    else:
        if M <= FEW_ROWS:
            block = f"{tiles.gemm.block_m}x{tiles.gemm.block_n}"
            strategy, reason = "split", f"few rows: too few blocks of {block}; {reason}"
        if table is not None:
            name = str(dtype).removeprefix("torch.")
            entry = table.nearest(M, N, K, R, name)
            if entry is not None:
                strategy, reason = entry.strategy, f"{entry.origin}: {entry}, in {table.path}"
                tiles = _with_entry(tiles, entry)
            elif table.path is not None:
                reason += f": nothing near in {table.path}"
            if table.note:
                reason += f" ({table.note})"
            if form is not None:
                own = table.nearest_block(M, N, R // 2, name, form)
                tiles, of_block = _with_block(tiles, own, table)
    if backend != "auto":
        strategy, reason = backend, f'backend="{backend}" was asked for'
    if strategy == "torch":
        return Plan(strategy, reason)
    return Plan(strategy, reason + of_block, tiles, device.multiprocessors)


def plan_for(
    device: torch.device,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
    backend: str = "auto",
    form: str | None = None,
) -> Plan:
    """:func:`plan` for a torch device and its table, cached; M enters in powers of two."""
    described = describe(device.type, device.index)
    return _cached_plan(described, row_bucket(M), N, K, rank, dtype, backend, form)


@lru_cache(maxsize=4096)
def _cached_plan(
    device: Device,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
    backend: str,
    form: str | None,
) -> Plan:
    table = None
    if device.architecture.startswith(("sm_", "gfx")):
        table = table_for(device.architecture, device.multiprocessors)
    return plan(device, M, N, K, rank, dtype, backend, table, form)


def _with_entry(tiles: Tiles, entry: Entry) -> Tiles:
    """A layer's tiles as measured."""
    return replace(
        tiles, gemm=entry.gemm, gemm_t=entry.gemm_t, thin=entry.thin, reduce=entry.reduce
    )


def _with_block(tiles: Tiles, entry: BlockEntry | None, table: PlanTable) -> tuple[Tiles, str]:
    """A block's own two tiles as measured, and where they come from."""
    if entry is not None:
        tiles = replace(tiles, activate=entry.activate, gated=entry.gated)
        return tiles, f"; activate and gated {entry.origin}: {entry}, in {table.path}"
    if table.path is not None:
        return tiles, f"; activate and gated by default: no such block near in {table.path}"
    return tiles, ""


@lru_cache(maxsize=64)
def describe(device_type: str, index: int | None = None) -> Device:
    """The :class:`Device` behind a torch device."""
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(index if index is not None else "cuda")
        architecture = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip is not None:
            architecture = properties.gcnArchName.split(":")[0]
        return Device(architecture, properties.multi_processor_count)
    if device_type == "cpu" and interpreting():
        return Device("interpreter", 4)
    return Device(device_type)


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter: ``TRITON_INTERPRET=1`` before import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_obstacle(device: Device, rank: int, dtype: torch.dtype) -> str | None:
    if device.architecture in ("cpu", "mps", "xpu"):
        return f"device {device.architecture}: the kernels are for CUDA and ROCm"
    if not _has_triton():
        return "the package triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"{dtype}: the kernels take fp32, fp16 and bf16"
    if rank > MAX_TRITON_RANK:
        return f"rank {rank}: the kernels take up to {MAX_TRITON_RANK}"
    return None


def _tile_family(architecture: str) -> str:
    """sm_90 for Hopper and newer (tensor descriptors), gfx942 for AMD, sm_80 for all others."""
    if architecture.startswith("gfx"):
        return "gfx942"
    if architecture.startswith("sm_") and int(architecture[3:]) >= 90:
        return "sm_90"
    return "sm_80"


def _unaligned_tiles(R: int) -> Tiles:
    """Element by element loads: neither TMA nor asynchronous copies, and larger tiles spill."""
    gemm = GemmTile(128, 128, 32, 8, 2)
    activate, gated = Tile(16, 64, 8 if R == 64 else 4, 2), Tile(16, 16, 4, 1)
    return Tiles(gemm, gemm, Tile(16, 64, 4, 2), Tile(32, 128, 4, 2), activate, gated)


def _unaligned(N: int, K: int, dtype: torch.dtype) -> str:
    """The sizes whose rows vector loads cannot take, named: "K 4093", "K 33 and N 65", or ""."""
    sizes = {"K": K, "N": N}
    odd = [
        f"{name} {size}"
        for name, size in sizes.items()
        if size * dtype.itemsize % DESCRIPTOR_ALIGNMENT
    ]
    return " and ".join(odd)


def filled_tiles(
    device: Device, M: int, widths: tuple[int, int], R: int, dtype: torch.dtype
) -> Tiles:
    """The defaults, with a reduction's tile that fills the device at M rows of either width."""
    tiles = default_tiles(device.architecture, M, R, dtype)
    return replace(tiles, reduce=filling(tiles.reduce, M, min(widths), device.multiprocessors))


def filling(reduce: Tile, M: int, width: int, multiprocessors: int) -> Tile:
    """A reduction's tile for M x ``width``, cut until every multiprocessor has a program.

    Columns first, down to 64 (in bf16 128 bytes of a row), then rows, down to 16.
    """

    def programs(tile: Tile) -> int:
        return -(-M // tile.block_m) * -(-width // tile.block_n)

    while programs(reduce) < multiprocessors:
        columns, rows = reduce.block_n // 2, reduce.block_m // 2
        if columns >= 64:
            reduce = replace(reduce, block_n=columns, warps=max(4, reduce.warps // 2))
        elif rows >= 16:
            reduce = replace(reduce, block_m=rows)
        else:
            break
    return reduce


def default_tiles(architecture: str, M: int, R: int, dtype: torch.dtype) -> Tiles:
    """Defaults for M rows and padded rank R, chosen by what compiles without spills; not timed.

    A block's tiles (the last two) are for two projections of half R each, side by side.
    """
    gemm, thin, activate = GemmTile(64, 64, 32, 4, 3), Tile(16, 64, 4, 3), Tile(32, 64, 4, 1)
    if architecture == "interpreter":
        gemm, tall = GemmTile(64, 64, 64, 4, 2), Tile(64, 128, 4, 2)
        return Tiles(gemm, gemm, tall, tall, tall, Tile(64, 64, 4, 2))
    family = _tile_family(architecture)
    if dtype is torch.float32:
        return Tiles(gemm, gemm, thin, thin, Tile(16, 64, 4, 2), Tile(16, 32, 4, 1))
    rows = 64 if M >= 8192 else 32 if M >= 2048 else 16
    warps, gated = 8 if R == 64 else 4, Tile(16, 32, 4, 1 if R == 64 else 2)
    if family == "sm_90":
        gemm = GemmTile(128, 256, 64, 8, 3, descriptors=True)
        thin, reduce = Tile(rows, 128, warps, 4), Tile(64, 512 if R == 16 else 256, 8, 3)
        return Tiles(gemm, gemm, thin, reduce, activate, gated)
    if family == "gfx942":
        gemm, thin = GemmTile(128, 128, 64, 8, 2), Tile(rows, 128, warps, 2)
        return Tiles(gemm, gemm, thin, Tile(64, 128, 4, 2), activate, Tile(16, 32, 8, 2))
    thin, reduce = Tile(rows, 128, warps, 4), Tile(32, 256 if R == 64 else 512, 8, 3)
    gemm = GemmTile(128, 256, 32, 8, 4)
    return Tiles(gemm, gemm, thin, reduce, activate, gated)
