"""(device, shape, dtype) -> Plan: which path runs and with which tiles. Pure, and never an error.

A table of measurements (``tables``) answers where it holds a shape near enough, the defaults
elsewhere: an unknown GPU gets the pointer tiles of Ampere, the smallest common ground. What cannot
run in Triton (fp64, rank above 64, no Triton) runs in PyTorch. ``Plan.reason`` says which it was.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from fastbound.dispatch.defaults import (
    Tiles,
    filled_tiles,
    padded_rank,
    tile_family,
    unaligned_tiles,
)
from fastbound.dispatch.device import Device, describe
from fastbound.dispatch.entries import BlockEntry, Entry
from fastbound.dispatch.tables import PlanTable, row_bucket, table_for
from fastbound.kernels.tiles import DESCRIPTOR_ALIGNMENT, FEW_ROWS

BACKENDS = ("auto", "fused", "split", "torch", "reference")
MAX_TRITON_RANK = 64
MAX_BLOCK_RANK = MAX_TRITON_RANK // 2  # two projections stand side by side
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


class PlanKey(NamedTuple):
    """All that a plan depends on, tables apart: the one key of the one cache (``engine_for``).

    ``M`` is a power of two, so that nearby sizes share a plan and its binaries. ``form``, as
    :func:`fastbound.dispatch.entries.block_form` names it, is that of an MLP block whose two first
    projections have ``rank`` side by side. ``over_base`` says that another layer computes x Wᵀ:
    there is no GEMM to fuse with.
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
) -> PlanKey:
    """The key of x [M, K] on a torch device, which meta tensors only pretend to be on."""
    where = describe(device) if device.type == "meta" else device
    return PlanKey(where, row_bucket(M), N, K, rank, dtype, backend, form, over_base)


def plan_for(key: PlanKey) -> Plan:
    """:func:`plan` with the table of measurements that lies there for the key's device."""
    device = key.device if isinstance(key.device, Device) else describe(key.device)
    table = None
    if device.architecture.startswith(("sm_", "gfx")):
        table = table_for(device.architecture, device.multiprocessors)
    return plan(key._replace(device=device), table)


def plan(key: PlanKey, table: PlanTable | None = None) -> Plan:
    """The plan for x [M, K], weight [N, K] and factors of ``rank`` in compute dtype ``dtype``.

    ``table`` holds measurements of this device, or None. Raises ValueError for an unknown backend,
    for "fused" or "split" where Triton cannot run, and for "fused" over a base.
    """
    described, M, N, K, rank, dtype, backend, form, over_base = key
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
    strategy, reason = "fused", f"default tiles of {tile_family(device)}"
    of_block = ""
    if dtype is torch.float32:
        strategy, reason = "split", "fp32: cuBLAS honours the fp32 precision setting"
    elif odd:
        strategy, reason = "split", f"rows of {odd} are no multiple of 16 bytes"
        tiles = unaligned_tiles(device, R)
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
    if over_base and strategy == "fused":
        strategy = "split"
    return Plan(strategy, reason + of_block, tiles, device.multiprocessors)


def product_plan(
    device: Device | torch.device, rank: int, dtype: torch.dtype, backend: str = "auto"
) -> Plan:
    """The plan of the product form: W + ΔW in Triton with the GEMMs left to cuBLAS, or in PyTorch.

    Raises ValueError as :func:`plan`.
    """
    described = device if isinstance(device, Device) else describe(device)
    if backend in ("torch", "reference"):
        return Plan(backend, f'backend="{backend}" was asked for')
    obstacle = _triton_obstacle(described, min(rank, MAX_TRITON_RANK), dtype)
    if obstacle is not None:
        if backend == "auto":
            return Plan("torch", obstacle)
        raise ValueError(f'backend="{backend}" cannot run here: {obstacle}; use "auto"')
    if backend == "auto" and described.architecture == "interpreter":
        return Plan("torch", "CPU: the Triton interpreter runs only when asked for by name")
    tiles = filled_tiles(described, FEW_ROWS, (FEW_ROWS, FEW_ROWS), 16, dtype)
    reason = "W + ΔW and its gradient's contraction in Triton, the GEMMs by cuBLAS"
    return Plan("split", reason, tiles, described.multiprocessors)


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


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_obstacle(device: Device, rank: int, dtype: torch.dtype) -> str | None:
    if device.architecture in ("cpu", "mps", "xpu"):
        return f"device {device.architecture}: the kernels are for CUDA and ROCm"
    if device.architecture != "interpreter" and not device.has_matrix_units:
        return f"{device.architecture}: no matrix units for bf16 (NVIDIA's from sm_80 on have them)"
    if not _has_triton():
        return "the package triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"{dtype}: the kernels take fp32, fp16 and bf16"
    if rank > MAX_TRITON_RANK:
        return f"rank {rank}: the kernels take up to {MAX_TRITON_RANK}"
    return None


def _unaligned(N: int, K: int, dtype: torch.dtype) -> str:
    """The sizes whose rows vector loads cannot take, named: "K 4093", "K 33 and N 65", or ""."""
    sizes = {"K": K, "N": N}
    odd = [
        f"{name} {size}"
        for name, size in sizes.items()
        if size * dtype.itemsize % DESCRIPTOR_ALIGNMENT
    ]
    return " and ".join(odd)
