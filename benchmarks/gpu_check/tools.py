"""Tools that must work with the operator: torch.compile, CUDA graphs, two processes on one card.

python -m benchmarks.gpu_check.tools DEVICE RANK FILE    one of the two processes on one card
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastbound
from benchmarks.report.facts import ROOT, readings

TOGETHER_SECONDS = 150.0
TOLERANCE = 2**-6  # relative, for bf16


class Unavailable(Exception):
    """A case that cannot run here; the message says why."""


def _layer(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Linear(256, 512).to(device=device, dtype=torch.bfloat16)
    layer = fastbound.FusedBoundedLinear.from_linear(base, rank=8, bound="auto")
    with torch.no_grad():
        layer.adapter.B.normal_(std=0.1)
    return layer


def _step(call: Any, x: Tensor, layer: nn.Module) -> list[Tensor]:
    """y, and the gradients of x and of the trained parameters."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = call(x)
    return [y, *torch.autograd.grad(y, [x, *trained], torch.ones_like(y))]


def _x(device: torch.device, M: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(M, 256, generator=generator).bfloat16().to(device).requires_grad_()


@dataclass(frozen=True)
class CompileCase:
    """torch.compile without graph breaks gives the results of the eager call."""

    def __str__(self) -> str:
        return "torch.compile"

    def check(self, device: torch.device) -> None:
        layer, x = _layer(device), _x(device)
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        for name, got, expected in zip(
            ("y", "dx", "dA", "dB"), _step(compiled, x, layer), _step(layer, x, layer), strict=True
        ):
            got, truth = got.detach().double(), expected.detach().double()
            error = float((got - truth).norm() / truth.norm())
            if not error <= TOLERANCE:
                raise AssertionError(f"{name} of the compiled call is off by {error:.2e}")


@dataclass(frozen=True)
class GraphCase:
    """A step captured as a CUDA graph and replayed on new input gives the eager step's bits."""

    def __str__(self) -> str:
        return "CUDA graph"

    def check(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise Unavailable("a CUDA graph needs CUDA")
        layer, x = _layer(device), _x(device, 1024)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                _step(layer, x, layer)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _step(layer, x, layer)
        for turn in range(2):
            with torch.no_grad():
                x.mul_(0.5 + turn)
            graph.replay()
            for name, got, expected in zip(
                ("y", "dx", "dA", "dB"), captured, _step(layer, x, layer), strict=True
            ):
                if not torch.equal(got, expected):
                    raise AssertionError(f"{name} of the replayed graph differs")


@dataclass(frozen=True)
class TogetherCase:
    """Two processes under DistributedDataParallel on one device get the same gradients."""

    def __str__(self) -> str:
        return "DDP, two processes on one card"

    def check(self, device: torch.device) -> None:
        mode = readings(device).get("compute_mode", "Default")
        if mode != "Default":
            raise Unavailable(f"compute mode {mode} allows only one process on the card")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.gpu_check.tools", str(device)]
            rendezvous = str(Path(folder) / "rendezvous")
            running = [
                subprocess.Popen(
                    [*command, str(rank), rendezvous],
                    cwd=ROOT,
                    env={**os.environ, "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for rank in range(2)
            ]
            try:
                said = [process.communicate(timeout=TOGETHER_SECONDS)[0] for process in running]
            finally:
                for process in running:
                    process.kill()
        for process, text in zip(running, said, strict=True):
            if process.returncode:
                raise AssertionError(f"a process ended with {process.returncode}: {text[-1500:]}")


TOOL_CASES = (CompileCase(), GraphCase(), TogetherCase())


def main(arguments: Sequence[str]) -> int:
    """Run one process, with its own x, and check that both processes have the same gradients."""
    named, rank, rendezvous = arguments
    device = torch.device(named)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2
    )
    layer = _layer(device)
    fastbound.set_planning("fixed")  # the other process on the card would distort any timing
    fastbound.warmup(layer, 96)
    spread = nn.parallel.DistributedDataParallel(layer)
    spread(_x(device) * (1 + int(rank))).float().square().mean().backward()
    for name, parameter in layer.named_parameters():
        if parameter.grad is None:
            continue
        mine = parameter.grad.float().cpu()
        both = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        if not (torch.equal(*both) and bool(mine.isfinite().all()) and bool(mine.any())):
            raise AssertionError(f"the gradients of {name} differ, or are zero or not finite")
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
