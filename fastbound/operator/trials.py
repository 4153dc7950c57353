"""The trials of a first call: the call itself by each engine, and the truth to compare it with.

The operands are those of the call except for the factors: B is zero before the first step, and a
term of zeros would hide any error in it. Factors of the same sizes are drawn instead, from a
generator of their own, such that the term is about as large as x Wᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastbound.dispatch.first_use import Outputs, Trial, Unmeasurable
from fastbound.operator.call import BlockCall, Term
from fastbound.operator.dropout import keep_bits, keep_mask, keep_rate
from fastbound.operator.engine import Route, engine_of
from fastbound.truth import formula
from fastbound.truth.formula import Projection
from fastbound.truth.sampled import sampled_rows, wide_mlp, wide_product, y_and_dx

Compute = Callable[..., Any]


def forward_trial(
    route: Route,
    compute: Compute,
    X: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    result: Tensor | None,
    term: Term,
) -> Trial:
    """The trial of y and S; ``compute`` is ``ops.compute_forward``."""
    term = _drawn(term, weight)
    width = term.B.shape[0]
    base = None if result is None else result.reshape(-1, width)
    rows = sampled_rows(X.shape[0], X.device)

    def run(strategy: str) -> Outputs:
        engine = _engine(route, strategy)
        y, S = compute(X, weight, bias, base, *term, engine=engine)
        return y.view(-1, width), S

    def truth() -> Mapping[int, Tensor]:
        given = None if base is None else base[rows]
        call = _layer(term, weight, bias, rows, X.shape[0], given)
        return {0: y_and_dx(call, X[rows])[0]}

    return _trial(run, truth, rows, X, X.shape[0] * (width + term.R))


def backward_trial(
    route: Route,
    compute: Compute,
    DY: Tensor,
    X: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    term: Term,
) -> Trial:
    """The trial of dx, dA and dB; ``compute`` is ``ops.compute_backward``."""
    term, DY = _drawn(term, weight), _usable(DY)
    (M, _), K = DY.shape, term.A.shape[1]
    rows = sampled_rows(M, DY.device)

    def run(strategy: str) -> Outputs:
        engine = _engine(route, strategy)
        dx, dA, dB = compute(DY, X, S, weight, dtype, *needs, *term, engine=engine)
        return dx, dA, dB

    def truth() -> Mapping[int, Tensor]:
        if not needs[0]:
            return {}
        nothing = DY.new_zeros(len(rows), DY.shape[1], dtype=torch.float64)
        call = _layer(term, weight, None, rows, M, nothing if weight is None else None)
        return {0: _given(y_and_dx(call, DY.new_zeros(len(rows), K), DY[rows])[1])}

    return _trial(run, truth, rows, DY, M * K)


def block_forward_trial(route: Route, compute: Compute, X: Tensor, call: BlockCall) -> Trial:
    """The trial of y and what a block saves; ``compute`` is ``block_ops.compute_forward``."""
    call = _drawn_block(call)
    rows = sampled_rows(X.shape[0], X.device)

    def run(strategy: str) -> Outputs:
        y, *saved = compute(X, *call.flat(), engine=_engine(route, strategy))
        return y, *saved

    def truth() -> Mapping[int, Tensor]:
        return {0: y_and_dx(partial(_block, call=call), X[rows])[0]}

    return _trial(run, truth, rows, X, _block_size(X, call))


def block_backward_trial(
    route: Route, compute: Compute, DY: Tensor, X: Tensor, saved: tuple[Any, ...],
    need_dx: bool, call: BlockCall,
) -> Trial:  # fmt: skip
    """The trial of dx and the factors' gradients; ``compute`` is ``block_ops.compute_backward``."""
    call, DY = _drawn_block(call), _usable(DY)
    rows = sampled_rows(X.shape[0], X.device)
    G, U = saved[:2]

    def run(strategy: str) -> Outputs:
        engine = _engine(route, strategy)
        return tuple(compute(DY, X, *saved, need_dx, *call.flat(), engine=engine))

    def truth() -> Mapping[int, Tensor]:
        if not need_dx or G is None:  # G would be recomputed from the S of the actual factors
            return {}
        return {0: _block_dx(call, DY[rows], G[rows], None if call.up is None else U[rows])}

    return _trial(run, truth, rows, DY, _block_size(X, call))


