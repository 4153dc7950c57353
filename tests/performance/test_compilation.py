"""What is compiled ahead is what Triton's launcher then looks for: the same sources and options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl
from fastbound.kernels.launch import Launch

from fastbound.performance.compilation import TARGETS, binary_of
from tests.support.uninterpreted import printed

KERNELS = {"factors", "thin", "pointer", "reduce", "finish", "finish_both", "keep", "adapt"}
KERNELS |= {"contract", "activate", "activate_backward"}
# In a process of its own: here the kernels may be interpreted. Nothing is compiled.
_KEYS = """
import json, sys, torch
from types import SimpleNamespace
from unittest import mock
import triton
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from fastbound.performance import compilation
from fastbound.performance.inspection import kernel_name
from fastbound.performance.recorder import block_calls, layer_calls

target = compilation.TARGETS[sys.argv[1]]
torch.version.hip = "7.0" if target.backend == "hip" else None
driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: target.in_triton,
))

def key(source, target, options):
    made = triton.compiler.make_backend(target).parse_options(dict(options))
    return [source.hash(), made.hash(), repr(target)]

def run(self, _, signature, device, constants, options, attributes, warmup):
    found.append(key(ASTSource(self, signature, constants, attributes),
                     target.in_triton, options.__dict__))  # and launches nothing

launches = []
for M in (512, 8191, 2**21):
    layer = (target.device, M, 1024, 768, 16, torch.bfloat16)
    launches += layer_calls(*layer, backend="fused", bias=True, dropout=0.1).launches
    launches += layer_calls(*layer, backend="fused", strided=True).launches
    ranks = (16,) * 3
    launches += layer_calls(*layer, form="product").launches
    launches += block_calls(*layer[:4], ranks, torch.bfloat16, backend="fused").launches
for launch in launches:
    found = []
    with mock.patch.object(JITFunction, "_do_compile", run):
        launch.run()
    with mock.patch.object(triton, "compile", lambda src, target, options: found.append(
        key(src, target, options)
    )):
        compilation.build(launch, sys.argv[1])
    ran, built = found
    binary = repr(compilation.binary_of(launch, sys.argv[1])[1:])
    print(json.dumps([kernel_name(launch), binary, ran, built]))
"""


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_is_compiled_ahead_is_what_a_launch_looks_for(target: str, repository: Path) -> None:
    lines = printed(_KEYS, target, repository=repository).splitlines()
    rows = [json.loads(line) for line in lines]
    gemm = {"descriptor"} if target == "sm_90" else set()
    assert {kernel for kernel, *_ in rows} == KERNELS | gemm
    assert [kernel for kernel, _, ran, built in rows if ran != built] == []
    # And launches share a key exactly if they share a binary.
    keys = {(kernel, binary) for kernel, binary, *_ in rows}
    binaries = {(kernel, *ran) for kernel, _, ran, _ in rows}
    pairs = {(kernel, binary, *ran) for kernel, binary, ran, _ in rows}
    assert len(keys) == len(binaries) == len(pairs)


@triton.jit(do_not_specialize=["free"])
def _kernel(x, free, size, BLOCK: tl.constexpr):
    pass


def key(target: str, x: torch.Tensor, free: int = 3, size: int = 3, block: int = 16) -> object:
    return binary_of(Launch(_kernel, (1,), (x, free, size), {"BLOCK": block}, 4, 1), target)


def test_a_binary_follows_from_what_a_kernel_specialises_on() -> None:
    x = torch.empty(64, device="meta")
    assert len({key("sm_90", x, free=n) for n in (1, 17, 32)}) == 1
    assert len({key("sm_90", x, size=n) for n in (1, 17, 19, 32, 48, 2**31)}) == 4
    assert len({key("sm_90", x, block=n) for n in (16, 32)}) == 2
    assert len({key("sm_90", x.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}) == 2
    aligned = torch.empty(64)
    assert len({key("sm_90", aligned), key("sm_90", aligned[1:]), key("sm_90", aligned[4:])}) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_amd_tells_apart_what_has_more_than_2_gib(target: str) -> None:
    small, large = (torch.empty(n, dtype=torch.uint8, device="meta") for n in (2**31 - 1, 2**31))
    different = key(target, small) != key(target, large)
    assert different == (TARGETS[target].backend == "hip")


def test_the_registers_of_a_thread_are_an_option_of_nvidias_compiler() -> None:
    limited = Launch(None, (1,), (), {}, 4, 1, registers=255)
    free = limited._replace(registers=None)
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    assert limited.options("cuda") == options | {"maxnreg": 255}
    assert free.options("cuda") == limited.options("hip") == options


def test_a_launch_gives_the_compiler_those_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    kernel = {(1,): lambda *arguments, **named: given.update(named)}
    monkeypatch.setattr(torch.version, "hip", None)
    launch = Launch(kernel, (1,), (), {"BLOCK": 16}, 8, 2, registers=168)
    launch.run()
    assert given == {"BLOCK": 16, **launch.options("cuda")}
