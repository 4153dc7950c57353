"""Compile a launch for a GPU that need not be there, and read what the compiler made of it.

Registers, spills, shared memory and the instructions that matter are facts of the binary: they
prove a tile shape before a GPU runs it. Binaries are read with the disassembler that Triton ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbound.dispatch.device import Device
from fastbound.kernels.launch import Launch


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's names, and what dispatch would be told of it."""

    backend: str
    arch: int | str
    warp_size: int
    device: Device

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory for one block."""
        return self.device.shared_limit

    @property
    def multiprocessors(self) -> int:
        """Of its device."""
        return self.device.multiprocessors


def _nvidia(capability: int, multiprocessors: int) -> Target:
    return Target("cuda", capability, 32, Device(f"sm_{capability}", multiprocessors))


def _amd(architecture: str, warp_size: int, multiprocessors: int) -> Target:
    return Target("hip", architecture, warp_size, Device(architecture, multiprocessors))


# Of each architecture one card, whose size decides how rows and columns are cut.
TARGETS: Mapping[str, Target] = {
    "sm_80": _nvidia(80, 108),  # A100
    "sm_86": _nvidia(86, 82),  # GeForce RTX 3090
    "sm_89": _nvidia(89, 128),  # GeForce RTX 4090
    "sm_90": _nvidia(90, 132),  # H100 SXM, H200
    "sm_100": _nvidia(100, 148),  # B200
    "sm_120": _nvidia(120, 170),  # GeForce RTX 5090
    "gfx90a": _amd("gfx90a", 64, 104),  # one half of an MI250
    "gfx942": _amd("gfx942", 64, 304),  # MI300X
    "gfx1100": _amd("gfx1100", 32, 48),  # Radeon RX 7900 XTX, in pairs of compute units
}

# What shows in a listing when the matrix unit, the copy engine or a spill is used.
_COUNTED = {
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "UTMALDG": r"\bUTMALDG\b",
    "UTMASTG": r"\bUTMASTG\b",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
    "v_mfma": r"\bv_mfma_",
    "v_wmma": r"\bv_wmma_",
    "UTCMMA": r"\bUTC\w*MMA\b",
}


@dataclass(frozen=True)
class SteadyLoop:
    """The loop of a Hopper GEMM over its reduction, as its instructions stand.

    ``in_flight``: groups of matrix products (HGMMA) that still run where the loop waits for one;
    ``loads_ahead``: TMA loads that are on their way before the loop begins. A pipelined loop has at
    least one of the former and two for each stage but one of the latter. ``length`` counts
    instructions, the epilogue's included where the loops over tiles and steps are one.
    """

    in_flight: int
    loads_ahead: int
    length: int


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled: figures per thread (registers) and per block (shared, bytes)."""

    registers: int
    spills: int
    shared: int
    instructions: Mapping[str, int]
    loop: SteadyLoop | None = None


def compile_launch(launch: Launch, target_name: str) -> Compiled:
    """Compile a launch for one of :data:`TARGETS`.

    ``spills`` counts what goes through memory: local loads and stores (NVIDIA); vector registers
    spilled and words of scratch memory (AMD, whose spilled scalar registers stay in lanes of vector
    registers and are counted among the instructions).

    Raises KeyError for an unknown target and RuntimeError where kernels are interpreted.
    """
    binary = build(launch, target_name)
    return (_read_cubin if TARGETS[target_name].backend == "cuda" else _read_amdgcn)(binary)


def build(launch: Launch, target_name: str) -> Any:
    """Triton's own object, with every stage of the compilation in `asm`; see `compile_launch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError(
            "kernels are interpreted: unset TRITON_INTERPRET before importing fastbound"
        )
    target = TARGETS[target_name]
    signature, constants, attributes = _specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    options |= launch.limits(target.backend)
    return triton.compile(
        source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options
    )


def binary_of(launch: Launch) -> tuple[Any, ...]:
    """What decides the binary: launches that agree in it are one kernel to the compiler."""
    signature, constants, attributes = _specialise(launch)
    divisible = tuple(place for place, marks in attributes.items() if marks)
    limits = (launch.warps, launch.stages, launch.registers)
    return launch.kernel, tuple(signature.items()), tuple(constants.items()), divisible, limits


_TRITON_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _specialise(
    launch: Launch,
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes as Triton's launcher derives them from the arguments.

    A pointer or an integer divisible by 16 is marked so, and an integer 1 becomes a constant.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    arguments = dict(zip(names, launch.arguments, strict=True))
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[(i,)] = "constexpr", launch.constants[name]
            continue
        value = arguments[name]
        divisible = False
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TRITON_NAMES[value.dtype]}"
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, TensorDescriptor):
            block = list(value.block_shape)
            signature[name] = f"tensordesc<{_TRITON_NAMES[value.base.dtype]}{block}>"
            continue
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        elif value == 1:
            signature[name], constants[(i,)] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        # The empty list too, as the launcher has it: the run then finds this binary in the cache.
        attributes[(i,)] = [["tt.divisibility", 16]] if divisible else []
    return signature, constants, attributes


def _read_cubin(binary: Any) -> Compiled:
    from triton import knobs

    disassembler = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = _output(disassembler, "-res-usage", str(path))
        listing = _output(disassembler, "-sass", str(path))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no register count: {usage!r}")
    counts = _count(listing)
    spills = counts["LDL"] + counts["STL"]
    shared, loop = binary.metadata.shared, steady_loop(listing)
    return Compiled(int(registers[1]), spills, shared, counts, loop)


def steady_loop(listing: str) -> SteadyLoop | None:
    """The first loop of a SASS listing with both HGMMA and TMA loads; None where there is none."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)
    code = [(int(address, 16), text) for address, text in found]
    for end, text in code:
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        start = int(target[1], 16) if target else end
        body = [t for address, t in code if start <= address <= end]
        waits = [t for t in body if "WARPGROUP.DEPBAR" in t]
        loads, products = ("UTMALDG", "HGMMA")
        if start < end and waits and any(loads in t for t in body):
            if not any(products in t for t in body):
                continue
            left = [int(n, 16) for t in waits for n in re.findall(r"gsb0,\s*0x([0-9a-f]+)", t)]
            ahead = sum(loads in t for address, t in code if address < start)
            return SteadyLoop(left[0] if left else 0, ahead, len(body))
    return None


def _read_amdgcn(binary: Any) -> Compiled:
    listing = binary.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", listing)
        if found is None:
            raise RuntimeError(f"the amdgcn listing has no .{name}")
        return int(found[1])

    spills = field("vgpr_spill_count") + field("private_segment_fixed_size") // 4
    counts = _count(listing) | {"sgpr spills": field("sgpr_spill_count")}
    return Compiled(field("vgpr_count"), spills, binary.metadata.shared, counts)


def _count(listing: str) -> dict[str, int]:
    return {name: len(re.findall(pattern, listing)) for name, pattern in _COUNTED.items()}


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
