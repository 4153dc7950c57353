"""The competitors: the operator and everything it has to beat, as a layer and as an MLP block.

All of them compute the same formula: that of a layer, or of a block down(f(gate(x)) * up(x)) or
down(f(up(x))). Most differ only in the module that takes the place of a projection (`each`). In all
of them a block's activation is a single fused PyTorch operation; some models use several, which is
slower and saves more (NOTES.md has both).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastbound import bounded_linear
from fastbound.dispatch.entries import block_form
from fastbound.dispatch.plan import plan_for, plan_key
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.block_ops import block_key
from fastbound.operator.engine import route_for
from fastbound.performance.profiling import baselines
from fastbound.truth import formula
from fastbound.truth.formula import Projection
from fastbound.truth.operands import BlockOperands, Operands

Linear = Callable[[Tensor], Tensor]


class Contender(NamedTuple):
    """One competitor on one case: its function from x to y, what it trains, and the path it took.

    `trained` has the order of the operands' `trained`, and is empty without an adapter. `form` is
    the form of the adapter that it computes, whatever the case's form, or None without an adapter.
    `path` is asked after the first calls, which may choose it.
    """

    forward: Linear
    trained: tuple[Tensor, ...]
    path: Callable[[], str]
    form: str | None = "factors"


Build = Callable[[Operands], Contender]


@dataclass(frozen=True)
class Competitor:
    """`build` makes the contender; `obstacle` returns why it cannot take part, or None."""

    name: str
    build: Build
    obstacle: Callable[[str, torch.dtype], str | None] = lambda device, dtype: None


def each(
    make: Callable[[Projection], tuple[Linear, tuple[Tensor, ...]]],
    path: str,
    form: str | None = "factors",
) -> Build:
    """Build a contender from `make`, which returns a projection's callable and what it trains."""

    def build(o: Operands) -> Contender:
        made = {name: make(p) for name, p in o.leaves().projections.items()}
        trained = tuple(t for _, own in made.values() for t in own)
        return Contender(
            o.around({name: layer for name, (layer, _) in made.items()}),
            trained,
            lambda: path,
            form,
        )

    return build


def _frozen(p: Projection) -> tuple[Linear, tuple[Tensor, ...]]:
    return partial(F.linear, weight=p.weight, bias=p.bias), ()


def operator(
    backend: str = "fused", *, forced: bool = False, recompute: str | None = None
) -> Build:
    """`bounded_linear` or `bounded_mlp` by a backend; on a CPU by "torch", unless `forced`."""

    def build(o: Operands) -> Contender:
        own = o.leaves()
        chosen = backend if forced or o.x.is_cuda else "torch"
        forward: Linear
        if isinstance(own, BlockOperands):
            settings: dict[str, Any] = {"recompute": recompute, "backend": chosen}
            forward = partial(bounded_mlp, **own.arguments, **settings)
        else:
            forward = partial(bounded_linear, **own.arguments, backend=chosen)
        first, *_ = own.projections.values()
        trained = tuple(own.trained.values())
        whole = isinstance(own, BlockOperands) and recompute is None
        return Contender(forward, trained, partial(_strategies, o, chosen, whole), first.form)

    return build


def _strategies(o: Operands, backend: str, whole: bool) -> str:
    """The strategies of the routes that calls of this process take.

    Args:
        whole: whether `o` is a block that may run layer by layer.
    """
    first, *_ = o.projections.values()
    N, K = first.weight.shape
    sizes = (o.x.device, o.x.shape[0], N, K)
    ranks = [p.A.shape[0] for p in o.projections.values() if p.A is not None]

    def strategy(part: str) -> str:
        how = (o.x.dtype, backend)
        if isinstance(o, BlockOperands):
            form = block_form(o.activation, o.gate is not None)
            return route_for(*block_key(*sizes, ranks, *how, form, part=part)).plan.strategy
        product = first.form == "product"
        return route_for(
            *plan_key(*sizes, ranks[0], *how, part=part, product=product)
        ).plan.strategy

    if whole and strategy("whole") == "layers":
        return "layer by layer"
    forward, backward = strategy("forward"), strategy("backward")
    return forward if forward == backward else f"forward {forward}, backward {backward}"


def per_layer(backend: str = "fused", *, forced: bool = False) -> Build:
    """One `bounded_linear` per projection, with PyTorch's activation between them."""

    def build(o: Operands) -> Contender:
        chosen = backend if forced or o.x.is_cuda else "torch"

        def make(p: Projection) -> tuple[Linear, tuple[Tensor, ...]]:
            return partial(bounded_linear, **p._asdict(), backend=chosen), _factors(p)

        return each(make, f"bounded_linear, {chosen}")(o)

    return build


def _factors(p: Projection) -> tuple[Tensor, Tensor]:
    if p.A is None or p.B is None:
        raise ValueError("every projection of a competitor needs an adapter, but this has none")
    return p.A, p.B


