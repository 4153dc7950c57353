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
from typing import TYPE_CHECKING, Any

import torch

from fastbound.dispatch.defaults import padded_rank
from fastbound.dispatch.device import SHARED_LIMIT, Device
from fastbound.dispatch.plan import PlanKey, plan

if TYPE_CHECKING:
    from fastbound.kernels.launch import Launch


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's names, shared memory for one block (bytes), and its size."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    multiprocessors: int


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, SHARED_LIMIT["sm_80"], 108),
    "sm_90": Target("cuda", 90, 32, SHARED_LIMIT["sm_90"], 132),
    "gfx942": Target("hip", "gfx942", 64, SHARED_LIMIT["gfx942"], 304),
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
}


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled: figures per thread (registers) and per block (shared, bytes)."""

    registers: int
    spills: int
    shared: int
    instructions: Mapping[str, int]


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


def layer_launches(
    target_name: str,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
    keep: torch.Tensor | None = None,
) -> dict[str, Launch]:
    """Every launch of one layer's forward and backward, as the default plan of the target makes it.

    ``keep`` are dropout's bits for its x. Tensors are on the meta device: shapes, strides and
    dtypes are all a compilation sees.
    """
    from fastbound.kernels.factors import launch_factors
    from fastbound.kernels.launch import blocks
    from fastbound.kernels.lowrank_gemm import launch_lowrank_gemm
    from fastbound.kernels.reduce import (
        launch_finish,
        launch_finish_both,
        launch_reduce,
        row_chunks,
    )
    from fastbound.kernels.thin import launch_thin, step_chunks, thin_parts

    device = Device(target_name, TARGETS[target_name].multiprocessors)
    chosen = plan(PlanKey(device, M, N, K, rank, dtype, "fused"))
    tiles, size = chosen.tiles, chosen.multiprocessors
    if tiles is None:
        raise ValueError(f"nothing to compile: {chosen.reason}")

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    fp32 = torch.float32
    R = padded_rank(rank)
    x, y, weight, bias = meta(M, K), meta(M, N), meta(N, K), meta(N)
    A, B = meta(rank, K, dtype=fp32), meta(N, rank, dtype=fp32)
    SA, SB, S = meta(R, K), meta(N, R), meta(M, R)
    chunks_y, chunk_y = row_chunks(M, N, tiles.reduce, size)
    chunks_x, chunk_x = row_chunks(M, K, tiles.reduce, size)
    chunks_S, chunk_S = step_chunks(M, K, tiles.thin, size)
    P = meta(blocks(N, tiles.reduce.block_n), M, R, dtype=fp32)
    QB, QA = meta(chunks_y, N, R, dtype=fp32), meta(chunks_x, K, R, dtype=fp32)
    return {
        "factors": launch_factors(A, B, SA, SB, 1.0, 1.0),
        "thin": launch_thin(x, SA.t(), thin_parts(S, chunks_S), chunk_S, tiles.thin, keep),
        "gemm forward": launch_lowrank_gemm(x, weight, S, SB, bias, y, tiles.gemm, size),
        "gemm dx": launch_lowrank_gemm(y, weight.t(), S, SA.t(), None, x, tiles.gemm_t, size, keep),
        "reduce dy": launch_reduce(y, SB, S, P, QB, chunk_y, tiles.reduce),
        "reduce x": launch_reduce(x, None, S, None, QA, chunk_x, tiles.reduce, keep),
        "finish dS, dB": launch_finish_both(P, S, QB, B, B, 1.0, 1.0),
        "finish dA": launch_finish(QA, A.t(), A.t(), 1.0, 1.0),
    }


def dropout_launches(
    target_name: str, M: int, N: int, K: int, rank: int, dtype: torch.dtype
) -> dict[str, Launch]:
    """What a layer with adapter dropout launches in the place of its kernels without."""
    from fastbound.kernels.dropout import launch_keep_bits
    from fastbound.kernels.launch import blocks
    from fastbound.operator.dropout import ROUNDS

    seed = torch.empty(1, dtype=torch.int64, device="meta")
    keep = torch.empty(M, blocks(K, 32), dtype=torch.int32, device="meta")
    layer = layer_launches(target_name, M, N, K, rank, dtype, keep)
    masked = {f"{name} dropout": layer[name] for name in ("thin", "gemm dx", "reduce x")}
    return {"keep bits": launch_keep_bits(seed, keep, 1 << 12, ROUNDS), **masked}


def block_launches(
    target_name: str,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
    activation: str = "silu",
    gated: bool = True,
) -> dict[str, Launch]:
    """What a whole MLP block launches beyond its layers' kernels, all projections adapted."""
    from fastbound.kernels.lowrank_gemm import launch_lowrank_gemm
    from fastbound.kernels.reduce import launch_finish, launch_reduce, row_chunks
    from fastbound.kernels.thin import launch_thin, step_chunks, thin_parts
    from fastbound.performance.block_passes import activate, activate_backward, make_block_operands
    from fastbound.performance.passes import default_candidate
    from fastbound.performance.shapes import Block

    block = Block("any", K, N, activation, gated, bias=False)
    R = padded_rank(rank)
    device = Device(target_name, TARGETS[target_name].multiprocessors)
    chosen = plan(PlanKey(device, M, N, K, 2 * R, dtype, "fused"))
    tiles, size = chosen.tiles, chosen.multiprocessors
    if tiles is None:
        raise ValueError(f"nothing to compile: {chosen.reason}")

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    o = make_block_operands(block, M, rank, dtype, torch.device("meta"), size)
    forward = activate(o, default_candidate("activate", tiles))
    backward = activate_backward(o, default_candidate("activate backward", tiles))
    width = o.S.shape[1]
    x, weight, SA = meta(M, K), meta(N, K), meta(width, K)
    chunks_x, chunk_x = row_chunks(M, K, tiles.reduce, size)
    chunks_S, chunk_S = step_chunks(M, K, tiles.thin, size)
    QX, A = meta(chunks_x, K, width, dtype=torch.float32), meta(rank, K, dtype=torch.float32).t()
    return {
        "block thin": launch_thin(x, SA.t(), thin_parts(o.S, chunks_S), chunk_S, tiles.thin),
        "block gemm dx": launch_lowrank_gemm(
            o.DG, weight.t(), o.S, SA.t(), None, x, tiles.gemm_t, size
        ),
        "activate": forward[0].launch,
        "activate backward": backward[0].launch,
        "block reduce x": launch_reduce(x, None, o.S, None, QX, chunk_x, tiles.reduce),
        "block finish dS": backward[1].launch,
        "block finish dA": launch_finish(QX[:, :, :R], A, A, 1.0, 1.0),
    }


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
    return Compiled(
        int(registers[1]), counts["LDL"] + counts["STL"], binary.metadata.shared, counts
    )


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
