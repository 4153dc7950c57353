"""Who takes part in the MLP block, all on one formula: down(f(gate(x)) * up(x)), or down(f(up(x))).

`per_layer` and both PEFT forms differ from `frozen` in their projections only. The activation is
PyTorch's one fused operation for all of them; some models write it out in several, which is slower
and saves more (NOTES.md has both).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.cases import Block
from benchmarks.rivals.layer import Competitor, Layer, bf16_only, no_compiler
from fastbound import bounded_linear
from fastbound.dispatch.entries import block_form
from fastbound.dispatch.plan import plan_for
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.block_ops import block_key
from fastbound.performance.profiling import baselines
from fastbound.truth import formula
from fastbound.truth.formula import Projection, apply_activation

TRUTH_ROWS = 1024  # taken at a time in fp64: the truth of 32k tokens must not fill the card

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockProblem:
    """The operands every competitor of a block shares; the factors are fp32.

    `projections` holds "gate" (if there is one), "up" and "down", in this order.
    """

    M: int
    activation: str
    projections: dict[str, Projection]

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """What nobody trains: weights and biases."""
        return tuple(
            t for p in self.projections.values() for t in (p.weight, p.bias) if t is not None
        )

    @property
    def factors(self) -> dict[str, Tensor]:
        """A and B of every projection."""
        return {
            f"{name} {letter}": factor
            for name, p in self.projections.items()
            for letter, factor in (("A", p.A), ("B", p.B))
            if factor is not None
        }

    def trainable(self) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """The projections with factors of a competitor's own, and these, in order."""
        own = {name: t.clone().requires_grad_() for name, t in self.factors.items()}
        return self._with(own), tuple(own.values())

    def _with(self, factors: dict[str, Tensor]) -> dict[str, Any]:
        return {
            name: p._replace(A=factors.get(f"{name} A"), B=factors.get(f"{name} B"))
            for name, p in self.projections.items()
        }

    def truths(self, x: Tensor, dy: Tensor, rows: int) -> dict[bool, dict[str, Tensor]]:
        """fp64 y, dx (first `rows`) and the factors' gradients (all), adapted and not."""
        return {adapted: self._truth(x, dy, rows, adapted) for adapted in (False, True)}

    def _truth(self, x: Tensor, dy: Tensor, rows: int, adapted: bool) -> dict[str, Tensor]:
        factors = {n: t.double().requires_grad_() for n, t in self.factors.items()}
        wide = {
            name: p._replace(
                weight=p.weight.double(), bias=None if p.bias is None else p.bias.double()
            )
            for name, p in self._with(factors if adapted else {}).items()
        }
        # The rows beyond the checked ones matter to the factors' gradients alone.
        last = x.shape[0] if adapted else rows
        sums: dict[str, Tensor] = {}
        outputs, gradients = [], []
        for start in range(0, last, TRUTH_ROWS):
            part = x[start : start + TRUTH_ROWS].detach().double().requires_grad_()
            y = formula.bounded_mlp(part, **wide, activation=self.activation)
            wanted = (part, *factors.values()) if adapted else (part,)
            dx, *found = torch.autograd.grad(y, wanted, dy[start : start + TRUTH_ROWS].double())
            for name, gradient in zip(factors, found, strict=False):
                sums[f"d{name}"] = sums.get(f"d{name}", 0) + gradient
            if start < rows:
                outputs.append(y.detach())
                gradients.append(dx)
        return {"y": torch.cat(outputs)[:rows], "dx": torch.cat(gradients)[:rows], **sums}


def plain_block(activation: str, projections: dict[str, Linear]) -> Linear:
    """The block around projections that may be any callable."""
    up, down = projections["up"], projections["down"]
    gate = projections.get("gate")

    def forward(x: Tensor) -> Tensor:
        if gate is None:
            return down(apply_activation(up(x), activation))
        return down(apply_activation(gate(x), activation) * up(x))

    return forward


def frozen(problem: BlockProblem) -> Layer:
    """The floor: the bare block, and the gradient of x. No adapter."""
    layers: dict[str, Linear] = {
        name: partial(F.linear, weight=p.weight, bias=p.bias)
        for name, p in problem.projections.items()
    }
    return Layer(plain_block(problem.activation, layers), (), "F.linear")


