"""Compile a launch for a GPU that need not be present, and inspect the binary.

The binary shows registers, spills, shared memory and the instructions that matter, so a tile shape
can be checked before any GPU runs it. NVIDIA binaries are read with Triton's own disassembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastbound.dispatch.defaults import tile_family
from fastbound.dispatch.device import Device, compute_capability
from fastbound.kernels.launch import Launch
from fastbound.performance import inspection
from fastbound.performance.inspection import Compiled, count, local_traffic, steady_loop


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: its names in Triton, and the device that dispatch would see."""

    backend: str
    arch: int | str
    warp_size: int
    device: Device
    units: tuple[str, ...]  # its matrix instructions; a GEMM must use the last one

    @property
    def in_triton(self) -> Any:
        """The target as Triton names it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)

    @property
    def shared_limit(self) -> int:
        """The most bytes of shared memory that one block may use."""
        return self.device.shared_limit

    @property
    def multiprocessors(self) -> int:
        """The number of its device's multiprocessors."""
        return self.device.multiprocessors


def _nvidia(capability: int, multiprocessors: int, *units: str) -> Target:
    device = Device(f"sm_{capability}", multiprocessors)
    return Target("cuda", capability, 32, device, ("HMMA", *units))


def _amd(architecture: str, warp_size: int, multiprocessors: int, unit: str) -> Target:
    return Target("hip", architecture, warp_size, Device(architecture, multiprocessors), (unit,))


# One card per architecture; its size decides how rows and columns are cut.
TARGETS: Mapping[str, Target] = {
    "sm_80": _nvidia(80, 108),  # A100
    "sm_86": _nvidia(86, 82),  # GeForce RTX 3090
    "sm_89": _nvidia(89, 128),  # GeForce RTX 4090
    "sm_90": _nvidia(90, 132, "HGMMA"),  # H100 SXM, H200
    "sm_100": _nvidia(100, 148, "UTCMMA"),  # B200
    "sm_120": _nvidia(120, 170),  # GeForce RTX 5090
    "gfx90a": _amd("gfx90a", 64, 104, "v_mfma"),  # one half of an MI250
    "gfx942": _amd("gfx942", 64, 304, "v_mfma"),  # MI300X
    "gfx1100": _amd("gfx1100", 32, 48, "v_wmma"),  # Radeon RX 7900 XTX, in pairs of compute units
}


def target_of(where: str | Device) -> Target:
    """One of :data:`TARGETS` by name, or the target of a device, which need not be listed.

    Raises KeyError for a name that is not listed, and ValueError for a device without matrix units.
    """
    if isinstance(where, str):
        return TARGETS[where]
    if where.architecture in TARGETS:
        return replace(TARGETS[where.architecture], device=where)
    if not where.has_matrix_units:
        raise ValueError(f"{where.architecture} has no matrix units, which the kernels need")
    if capability := compute_capability(where.architecture):
        like = TARGETS["sm_100" if 100 <= capability < 120 else tile_family(where)]
        return replace(like, arch=capability, device=where)
    return replace(TARGETS[tile_family(where)], arch=where.architecture, device=where)


def faults(launch: Launch, compiled: Compiled, where: str | Device) -> tuple[str, ...]:
    """What is wrong with a launch compiled for a target; empty if nothing is. See `target_of`."""
    target = target_of(where)
    return tuple(inspection.faults(launch, compiled, target.units, target.shared_limit))


def compile_launch(launch: Launch, where: str | Device) -> Compiled:
    """Compile a launch for a target, given by name or as a device (see `target_of`).

    ``spills`` counts what goes through memory. On NVIDIA it is the number of local loads and
    stores, or 0 if nothing is loaded: Triton 3.6 also fills 8 bytes of stack on sm_120 that nothing
    reads. On AMD it is the number of spilled vector registers plus words of scratch memory; spilled
    scalar registers stay in lanes of vector registers, and are counted among the instructions.

    Raises KeyError for an unknown target, and RuntimeError if kernels are interpreted.
    """
    binary = build(launch, where)
    return (_read_cubin if target_of(where).backend == "cuda" else _read_amdgcn)(binary)


def build(launch: Launch, where: str | Device) -> Any:
    """Triton's compiled kernel, whose `asm` has every stage of it; see `compile_launch`.

    It is compiled from what Triton's launcher would compile it from, so that a run with the same
    arguments on that GPU finds the binary in Triton's cache.
    """
    import triton
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError(
            "kernels are interpreted: unset TRITON_INTERPRET before importing fastbound"
        )
    target = target_of(where)
    backend, binder = _binder(launch.kernel, target)
    given = launch.constants | launch.options(target.backend)
    bound = binder(*launch.arguments, **given)
    options, *specialised = launch.kernel._pack_args(backend, given, *bound)
    source = ASTSource(launch.kernel, *specialised)
    return triton.compile(source, target=target.in_triton, options=options.__dict__)


def binary_of(launch: Launch, where: str | Device) -> tuple[Any, ...]:
    """The key of a launch's binary on a target: launches with equal keys are compiled only once.

    A binary depends on the constants and on what Triton derives from each argument: its type,
    whether a pointer or an integer is divisible by 16, whether an integer is 1, and on AMD whether
    a tensor's storage has less than 2 GiB.
    """
    target = target_of(where)
    options = launch.options(target.backend)
    _, specialisation, _ = _binder(launch.kernel, target)[1](*launch.arguments, **launch.constants)
    return launch.kernel, tuple(specialisation), tuple(options.items())


@cache
def _binder(kernel: Any, target: Target) -> tuple[Any, Callable[..., Any]]:
    """Triton's backend for a target, and the function that derives a binary from arguments."""
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):  # the interpreter's kernels keep what `jit` was given
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(target.in_triton)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _read_cubin(binary: Any) -> Compiled:
    from triton import knobs

    disassembler = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        listing = _output(disassembler, "-res-usage", "-sass", str(path))
    registers = re.search(r"REG:(\d+)", listing)
    if registers is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no register count: {listing[:200]!r}")
    counts = count(listing)
    shared, loop = binary.metadata.shared, steady_loop(listing)
    warnings = _ptxas_warnings(binary, listing)
    return Compiled(int(registers[1]), local_traffic(counts), shared, counts, loop, warnings)


def _ptxas_warnings(binary: Any, listing: str) -> tuple[str, ...]:
    """The warnings of ptxas about a Hopper GEMM; it runs again, as Triton keeps no log of it."""
    if not ("HGMMA" in listing and "UTMALDG" in listing):
        return ()
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(binary.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", f"{path}.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return tuple(sorted(set(re.findall(r"\bC\d{4}\b", said))))


def _read_amdgcn(binary: Any) -> Compiled:
    listing = binary.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", listing)
        if found is None:
            raise RuntimeError(f"the amdgcn listing has no .{name}")
        return int(found[1])

    spills = field("vgpr_spill_count") + field("private_segment_fixed_size") // 4
    counts = count(listing) | {"sgpr spills": field("sgpr_spill_count")}
    return Compiled(field("vgpr_count"), spills, binary.metadata.shared, counts)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