def whole_trial(
    steps: Mapping[str, Callable[[Tensor, BlockCall], Tensor]], X: Tensor, call: BlockCall
) -> Trial:
    """The trial of y, dx and the factors' gradients by autograd; ``steps`` are forwards by name.

    On a CPU it takes an eighth of the rows, so that the whole trial takes about as long as a call.
    """
    if X.device.type == "cpu":
        X = X[: max(128, len(X) // 8)]
    X, call = X.detach(), _drawn_block(call)
    rows = sampled_rows(X.shape[0], X.device)
    width = call.down.weight.shape[0]
    generator = torch.Generator(X.device).manual_seed(1)
    DY = torch.randn(X.shape[0], width, generator=generator, device=X.device, dtype=X.dtype)

    def run(strategy: str) -> Outputs:
        own = [None if p is None else _with_leaves(p) for p in call.projections()]
        leaves = [t for p in own if p is not None for t in (p.A, p.B) if t is not None]
        x = X.detach().requires_grad_()
        with torch.enable_grad():
            y = steps[strategy](x, _with(call, own))
            return y.detach(), *torch.autograd.grad(y, [x, *leaves], DY)

    def truth() -> Mapping[int, Tensor]:
        y, dx = y_and_dx(partial(_block, call=call), X[rows], DY[rows])
        return {0: y, 1: _given(dx)}

    return _trial(run, truth, rows, X, 6 * _block_size(X, call), yardstick="block")


def _with(call: BlockCall, projections: Iterable[Projection | None]) -> BlockCall:
    gate, up, down = projections
    return BlockCall(gate or call.gate, up, down or call.down, call.activation, call.backend)


def _with_leaves(p: Projection) -> Projection:
    A, B = (None if t is None else t.detach().requires_grad_() for t in (p.A, p.B))
    return p._replace(A=A, B=B)


def _trial(
    run: Callable[[str], Outputs],
    truth: Callable[[], Mapping[int, Tensor]],
    rows: Tensor,
    X: Tensor,
    numbers: int,
    yardstick: str = "torch",
) -> Trial:
    @torch.no_grad()
    def made(strategy: str) -> Outputs:
        return run(strategy)

    nbytes = numbers * X.element_size()
    return Trial(made, truth, rows, yardstick, X.device, X.dtype, nbytes)


def _engine(route: Route, strategy: str) -> Any:
    return engine_of(route.plan.by(strategy))


def _layer(
    term: Term, weight: Tensor | None, bias: Tensor | None, rows: Tensor, M: int,
    result: Tensor | None,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """The layer in fp64, as a function of the sampled rows of x."""
    keep, scaling = None, term.scaling
    if term.seed is not None:
        K = term.A.shape[1]
        keep = keep_mask(keep_bits(term.seed, M, K, term.dropout)[rows], K)
        scaling = scaling / keep_rate(term.dropout)
    # Over a base no weight is read: result takes the place of x Wᵀ + b.
    held = term.A if weight is None else weight
    p = Projection(held, bias, term.A, term.B, scaling, term.omega, term.form)
    return partial(wide_product, p=p, keep=keep, result=result)


def _block(x: Tensor, call: BlockCall) -> Tensor:
    return wide_mlp(x, call.gate, call.up, call.down, call.activation)


def _block_dx(call: BlockCall, dy: Tensor, G: Tensor, U: Tensor | None) -> Tensor:
    """dx in fp64 of a block with given g and u, through which each projection is linear."""

    def through(p: Projection, gradient: Tensor) -> Tensor:
        zeros = gradient.new_zeros(len(gradient), p.weight.shape[1])
        return _given(y_and_dx(partial(wide_product, p=p._replace(bias=None)), zeros, gradient)[1])

    dh = through(call.down, dy)
    g = G.detach().double().requires_grad_()
    with torch.enable_grad():
        f = formula.apply_activation(g, call.activation)
    u = None if U is None else U.detach().double()
    (dg,) = torch.autograd.grad(f, g, dh if u is None else dh * u)
    dx = through(call.gate, dg)
    return dx if call.up is None else dx + through(call.up, dh * f.detach())


def _block_size(X: Tensor, call: BlockCall) -> int:
    """The number of elements that a block's forward or backward allocates."""
    N, K = call.gate.weight.shape
    return X.shape[0] * ((2 if call.up is None else 3) * N + K)


def _drawn(term: Term, weight: Tensor | None) -> Term:
    A, B = _factors(term.A, term.B, term.scaling, term.omega, term.form, weight)
    return term._replace(A=A, B=B)


def _drawn_block(call: BlockCall) -> BlockCall:
    def drawn(p: Projection | None) -> Projection | None:
        if p is None or p.A is None or p.B is None:
            return p
        A, B = _factors(p.A, p.B, p.scaling, p.omega, p.form, p.weight)
        return p._replace(A=A, B=B)

    return _with(call, map(drawn, call.projections()))


def _factors(
    A: Tensor, B: Tensor, scaling: float, omega: float, form: str, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Random factors shaped like A and B, whose ΔW is about as large as the weight's entries."""
    size = 0.02
    if weight is not None:
        some = weight[: max(1, 2**16 // weight.shape[1])].float()
        size = float(some.square().mean().sqrt()) or size
    if not (math.isfinite(size) and scaling and omega):
        raise Unmeasurable("the weight or the settings are zero or not finite")
    generator = torch.Generator(A.device).manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(
            *like.shape, generator=generator, device=like.device, dtype=torch.float32
        )

    if form == "product":
        angle = min(1.0, size / abs(scaling))
        return draw(A).to(A.dtype), (draw(B) * (angle / omega / A.shape[0] ** 0.5)).to(B.dtype)
    angle = min(1.0, size / (0.6 * math.sqrt(A.shape[0]) * abs(scaling)))
    return (draw(A) / omega).to(A.dtype), (draw(B) * (angle / omega)).to(B.dtype)


def _usable(DY: Tensor) -> Tensor:
    """DY, or noise if DY is zero or not finite, as first gradients under loss scaling often are."""
    size = torch.linalg.vector_norm(DY, dtype=torch.float32)
    if bool(size.isfinite()) and bool(size > 0):
        return DY
    generator = torch.Generator(DY.device).manual_seed(1)
    return torch.randn(DY.shape, generator=generator, device=DY.device, dtype=DY.dtype)


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("fastbound: a gradient that was asked for is missing")
    return tensor


def layer_by_layer(x: Tensor, call: BlockCall, linear_of: Callable[..., Tensor]) -> Tensor:
    """A block computed layer by layer; ``linear_of`` is ``function.bounded_linear``."""

    def layer(p: Projection) -> Callable[[Tensor], Tensor]:
        if p.A is None or p.B is None:
            bias = None if p.bias is None else p.bias.to(x.dtype)
            return lambda x: linear(x, p.weight.to(x.dtype), bias)
        settings = {
            "scaling": p.scaling,
            "omega": p.omega,
            "form": p.form,
            "backend": call.backend,
        }
        return lambda x: linear_of(x, p.weight, p.A, p.B, p.bias, **settings)

    first, last = layer(call.gate), layer(call.down)
    if call.up is None:
        return formula.mlp(x, first, last, activation=call.activation)
    return formula.mlp(x, layer(call.up), last, first, activation=call.activation)