def fused(
    backend: str | None = None, recompute: str | None = None
) -> Callable[[BlockProblem], Layer]:
    """`bounded_mlp` by one backend: by default the fused one, and on a CPU what "auto" takes."""

    def build(problem: BlockProblem) -> Layer:
        projections, trained = problem.trainable()
        weight = projections["up"].weight
        chosen = backend or ("fused" if weight.is_cuda else "auto")
        N, K = weight.shape
        ranks = tuple(p.A.shape[0] for p in projections.values() if p.A is not None)
        form = block_form(problem.activation, "gate" in projections)
        key = block_key(weight.device, problem.M, N, K, ranks, weight.dtype, chosen, form)
        plan = plan_for(key)
        forward = partial(
            bounded_mlp,
            **projections,
            activation=problem.activation,
            recompute=recompute,
            backend=chosen,
        )
        return Layer(forward, trained, plan.strategy)

    return build


def per_layer(backend: str | None = None) -> Callable[[BlockProblem], Layer]:
    """One `bounded_linear` for each projection, PyTorch's activation between them."""

    def build(problem: BlockProblem) -> Layer:
        projections, trained = problem.trainable()
        chosen = backend or ("fused" if projections["up"].weight.is_cuda else "auto")
        layers: dict[str, Linear] = {
            name: partial(bounded_linear, **p._asdict(), backend=chosen)
            for name, p in projections.items()
        }
        return Layer(plain_block(problem.activation, layers), trained, f"bounded_linear, {chosen}")

    return build


def peft(adapter_dtype: torch.dtype) -> Callable[[BlockProblem], Layer]:
    """PEFT's own layers with the sine in a LoraVariant."""

    def build(problem: BlockProblem) -> Layer:
        layers: dict[str, Any] = {
            name: peft_projection(p, adapter_dtype) for name, p in problem.projections.items()
        }
        trained = tuple(
            factors["default"].weight
            for layer in layers.values()
            for factors in (layer.lora_A, layer.lora_B)
        )
        forward = plain_block(problem.activation, layers)
        return Layer(forward, trained, f"PEFT, {adapter_dtype} adapters")

    return build


def peft_projection(p: Projection, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's layer around a linear layer that shares the projection's weight and bias."""
    if p.A is None or p.B is None:
        raise ValueError("PEFT's layer needs A and B")
    N, K = p.weight.shape
    linear = nn.Linear(K, N, bias=p.bias is not None, device="meta")
    linear.weight = nn.Parameter(p.weight, requires_grad=False)
    if p.bias is not None:
        linear.bias = nn.Parameter(p.bias, requires_grad=False)
    return baselines.peft_linear(
        linear, p.A, p.B, scaling=p.scaling, omega=p.omega, adapter_dtype=adapter_dtype
    )


def compiled(problem: BlockProblem) -> Layer:
    """`torch.compile` of the plain formula."""
    torch.compiler.reset()  # one case must not recompile, or go dynamic, on account of another
    compiled = torch.compile(formula.bounded_mlp, fullgraph=True, dynamic=False)
    projections, trained = problem.trainable()
    forward = partial(compiled, **projections, activation=problem.activation)
    return Layer(forward, trained, "torch.compile of fastbound.truth.formula")


MLP_COMPETITORS = (
    Competitor("frozen", frozen),
    Competitor("fused", fused()),
    Competitor("per_layer", per_layer()),
    Competitor("peft_fp32", peft(torch.float32)),
    Competitor("peft_bf16", peft(torch.bfloat16), bf16_only),
    Competitor("compiled", compiled, no_compiler),
)


def make_block_problem(
    block: Block, M: int, rank: int, dtype: torch.dtype, device: torch.device
) -> BlockProblem:
    """Random operands: each adapter's output about as large as its frozen projection's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).to(device)

    def projection(N: int, K: int) -> Projection:
        return Projection(
            normal(N, K, scale=1 / math.sqrt(K)).to(dtype),
            normal(N, scale=0.1).to(dtype) if block.bias else None,
            normal(rank, K, scale=0.5),
            normal(N, rank, scale=0.5),
            1 / math.sqrt(rank * K),
            1.5,
        )

    sizes = {"gate": (block.N, block.K), "up": (block.N, block.K), "down": (block.K, block.N)}
    if not block.gated:
        del sizes["gate"]
    return BlockProblem(
        M, block.activation, {name: projection(*size) for name, size in sizes.items()}
    )
