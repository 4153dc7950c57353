"""Predicted times by arithmetic: each pass's operations and bytes over a device's ceilings.

A pass takes the larger of its operations over the compute ceiling and its bytes over the bandwidth
ceiling; passes follow one another and nothing overlaps between them. Launches and what is as small
as a factor or as S [M, r] are left out. `benchmarks/NOTES.md` holds predictions against outcomes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastbound.dispatch.defaults import filled_tiles, padded_rank
from fastbound.dispatch.device import Device
from fastbound.kernels.tiles import Tile
from fastbound.performance.shapes import Shape

BF16, FP32 = 2, 4  # bytes of an element of an operand and of a workspace
RANK = 16


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: operations per second in a large GEMM, bytes per second."""

    flops: float
    bandwidth: float


# Vendors' datasheets, dense bf16: bounds that no measurement passes. A measured pair is better.
DATASHEET: Mapping[str, Ceilings] = {
    "a100-80gb": Ceilings(312e12, 2.039e12),
    "h100": Ceilings(989e12, 3.35e12),
    "h200": Ceilings(989e12, 4.8e12),
    "mi300x": Ceilings(1307e12, 5.3e12),
}


def datasheet_of(gpu: str) -> Ceilings:
    """Of the card in a device's name; of an H100 for any other, whose ratio of the two is usual."""
    found = [c for key, c in DATASHEET.items() if key.split("-")[0] in gpu.lower()]
    return found[0] if found else DATASHEET["h100"]


@dataclass(frozen=True)
class Pass:
    """One kernel, or GEMMs that follow one another: what it computes, operations, bytes."""

    name: str
    flops: int
    nbytes: int

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.flops, self.nbytes / ceilings.bandwidth)

    def bound_by(self, ceilings: Ceilings) -> str:
        by_compute = self.flops / ceilings.flops > self.nbytes / ceilings.bandwidth
        return "compute" if by_compute else "memory"


class _Step(NamedTuple):
    """One pass of a strategy: bytes per element of [M, K] and of [M, N], thin products of each.

    Of a GEMM the bytes beyond its own operands, which are x, W and y or their gradients.
    """

    name: str
    forward: bool
    K: int = 0
    N: int = 0
    thin_K: int = 0
    thin_N: int = 0
    gemm: bool = False


_Y, _DX = _Step("y: GEMM", True, gemm=True), _Step("dx: GEMM", False, gemm=True)
_S = _Step("S", True, K=2, thin_K=1)
_DS_DB = _Step("dS, dB", False, N=2, thin_N=2)
_DA = _Step("dA", False, K=2, thin_K=1)

# For bf16 x and W, in the order of execution; tests/test_traffic.py counts their bytes.
_STEPS: Mapping[str, Sequence[_Step]] = {
    "frozen": (_Y, _DX),
    "fused": (_S, _Y, _DS_DB, _DX, _DA),
    "split": (
        _S,
        _Step("S SBᵀ into y", True, N=2, thin_N=1),
        _Step("y: GEMM onto it", True, N=2, gemm=True),
        _DS_DB,
        _Step("dS SA into dx", False, K=2, thin_K=1),
        _Step("dx: GEMM onto it", False, K=2, gemm=True),
        _DA,
    ),
    "addmm": (
        _S,
        _Y,
        _Step("y += S SBᵀ", True, N=4, thin_N=1),
        _Step("dS", False, N=2, thin_N=1),
        _DX,
        _Step("dx += dS SA", False, K=4, thin_K=1),
        _DA,
        _Step("dB", False, N=2, thin_N=1),
    ),
    "peft_bf16": (
        _Y,
        _S,
        _Step("B's product", True, N=2, thin_N=1),
        _Step("scaled", True, N=4),
        _Step("added to y", True, N=6),
        _Step("dy scaled", False, N=4),
        _Step("dS", False, N=2, thin_N=1),
        _Step("dB", False, N=2, thin_N=1),
        _Step("dS SA", False, K=2, thin_K=1),
        _DA,
        _DX,
        _Step("added to dx", False, K=6),
    ),
    "peft_fp32": (
        _Y,
        _Step("x cast", True, K=6),
        _Step("S", True, K=4, thin_K=1),
        _Step("B's product", True, N=4, thin_N=1),
        _Step("scaled", True, N=8),
        _Step("added to y", True, N=10),
        _Step("y cast", True, N=6),
        _Step("dy cast, twice", False, N=12),
        _Step("dy scaled", False, N=8),
        _Step("dS", False, N=4, thin_N=1),
        _Step("dB", False, N=4, thin_N=1),
        _Step("dS SA", False, K=4, thin_K=1),
        _Step("dA", False, K=4, thin_K=1),
        _DX,
        _Step("dx cast", False, K=6),
        _Step("added to dx", False, K=6),
    ),
}
STRATEGIES = tuple(_STEPS)

# Bytes kept for backward, per element of [M, K] and of [M, r].
_SAVED = {
    "frozen": (0, 0),
    "fused": (2, 2),
    "split": (2, 2),
    "addmm": (2, 2),
    "peft_bf16": (2, 2),
    "peft_fp32": (4, 4),
}


