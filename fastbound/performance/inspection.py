"""The facts of a compiled kernel, and the faults that the compile report and the tuner reject."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fastbound.kernels.launch import Launch

GEMMS = ("descriptor", "pointer")
WITHOUT_DOT = ("adapt", "factors", "finish", "finish_both", "keep", "narrow")

# The patterns of a listing that show the use of a matrix unit or copy engine, or a spill.
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
SERIALISED = "C7515"  # ptxas: every wgmma waits for the previous one


@dataclass(frozen=True)
class SteadyLoop:
    """The reduction loop of a GEMM with tensor descriptors, read from its instructions.

    ``in_flight`` is the number of groups of matrix products that still run when the loop waits for
    one (only on Hopper, HGMMA). ``loads_ahead`` is the number of TMA loads issued before the loop.
    In a pipelined loop the former is at least 1, and the latter at least 2·(stages - 1).
    ``round_trips`` counts stores of the accumulator into Blackwell's tensor memory, where it should
    stay throughout. ``length`` is the number of instructions, including the epilogue if the loops
    over tiles and steps are merged.
    """

    in_flight: int | None
    loads_ahead: int
    length: int
    round_trips: int = 0


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel, with registers per thread and shared memory per block in bytes.

    ``warnings`` are the codes of ptxas's warnings about a Hopper GEMM.
    """

    registers: int
    spills: int
    shared: int
    instructions: Mapping[str, int]
    loop: SteadyLoop | None = None
    warnings: tuple[str, ...] = ()


def kernel_name(launch: Launch) -> str:
    """The kernel's name without the suffix that all kernels share."""
    return str(launch.kernel.fn.__name__).strip("_").removesuffix("_kernel")


def count(listing: str) -> dict[str, int]:
    """How often each instruction that matters occurs in a listing of SASS or of AMD's assembly."""
    return {name: len(re.findall(pattern, listing)) for name, pattern in _COUNTED.items()}


def local_traffic(counts: Mapping[str, int]) -> int:
    """Local loads plus stores; 0 if nothing is loaded, since a spill is always loaded again."""
    return counts["LDL"] + counts["STL"] if counts["LDL"] else 0


def steady_loop(listing: str) -> SteadyLoop | None:
    """The first loop of a SASS listing with matrix products and TMA loads, or None."""
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
    """How many groups the first wait after a product leaves running; None without HGMMA."""
    if not any("HGMMA" in t for t in body):
        return None
    for t in body[products[0] :]:
        if wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0,\s*0x([0-9a-f]+)", t):
            return int(wait[1], 16)
    return 0


def faults(launch: Launch, compiled: Compiled, units: tuple[str, ...], limit: int) -> Iterator[str]:
    """What a kernel does but must not, and what it must use but does not.

    ``units`` are the GPU's matrix instructions, of which a GEMM must use the last one. ``limit`` is
    the most bytes of shared memory that one block may use.
    """
    name, counts = kernel_name(launch), compiled.instructions
    if compiled.spills:
        yield f"{compiled.spills} spills"
    if compiled.shared > limit:
        yield f"{compiled.shared} bytes of shared memory, above the limit of {limit}"
    if name in WITHOUT_DOT or _operand(launch).dtype is torch.float32:
        return
    needed = units[-1:] if name in GEMMS else units
    if not any(counts[unit] for unit in needed):
        yield f"no {' or '.join(needed)}"
    if name == "descriptor":
        yield from _loop_faults(compiled, launch.stages)


def _operand(launch: Launch) -> torch.Tensor:
    """The first argument, which in every kernel with products is the tall operand."""
    first = launch.arguments[0]
    return first if isinstance(first, torch.Tensor) else first.base  # a tensor descriptor's


def _loop_faults(compiled: Compiled, stages: int) -> Iterator[str]:
    """What keeps the loads of a GEMM with descriptors from running ahead of its products."""
    if not (compiled.instructions["UTMALDG"] and compiled.instructions["UTMASTG"]):
        yield "no TMA load or store"
    loop = compiled.loop
    if loop is None:
        yield "no loop over matrix products"
        return
    if loop.in_flight == 0:
        yield "the loop waits for its own matrix products"
    if loop.loads_ahead < 2 * (stages - 1):
        yield f"only {loop.loads_ahead} loads ahead of the loop for {stages} stages"
    if loop.round_trips:
        yield "the accumulator leaves tensor memory and returns in every step"
    if SERIALISED in compiled.warnings:
        yield f"ptxas makes the matrix products wait for one another ({SERIALISED})"
