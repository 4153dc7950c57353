"""Who takes part: the operator and everything it has to beat. One entry of COMPETITORS each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import fastbound
from fastbound.dispatch.plan import plan_for, plan_key
from fastbound.performance.passes import linear_truth
from fastbound.performance.profiling import baselines
from fastbound.truth import formula


@dataclass(frozen=True)
class Problem:
    """The operands every competitor of a case shares; `A` and `B` are fp32."""

    M: int
    weight: Tensor  # [N, K]
    A: Tensor  # [r, K]
    B: Tensor  # [N, r]
    scaling: float
    omega: float

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """What nobody trains."""
        return (self.weight,)

    def truths(self, x: Tensor, dy: Tensor, rows: int) -> dict[bool, dict[str, Tensor]]:
        """fp64 y, dx (first `rows`) and dA, dB (all rows), with the adapter and without it."""
        weight = self.weight.double()
        return {
            False: {"y": x.detach()[:rows].double() @ weight.T, "dx": dy[:rows].double() @ weight},
            True: linear_truth(x, dy, self.weight, self.A, self.B, self.scaling, self.omega, rows),
        }


class Layer(NamedTuple):
    """One competitor on one problem: x to y, the tensors it trains, and the path it took.

    `trained` in the order of the problem's truths, or empty: no adapter.
    """

    forward: Callable[[Tensor], Tensor]
    trained: tuple[Tensor, ...]
    path: str


@dataclass(frozen=True)
class Competitor:
    """`build` makes the layer; `obstacle` says why it cannot take part, or None."""

    name: str
    build: Callable[[Any], Layer]
    obstacle: Callable[[str, torch.dtype], str | None] = lambda device, dtype: None


def frozen(problem: Problem) -> Layer:
    """The floor: the bare GEMM, and dy W for dx. No adapter."""
    return Layer(lambda x: F.linear(x, problem.weight), (), "F.linear")


def operator(backend: str) -> Callable[[Problem], Layer]:
    """`fastbound.bounded_linear` by one backend; on a CPU whatever "auto" takes."""

    def build(problem: Problem) -> Layer:
        weight, (N, K) = problem.weight, problem.weight.shape
        chosen = backend if weight.is_cuda else "auto"
        A, B = trainable(problem)
        key = plan_key(weight.device, problem.M, N, K, A.shape[0], weight.dtype, chosen)
        path = plan_for(key).strategy

        def forward(x: Tensor) -> Tensor:
            return fastbound.bounded_linear(
                x,
                weight,
                A,
                B,
                scaling=problem.scaling,
                omega=problem.omega,
                backend=chosen,
            )

        return Layer(forward, (A, B), path)

    return build


def needs_gpu(device_type: str, dtype: torch.dtype) -> str | None:
    """`split` on a CPU would be `fused` measured twice: both are the torch path."""
    if device_type != "cpu":
        return None
    auto = plan_for(plan_key(torch.device(device_type), 1024, 1024, 1024, 16, dtype))
    return f"on a CPU `fused` is the {auto.strategy} path already"


class _CublasThenAddmm(torch.autograd.Function):
    """The usual way around a low-rank [M, N] tensor: the large GEMM, then `addmm_` onto it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, omega: float
    ) -> Tensor:
        sin_A = torch.sin(omega * A).to(x.dtype)
        sin_B = torch.sin(omega * B).to(x.dtype)
        S = x @ sin_A.T
        y = F.linear(x, weight)
        y.addmm_(S, sin_B.T, alpha=scaling)
        ctx.save_for_backward(x, S, weight, A, B)
        ctx.scaling, ctx.omega = scaling, omega
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, S, weight, A, B = ctx.saved_tensors
        scaling, omega = ctx.scaling, ctx.omega
        sin_A = torch.sin(omega * A).to(x.dtype)
        sin_B = torch.sin(omega * B).mul_(scaling).to(x.dtype)
        dS = dy @ sin_B
        dx = dy @ weight
        dx.addmm_(dS, sin_A)
        dA = torch.cos(omega * A).mul_(omega).mul_(dS.T @ x)
        dB = torch.cos(omega * B).mul_(scaling * omega).mul_(dy.T @ S)
        return dx, None, dA, dB, None, None


def addmm(problem: Problem) -> Layer:
    """cuBLAS (or the CPU's BLAS) for the large GEMM, then `addmm_`."""
    A, B = trainable(problem)

    def forward(x: Tensor) -> Tensor:
        y = _CublasThenAddmm.apply(x, problem.weight, A, B, problem.scaling, problem.omega)
        return cast(Tensor, y)

    return Layer(forward, (A, B), "F.linear, addmm_")


def peft(adapter_dtype: torch.dtype) -> Callable[[Problem], Layer]:
    """PEFT's own layer with the sine in a LoraVariant."""

    def build(problem: Problem) -> Layer:
        N, K = problem.weight.shape
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(problem.weight, requires_grad=False)
        layer: Any = baselines.peft_linear(
            linear,
            problem.A,
            problem.B,
            scaling=problem.scaling,
            omega=problem.omega,
            adapter_dtype=adapter_dtype,
        )
        factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        return Layer(layer, factors, f"PEFT, {adapter_dtype} adapters")

    return build


def bf16_only(device_type: str, dtype: torch.dtype) -> str | None:
    """bf16 adapters on an fp32 base are nobody's choice."""
    return None if dtype is torch.bfloat16 else f"the base is {dtype}"


def compiled(problem: Problem) -> Layer:
    """`torch.compile` of the plain formula."""
    torch.compiler.reset()  # one case must not recompile, or go dynamic, on account of another
    compiled = torch.compile(formula.bounded_linear, fullgraph=True, dynamic=False)
    A, B = trainable(problem)

    def forward(x: Tensor) -> Tensor:
        return compiled(x, problem.weight, A, B, scaling=problem.scaling, omega=problem.omega)

    return Layer(forward, (A, B), "torch.compile of fastbound.truth.formula")


@cache
def no_compiler(device_type: str, dtype: torch.dtype) -> str | None:
    """Why torch.compile does not work here, found by compiling one small function."""
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.zeros(8, device=device_type, dtype=dtype))
    except Exception as error:
        return f"torch.compile does not work here: {str(error).splitlines()[0]}"
    return None


COMPETITORS = (
    Competitor("frozen", frozen),
    Competitor("fused", operator("fused")),
    Competitor("split", operator("split"), needs_gpu),
    Competitor("addmm", addmm),
    Competitor("peft_fp32", peft(torch.float32)),
    Competitor("peft_bf16", peft(torch.bfloat16), bf16_only),
    Competitor("compiled", compiled, no_compiler),
)


def trainable(problem: Problem) -> tuple[Tensor, Tensor]:
    """Leaves A and B of a competitor's own."""
    return problem.A.clone().requires_grad_(), problem.B.clone().requires_grad_()


def make_problem(
    M: int, K: int, N: int, rank: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Random operands: y of unit variance, adapter output about as large as the frozen one's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale)

    weight = normal(N, K, scale=1 / math.sqrt(K)).to(device, dtype)
    A = normal(rank, K, scale=0.5).to(device)
    B = normal(N, rank, scale=0.5).to(device)
    return Problem(M, weight, A, B, scaling=1 / math.sqrt(rank * K), omega=1.5)