def needs_gpu(device_type: str, dtype: torch.dtype) -> str | None:
    """On a CPU the competitor would only repeat `fused`: both take the torch path."""
    if device_type != "cpu":
        return None
    auto = plan_for(plan_key(torch.device(device_type), 1024, 1024, 1024, 16, dtype))
    return f"on a CPU `fused` already takes the {auto.strategy} path"


class _CublasThenAddmm(torch.autograd.Function):
    """The usual way to avoid a low-rank [M, N] tensor: the large GEMM, then `addmm_` onto it."""

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


def _addmm(p: Projection) -> tuple[Linear, tuple[Tensor, ...]]:
    """cuBLAS (or the CPU's BLAS) for the large GEMM, then `addmm_`; it does not support a bias."""
    A, B = _factors(p)

    def forward(x: Tensor) -> Tensor:
        return cast(Tensor, _CublasThenAddmm.apply(x, p.weight, A, B, p.scaling, p.omega))

    return forward, (A, B)


def _whole(p: Projection) -> tuple[Linear, tuple[Tensor, ...]]:
    """The weight itself is trained, which takes three GEMMs, as many as the product form needs."""
    weight = p.weight.detach().requires_grad_()
    return partial(F.linear, weight=weight, bias=p.bias), (weight,)


def _plain(p: Projection) -> tuple[Linear, tuple[Tensor, ...]]:
    return partial(formula.bounded_linear, **p._asdict()), _factors(p)


def peft(adapter_dtype: torch.dtype) -> Build:
    """PEFT's own layers, with the sine as a LoraVariant."""

    def make(p: Projection) -> tuple[Linear, tuple[Tensor, ...]]:
        layer: Any = peft_projection(p, adapter_dtype)
        return layer, tuple(factor["default"].weight for factor in (layer.lora_A, layer.lora_B))

    return each(make, f"PEFT, {adapter_dtype} adapters")


def peft_projection(p: Projection, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's layer around a linear layer that shares the projection's weight and bias."""
    N, K = p.weight.shape
    linear = nn.Linear(K, N, bias=p.bias is not None, device="meta")
    linear.weight = nn.Parameter(p.weight, requires_grad=False)
    if p.bias is not None:
        linear.bias = nn.Parameter(p.bias, requires_grad=False)
    return baselines.peft_linear(
        linear, *_factors(p), scaling=p.scaling, omega=p.omega, adapter_dtype=adapter_dtype
    )


def bf16_only(device_type: str, dtype: torch.dtype) -> str | None:
    """Why bf16 adapters are not measured on this base: nobody would use them on fp32."""
    return None if dtype is torch.bfloat16 else f"the base is {dtype}"


def compiled(o: Operands) -> Contender:
    """`torch.compile` of the plain formula."""
    torch.compiler.reset()  # one case must not make another recompile or become dynamic
    own = o.leaves()
    function = torch.compile(own.formula, fullgraph=True, dynamic=False)
    forward = partial(function, **own.arguments)
    path = "torch.compile of fastbound.truth.formula"
    return Contender(forward, tuple(own.trained.values()), lambda: path)


@cache
def no_compiler(device_type: str, dtype: torch.dtype) -> str | None:
    """Why torch.compile does not work here, found by compiling a small function, or None."""
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.zeros(8, device=device_type, dtype=dtype))
    except Exception as error:
        return f"torch.compile does not work here: {str(error).splitlines()[0]}"
    return None


# The floor is the bare layer or block with the gradient of x; it has no adapter.
FROZEN = Competitor("frozen", each(_frozen, "F.linear", None))
FUSED = Competitor("fused", operator())
# What a user gets: the kernels chosen by the first call of the shape.
AUTO = Competitor("auto", operator("auto"), needs_gpu)
UNFUSED = (
    Competitor("peft_fp32", peft(torch.float32)),
    Competitor("peft_bf16", peft(torch.bfloat16), bf16_only),
    Competitor("compiled", compiled, no_compiler),
)
LAYER_COMPETITORS = (
    FROZEN,
    FUSED,
    AUTO,
    Competitor("split", operator("split"), needs_gpu),
    Competitor("addmm", each(_addmm, "F.linear, addmm_")),
    *UNFUSED,
)
BLOCK_COMPETITORS = (FROZEN, FUSED, AUTO, Competitor("per_layer", per_layer()), *UNFUSED)
# The product form's floor is the layer whose whole weight is trained.
PRODUCT_COMPETITORS = (
    FROZEN,
    Competitor("trained", each(_whole, "F.linear, its weight trained", None)),
    Competitor("product", operator("auto")),
    Competitor("plain", each(_plain, "fastbound.truth.formula by autograd", "product")),
    Competitor("peft_fp32", peft(torch.float32)),
)