def traffic(name: str) -> dict[tuple[str, str], int]:
    """Bytes a strategy moves beyond the floor, per element of [M, "K"] and [M, "N"], each way."""
    return {
        (direction, width): sum(
            getattr(step, width)
            for step in _STEPS[name]
            if step.forward is (direction == "forward")
        )
        for direction in ("forward", "backward")
        for width in "KN"
    }


def gemm_flops(shape: Shape, M: int) -> int:
    """Operations of x Wᵀ, and of dy W: 2·M·N·K."""
    return 2 * M * shape.N * shape.K


def gemm_bytes(shape: Shape, M: int, itemsize: int = BF16) -> int:
    """Bytes of x, W and y, each moved once."""
    return itemsize * (M * shape.K + shape.N * shape.K + M * shape.N)


def gemm_seconds(shape: Shape, M: int, ceilings: Ceilings) -> float:
    """The bare GEMM, forward or dx, at the ceilings."""
    return Pass("GEMM", gemm_flops(shape, M), gemm_bytes(shape, M)).seconds(ceilings)


def adapter_flops(shape: Shape, M: int, rank: int = RANK) -> int:
    """Operations the adapter adds: two thin products forward, four backward."""
    return 6 * M * rank * (shape.K + shape.N)


def layer_passes(
    name: str, shape: Shape, M: int, rank: int = RANK, device: Device | None = None
) -> list[Pass]:
    """The passes of one layer's forward and backward by one strategy.

    With ``device``, fused and split also write and read their workspaces, as large as there.
    """
    K, N = shape.K, shape.N
    parts: Mapping[str, int] = {}
    if device is not None and name in ("fused", "split"):
        parts = linear_workspaces(M, (K, N), rank, device.architecture, device.multiprocessors)
    extra = {
        "S": parts.get("S parts", 0),
        "dS, dB": parts.get("dS parts", 0) + parts.get("dB parts", 0),
        "dA": parts.get("dA parts", 0),
    }
    found = []
    for step in _STEPS[name]:
        flops = 2 * M * rank * (step.thin_K * K + step.thin_N * N)
        nbytes = M * (step.K * K + step.N * N) + 2 * extra.get(step.name, 0)
        if step.gemm:
            flops += gemm_flops(shape, M)
            nbytes += gemm_bytes(shape, M)
            if name == "fused":  # the low-rank term is the first step of its sum
                flops += 2 * M * N * rank if step.forward else 2 * M * K * rank
        found.append(Pass(step.name, flops, nbytes))
    return found


def predicted_seconds(
    name: str,
    shape: Shape,
    M: int,
    ceilings: Ceilings,
    rank: int = RANK,
    device: Device | None = None,
) -> float:
    """Forward plus backward of one layer by one strategy."""
    return sum(one.seconds(ceilings) for one in layer_passes(name, shape, M, rank, device))


def predicted_ratio(
    name: str,
    shape: Shape,
    M: int,
    ceilings: Ceilings,
    rank: int = RANK,
    device: Device | None = None,
) -> float:
    """:func:`predicted_seconds` over that of the frozen layer."""
    floor = 2 * gemm_seconds(shape, M, ceilings)
    return predicted_seconds(name, shape, M, ceilings, rank, device) / floor


def saved_bytes(name: str, shape: Shape, M: int, rank: int = RANK) -> int:
    """Bytes kept for backward on bf16 x, x itself included, tensors of a weight's size left out."""
    per_K, per_r = _SAVED[name]
    return M * (per_K * shape.K + per_r * rank)


def linear_workspaces(
    rows: int, shape: tuple[int, int], rank: int, architecture: str, sms: int
) -> dict[str, int]:
    """Bytes of each workspace of one layer, K -> N, with the default tiles.

    S has parts only where its rows alone do not fill the device.
    """
    K, N = shape
    R = padded_rank(rank)
    tiles = filled_tiles(Device(architecture, sms), rows, (N, K), R, torch.bfloat16)
    tile = tiles.reduce
    S = parts_of_S(rows, K, R, tiles.thin, sms)[0]
    return ({"S parts": S} if S else {}) | {
        "dS parts": parts_of_P(rows, N, R, tile),
        "dB parts": parts_of_Q(rows, N, R, tile, sms)[0],
        "dA parts": parts_of_Q(rows, K, R, tile, sms)[0],
    }


def parts_of_S(rows: int, K: int, R: int, tile: Tile, sms: int) -> tuple[int, int]:
    """Bytes, none where one launch writes S itself, and how many programs write."""
    from fastbound.kernels.thin import step_chunks

    chunks, _ = step_chunks(rows, K, tile, sms)
    return FP32 * chunks * rows * R * (chunks > 1), chunks * -(-rows // tile.block_m)


def parts_of_P(rows: int, columns: int, R: int, tile: Tile) -> int:
    return FP32 * -(-columns // tile.block_n) * rows * R


def parts_of_Q(rows: int, columns: int, R: int, tile: Tile, sms: int) -> tuple[int, int]:
    """Bytes, and how many programs write them."""
    from fastbound.kernels.reduce import row_chunks

    chunks, _ = row_chunks(rows, columns, tile, sms)
    return FP32 * chunks * columns * R, chunks * -(-columns // tile.block_n)
