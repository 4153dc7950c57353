"""What the passes other than GEMMs cost a multiprocessor, and how well they fill the GPU.

    python -m benchmarks.static.occupancy [--target sm_90 ...] [--tokens 8192] [--rank 16]

Compiles the passes of Llama-3-8B's block and of its gate or up, for GPUs that need not be present,
and reads their innermost loops: instructions of a warp and of the special function unit per
element, programs per multiprocessor, and bytes of the tall tensors in flight. Then, for tokens and
widths of known models, it computes the programs of each pass and the share of the GPU's program
slots that are busy during the pass. Nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastbound.kernels.gated import FORWARD_REGISTERS, activation_cut, backward_cut
from fastbound.kernels.launch import Launch
from fastbound.kernels.tiles import Tile
from fastbound.kernels.waves import Cut, cut_of, resident

from benchmarks.report.rows import markdown_table
from fastbound.dispatch.defaults import Tiles, filled_tiles
from fastbound.dispatch.device import Device
from fastbound.performance.compilation import TARGETS, build, compile_launch
from fastbound.performance.prediction import BF16, RANK, kernel_name, share_busy
from fastbound.performance.recorder import block_calls, layer_calls
from fastbound.performance.shapes import block_of, linear_shapes

TOKENS = (512, 1024, 2048, 4096, 8192, 32768)
WIDTHS = (3072, 4096, 8192, 14336, 18944, 28672)
# The number of tall tensors that a step of each pass loads.
LOADED = {"gated: activate": 2, "gated: activate backward": 3, "reduce": 1, "thin": 1}
SPECIAL = {"cuda": r"\bMUFU\b", "hip": r"\bv_(exp|rcp|log|sqrt|rsq)_f32"}
BARRIER = {"cuda": r"\bBAR\.SYNC\b", "hip": r"\bs_barrier\b"}
# What one multiprocessor holds: warps on NVIDIA; on AMD, waves by their vector registers.
WARPS = {"sm_86": 48, "sm_89": 48, "sm_120": 48, "sm_121": 48}
# NVIDIA's stated cycles per second; the warp instructions a multiprocessor issues per cycle.
CLOCK = {"sm_80": 1.41e9, "sm_86": 1.695e9, "sm_89": 2.52e9, "sm_90": 1.755e9, "sm_120": 2.407e9}
ISSUED = 4
AMD_REGISTERS, AMD_SIMDS, AMD_WAVES = 512, 4, 8  # per lane; per compute unit; per SIMD


class Loop(NamedTuple):
    """A pass's innermost loop: counts per element of a tall tensor; barriers, copies per step."""

    instructions: float
    special: float
    barriers: int
    wide_copies: int  # of 16 bytes, asynchronous


class Pass(NamedTuple):
    """A compiled kernel: registers per thread, programs and bytes in flight per multiprocessor.

    ``issue_ms`` is an estimate of the least time, in milliseconds, in which all multiprocessors can
    issue the loop's instructions. It is None if the clock is not known.
    """

    target: str
    name: str
    tile: str
    registers: int
    programs: int
    in_flight: int
    loop: Loop
    issue_ms: float | None


def innermost(listing: str, backend: str) -> list[str]:
    """The instructions of the longest loop without inner loops, in SASS or AMD's assembly."""
    if backend == "cuda":
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)
        code = [(int(address, 16), text) for address, text in found]
        jumps = [(re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text), at) for at, text in code]
        spans = [(int(m[1], 16), at) for m, at in jumps if m and int(m[1], 16) < at]
    else:
        lines = [line.split(";")[0].strip() for line in listing.splitlines()]
        labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
        code = [(at, t) for at, t in enumerate(lines) if re.match(r"(s|v|ds|buffer|global)_", t)]
        jumps = [(re.match(r"s_c?branch\w*\s+(\S+)", text), at) for at, text in code]
        spans = [(labels[m[1]], at) for m, at in jumps if m and labels.get(m[1], at) < at]
    inner = [
        (start, end)
        for start, end in spans
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in spans)
    ]
    bodies = [[text for at, text in code if start <= at <= end] for start, end in inner]
    return max(bodies, key=len, default=[])


