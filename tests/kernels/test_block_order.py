"""The block's backward adds to parts of dS in global memory: who reads what was written there."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from tests.support.uninterpreted import printed

# In a process of its own: here the kernels may be interpreted.
_PRINT_IR = """
import json, sys, torch
from fastbound.dispatch.device import Device
from fastbound.performance.compilation import TARGETS, build
from fastbound.performance.recorder import block_calls
target, gated, rank = sys.argv[1], sys.argv[2] == "gated", int(sys.argv[3])
device, ranks = Device(target, TARGETS[target].multiprocessors), (rank,) * (2 + gated)
settings = {"gated": gated, "backend": "fused"}
calls = block_calls(device, 4096, 14336, 4096, ranks, torch.bfloat16, **settings)
backward = next(c for c in calls.launches if c.kernel.__name__ == "_activate_backward_kernel")
stages = build(backward, target).asm
print(json.dumps({"ttgir": stages["ttgir"], "ptx": stages.get("ptx", "")}))
"""
_ACCESS = r"tt\.{}\s+(%[\w#]+).*:\s*tensor<([\dx]+)x!tt\.ptr<f32>, (#\w+)>"
_BUFFER = r"amd\w*\.buffer_{}\s.*tensor<[\dx]+xf32, #\w+>"  # AMD, into less than 2 GiB


def stages(target: str, form: str, rank: int, repository: Path) -> dict[str, str]:
    out = printed(_PRINT_IR, target, form, str(rank), repository=repository)
    found: dict[str, str] = json.loads(out)
    return found


def owners(ir: str, layout: str, shape: str) -> float:
    """Threads that hold one element of a tensor in a blocked layout."""
    line = re.search(rf"^{layout} = #ttg\.blocked<\{{(.*)\}}>", ir, re.MULTILINE)
    assert line is not None, layout
    counts: dict[str, Any] = {
        name: [int(v) for v in values.split(",")]
        for name, values in re.findall(r"(\w+) = \[([\d, ]+)\]", line[1])
    }
    names = ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
    covered = [math.prod(sizes) for sizes in zip(*(counts[n] for n in names), strict=True)]
    lengths = [int(n) for n in shape.split("x")]
    return math.prod(max(1.0, c / n) for c, n in zip(covered, lengths, strict=True))


@pytest.mark.parametrize(
    ("target", "form", "rank"),
    [
        pytest.param("sm_80", "gated", 16, marks=pytest.mark.slow),
        pytest.param("sm_90", "gated", 16, marks=pytest.mark.slow),
        ("sm_90", "plain", 16),
    ],
)
def test_each_thread_reads_back_what_it_wrote_itself(
    target: str, form: str, rank: int, repository: Path
) -> None:
    """So at rank 16 the sum does not rest on the order of memory between threads, on NVIDIA.

    Loads of the parts and stores to them go through one pointer in one layout that gives each
    element to one thread; no load is asynchronous or through the read-only cache.
    """
    found = stages(target, form, rank, repository)
    ir = found["ttgir"]
    loads, stores = (Counter(re.findall(_ACCESS.format(k), ir)) for k in ("load", "store"))
    assert sum(loads.values()) == (2 if form == "gated" else 1)
    assert loads <= stores
    for _, shape, layout in loads:
        assert owners(ir, layout, shape) == 1
    assert not re.search(r"async_copy_global_to_local.*!tt\.ptr<f32>", ir)
    assert "ld.global.nc" not in found["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "rank"), [("sm_90", 32), ("sm_80", 32), ("gfx942", 16)])
def test_a_barrier_stands_between_blocks_of_columns(
    target: str, rank: int, repository: Path
) -> None:
    """Where a thread reads what another wrote, or waves of 64 share an element, it orders them.

    It comes after the last store to a part and before the loop goes on; and what is read behind it
    is read from memory then: not copied ahead, nor through the read-only cache.
    """
    found = stages(target, "gated", rank, repository)
    ir = found["ttgir"]
    barriers = [m.start() for m in re.finditer(r"^ *(?:ttg|gpu)\.barrier", ir, re.MULTILINE)]
    assert len(barriers) == 1
    both = f"{_ACCESS}|{_BUFFER}"
    stores = [m.start() for m in re.finditer(both.format("store", "store"), ir)]
    loads = [m.start() for m in re.finditer(both.format("load", "load"), ir)]
    assert loads
    assert max(loads) < max(stores) < barriers[0]
    copies = r"(?:async_copy_global|buffer_load)_to_local.*\bf32>"
    assert not re.search(copies, ir)
    assert "ld.global.nc" not in found["ptx"]
