"""What a compiled kernel shows of itself and must not show: the check of report and tuner."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fastbound.kernels.launch import Launch

GEMMS = ("descriptor", "pointer")
WITHOUT_DOT = ("factors", "finish", "finish_both", "keep", "narrow")

# What shows in a listing when the matrix unit, the copy engine or a spill is used.
_COUNTED = {
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "UTCMMA": r"\bUTC\w*MMA\b",
    "UTMALDG": r"\bUTMALDG\b",
    "UTMASTG": r"\bUTMASTG\b",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
    "v_mfma": r"\bv_mfma_",
    "v_wmma": r"\bv_wmma_",
}
_PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
SERIALISED = "C7515"  # ptxas: every wgmma waits for the one before it


@dataclass(frozen=True)
class SteadyLoop:
    """The loop of a GEMM on tensor descriptors over its reduction, as its instructions stand.

    ``in_flight``: groups of matrix products that still run where the loop waits for one, on Hopper
    alone (HGMMA); ``loads_ahead``: TMA loads that are on their way before the loop begins. A
    pipelined loop has at least one of the former and two for each stage but one of the latter.
    ``round_trips``: stores of the accumulator into Blackwell's tensor memory, which belongs there
    throughout. ``length`` counts instructions, the epilogue's included where the loops over tiles
    and steps are one.
    """

    in_flight: int | None
    loads_ahead: int
    length: int
    round_trips: int = 0


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled: figures per thread (registers) and per block (shared, bytes).

    ``warnings`` are the numbers of what ptxas said against a Hopper GEMM.
    """

    registers: int
    spills: int
    shared: int
    instructions: Mapping[str, int]
    loop: SteadyLoop | None = None
    warnings: tuple[str, ...] = ()


def kernel_name(launch: Launch) -> str:
    """The kernel's own, without what all of them share."""
    return str(launch.kernel.fn.__name__).strip("_").removesuffix("_kernel")


def count(listing: str) -> dict[str, int]:
    """The instructions that matter, by name, in a listing of SASS or of AMD's."""
    return {name: len(re.findall(pattern, listing)) for name, pattern in _COUNTED.items()}


def steady_loop(listing: str) -> SteadyLoop | None:
    """The first loop of a SASS listing with products and TMA loads; None where there is none."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)
    code = [(int(address, 16), text) for address, text in found]
    for end, text in code:
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        start = int(target[1], 16) if target else end
        body = [t for address, t in code if start <= address <= end]
        if start >= end or not any("UTMALDG" in t for t in body):
            continue
        products = [place for place, t in enumerate(body) if _PRODUCT.search(t)]
        if products:
            ahead = sum("UTMALDG" in t for address, t in code if address < start)
            back = sum("STTM" in t for t in body)
            return SteadyLoop(_in_flight(body, products), ahead, len(body), back)
    return None


def _in_flight(body: list[str], products: list[int]) -> int | None:
    """What the first wait after a product leaves running; None where no HGMMA is."""
    if not any("HGMMA" in t for t in body):
        return None
    for t in body[products[0] :]:
        if wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0,\s*0x([0-9a-f]+)", t):
            return int(wait[1], 16)
    return 0


def faults(launch: Launch, compiled: Compiled, units: tuple[str, ...], limit: int) -> Iterator[str]:
    """What a kernel must not do, or must use and does not.

    ``units``: the matrix instructions of the GPU, the one that a GEMM must use last; ``limit``: its
    bytes of shared memory for one block.
    """
    name, counts = kernel_name(launch), compiled.instructions
    if compiled.spills:
        yield f"{compiled.spills} spills"
    if compiled.shared > limit:
        yield f"{compiled.shared} bytes of shared memory for {limit}"
    if name in WITHOUT_DOT or _operand(launch).dtype is torch.float32:
        return
    needed = units[-1:] if name in GEMMS else units
    if not any(counts[unit] for unit in needed):
        yield f"no {' or '.join(needed)}"
    if name == "descriptor":
        yield from _loop_faults(compiled, launch.stages)


def _operand(launch: Launch) -> torch.Tensor:
    """The first argument: every kernel with products takes its tall operand there."""
    first = launch.arguments[0]
    return first if isinstance(first, torch.Tensor) else first.base  # of a tensor descriptor


def _loop_faults(compiled: Compiled, stages: int) -> Iterator[str]:
    """What keeps a GEMM on descriptors from running ahead of itself."""
    if not (compiled.instructions["UTMALDG"] and compiled.instructions["UTMASTG"]):
        yield "no TMA load or store"
    loop = compiled.loop
    if loop is None:
        yield "no loop over matrix products"
        return
    if loop.in_flight == 0:
        yield "the loop waits for its own matrix products"
    if loop.loads_ahead < 2 * (stages - 1):
        yield f"{loop.loads_ahead} loads ahead of the loop for {stages} stages"
    if loop.round_trips:
        yield "the accumulator leaves tensor memory and comes back in every step"
    if SERIALISED in compiled.warnings:
        yield f"ptxas makes the matrix products wait for one another ({SERIALISED})"