def listing_of(binary: Any, backend: str) -> str:
    """The disassembled machine code of a compiled kernel."""
    if backend == "hip":
        return str(binary.asm["amdgcn"])
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = (knobs.nvidia.cuobjdump.path, "-sass", str(path))
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def programs_of(target: str, registers: int, shared: int, warps: int) -> int:
    """The number of programs of a kernel that one multiprocessor can hold at once."""
    where = TARGETS[target]
    if where.backend == "hip":
        waves = min(AMD_WAVES, AMD_REGISTERS // (8 * -(-registers // 8)))
        by_registers = AMD_SIMDS * waves // warps
        return min(by_registers, where.shared_limit // max(1, shared))
    by_registers = 65_536 // (32 * 8 * -(-registers // 8) * warps)
    # The driver takes 1 KiB per block; a multiprocessor has 1 KiB more than a block may request.
    by_memory = (where.shared_limit + 1024) // (shared + 1024)
    return min(by_registers, by_memory, WARPS.get(target, 64) // warps)


def passes_of(target: str, M: int, rank: int) -> list[Launch]:
    """The first launch of each of :data:`LOADED` in bf16, the block's before a layer's."""
    device, block = Device(target, TARGETS[target].multiprocessors), block_of("llama-3-8b")
    settings: dict[str, Any] = {"backend": "fused"}
    sizes, shape = (M, block.N, block.K), linear_shapes("llama-3-8b")[0]
    made = [
        block_calls(device, *sizes, (rank,) * 3, torch.bfloat16, **settings),
        layer_calls(device, M, shape.N, shape.K, rank, torch.bfloat16, **settings),
    ]
    found = {
        kernel_name(launch): launch
        for calls in made
        for launch in reversed(calls.launches)
        if kernel_name(launch) in LOADED
    }
    return [found[name] for name in LOADED]


def measured(launch: Launch, target: str) -> Pass:
    """A pass as compiled."""
    where, constants, name = TARGETS[target], launch.constants, kernel_name(launch)
    compiled = compile_launch(launch, target)
    body = innermost(listing_of(build(launch, target), where.backend), where.backend)
    columns = constants.get("BLOCK_N", constants.get("BLOCK_K"))
    elements = constants["BLOCK_M"] * columns

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for text in body)

    special = count(SPECIAL[where.backend]) * launch.warps * where.warp_size / elements
    copies = count(r"\bLDGSTS\b.*\b128\b")
    loop = Loop(len(body) * launch.warps / elements, special, count(BARRIER[where.backend]), copies)
    programs = programs_of(target, compiled.registers, compiled.shared, launch.warps)
    ahead = launch.stages - 1 if copies and launch.stages > 1 else 1
    in_flight = programs * ahead * LOADED[name] * elements * BF16
    tile = f"{constants['BLOCK_M']}x{columns}, {launch.warps} warps, {launch.stages} stages"
    clock, total = CLOCK.get(target), loop.instructions * _elements(launch)
    issue = None if clock is None else 1e3 * total / (ISSUED * clock * where.multiprocessors)
    return Pass(target, name, tile, compiled.registers, programs, in_flight, loop, issue)


def _elements(launch: Launch) -> int:
    """The number of elements of the tall tensor that a pass reads first."""
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    tall: torch.Tensor = given["G" if "DG" in given or "H" in given else "T"]
    return tall.numel()


def passes_table(passes: Sequence[Pass]) -> str:
    lines = [
        [
            one.target,
            one.name,
            one.tile,
            str(one.registers),
            str(one.programs),
            f"{one.in_flight / 1024:.0f}",
            f"{one.loop.instructions:.2f}",
            f"{one.loop.special:.2f}",
            str(one.loop.barriers),
            str(one.loop.wide_copies),
            "" if one.issue_ms is None else f"{one.issue_ms:.3f}",
        ]
        for one in passes
    ]
    head = ["target", "pass", "tile", "registers", "programs", "KiB in flight"]
    head += ["instructions", "special", "barriers", "wide copies", "est. issue ms"]
    return markdown_table(head, lines)


def _cuts(M: int, N: int, tiles: Tiles, multiprocessors: int) -> dict[str, tuple[Cut, Tile, int]]:
    """For each pass with a cut, over M x N: the cut, the tile and the programs that run at once."""
    forward, backward, reduce = tiles.activate, tiles.gated, tiles.reduce
    slots = {
        name: resident(tile.warps, registers) * multiprocessors
        for name, tile, registers in (
            ("activate", forward, FORWARD_REGISTERS),
            ("activate backward", backward, 256),
            ("reduce", reduce, 256),
        )
    }
    # The forward is cut with rows and columns exchanged.
    turned = Tile(forward.block_n, forward.block_m, forward.warps, forward.stages)
    made = {
        "activate": (activation_cut(M, N, forward, multiprocessors), turned),
        "activate backward": (backward_cut(M, N, 2 * RANK, backward, multiprocessors), backward),
        "reduce": (cut_of(M, N, reduce, slots["reduce"]), reduce),
    }
    return {name: (cut, tile, slots[name]) for name, (cut, tile) in made.items()}


def waves_table(target: str, name: str) -> str:
    """One pass's programs, waves and share of busy slots, at every M and N."""
    device, lines = Device(target, TARGETS[target].multiprocessors), []
    for M in TOKENS:
        cells = []
        for N in WIDTHS:
            tiles = filled_tiles(device, M, (N, N), 2 * RANK, torch.bfloat16)
            if name == "reduce":
                tiles = filled_tiles(device, M, (N, N), RANK, torch.bfloat16)
            cut, tile, slots = _cuts(M, N, tiles, device.multiprocessors)[name]
            size = (N, M) if name == "activate" else (M, N)
            busy = share_busy(cut, *size, tile, slots)
            cells.append(f"{cut.programs}, {cut.programs / slots:.2f}, {busy:.2f}")
        lines.append([str(M), *cells])
    return markdown_table(["M", *(f"N={N}" for N in WIDTHS)], lines)


PASSES: Mapping[str, Callable[[str], str]] = {
    name: partial(waves_table, name=name) for name in ("activate", "activate backward", "reduce")
}


def document(targets: Sequence[str], M: int, rank: int) -> str:
    """Everything that the command prints."""
    launches = [(launch, target) for target in targets for launch in passes_of(target, M, rank)]
    found = [measured(launch, target) for launch, target in launches]
    sections = [
        f"Llama-3-8B, {M} tokens, bf16, r={rank}: registers per thread; programs and KiB in flight "
        "per multiprocessor; instructions of a warp and of its special function unit (MUFU; on "
        "AMD v_exp, v_rcp and the like) per element of a tall tensor; barriers and asynchronous "
        "copies of 16 bytes per step; and an estimate of the time to issue all instructions, at "
        f"{ISSUED} per cycle and multiprocessor.",
        passes_table(found),
    ]
    for target in targets:
        for name, table in PASSES.items():
            sections += [
                f"{name} on {target}, {TARGETS[target].multiprocessors} multiprocessors: programs, "
                "waves, share of program slots that are busy:",
                table(target),
            ]
    return "\n\n".join(sections)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.occupancy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, choices=(16, 32), default=RANK)
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        parser.error(f"--tokens must be >= 1, got {options.tokens}")
    print(document(options.target, options.tokens, options.rank))
    return 0


if __name__ == "__main__":
    # Interpreted kernels cannot be compiled, and triton reads the variable when it is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
