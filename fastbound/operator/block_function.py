"""Autograd for a whole MLP block with bounded adapters: what is saved, and each gradient.

    g = gate(x)    u = up(x)    h = f(g) ⊙ u    y = down(h)        plain: y = down(f(up(x)))

It saves x, g and u (for a plain block, its first projection's output), the thin products and
references to the parameters. h and all other tensors of size [M, N] are recomputed or never made.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbound.dispatch.first_use import LEAST_ROWS
from fastbound.operator.autograd import (
    apply_of,
    differentiable_once,
    nothing_intercepts,
    plain,
    rows_alone,
)
from fastbound.operator.block_ops import block_route, mlp_backward, mlp_forward
from fastbound.operator.call import SETTINGS, BlockCall, Term, autocast_to, check_operands
from fastbound.operator.function import bounded_linear
from fastbound.operator.ops import rows
from fastbound.operator.trials import layer_by_layer, whole_trial
from fastbound.truth import formula
from fastbound.truth.formula import ACTIVATIONS, Projection

RECOMPUTE = (None, "gate_up")


class _BoundedMLP(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, recompute: str | None, *call: Any) -> tuple[Tensor, ...]:
        y, G, U, S, S_down = mlp_forward(x, *call)
        return y, G, U, S, S_down

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        y, *saved = _BoundedMLP.apply(rows_alone(info, in_dims, arguments), *arguments[1:])
        size = info.batch_size
        parts = [t.unflatten(0, (size, len(t) // size)) for t in saved]
        return (y, *parts), (0,) * (1 + len(parts))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, recompute, *call = inputs
        tensors, ctx.settings = call[:-SETTINGS], call[-SETTINGS:]
        _, G, U, S, S_down = output
        ctx.mark_non_differentiable(G, U, S, S_down)
        ctx.set_materialize_grads(False)
        gated = BlockCall.of(call).up is not None
        kept = (None, None) if recompute else (G, U if gated else None)
        ctx.save_for_backward(x, *kept, S, S_down, *tensors)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(need)
        x, G, U, S, S_down, *tensors = ctx.saved_tensors
        call = (*tensors, *ctx.settings)
        dx, *factors = mlp_backward(dy, x, G, U, S, S_down, need[0], *call)
        gradients: list[Tensor | None] = [dx, None]  # for x and recompute
        for dA, dB in zip(factors[::2], factors[1::2], strict=True):
            gradients += [None, None, dA, dB]  # for a projection's weight, bias, A and B
        gradients += [None] * len(ctx.settings)
        return tuple(g if wanted else None for g, wanted in zip(gradients, need, strict=True))


_apply = apply_of(_BoundedMLP)


def bounded_mlp(
    x: Tensor,
    up: Projection,
    down: Projection,
    gate: Projection | None = None,
    *,
    activation: str = "silu",
    recompute: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """``down(f(gate(x)) ⊙ up(x))``, or ``down(f(up(x)))`` without a gate, of bounded projections.

    Any subset of the projections may be adapted, and their ranks, scaling and omega may differ.
    Adapted projections must have the same form. Two runs give the same bits.

    Args:
        x: [..., K], any strides.
        up, gate: projections with weights [N, K]; ``gate`` is None for a plain two-layer block.
        down: the projection with weight [K', N].
        activation: f, one of "silu", "gelu", "gelu_tanh", "relu".
        recompute: "gate_up" saves neither g nor u and runs their GEMMs again in backward.
        backend: as for :func:`fastbound.bounded_linear`. "auto" runs the projections one by one if
            the first call of the shape found that clearly faster, although they then save more
            for backward. It never does so with ``recompute``.

    Returns:
        [..., K'] in the compute dtype: autocast's if autocast is on, else x's.

    Raises:
        TypeError, ValueError: as for :func:`fastbound.bounded_linear`, for each projection. Also
            for an unknown activation or ``recompute``, projections of different forms, gate and up
            of different sizes, a down whose columns do not match up's rows, a projection with only
            one of A and B, and a bias that requires grad.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}"
        )
    if recompute not in RECOMPUTE:
        raise ValueError(f'unknown recompute {recompute!r}: choose None or "gate_up"')
    projections = {"gate": gate, "up": up, "down": down}
    _check_block(x, projections, backend)
    dtype = autocast_to(x.dtype, x.device)
    if dtype is not None:
        x = x.to(dtype)
    else:
        for name, p in projections.items():
            if p is not None and p.weight.dtype is not x.dtype:
                raise TypeError(
                    f"x is {x.dtype} and {name}'s weight is {p.weight.dtype}: cast one of them, "
                    "or use torch.autocast"
                )
    forms = {p.form for p in projections.values() if p is not None and p.A is not None}
    if len(forms) > 1:
        raise ValueError("the projections of a block must have one form, got factors and product")
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            cast = {name: _cast(p, x.dtype) for name, p in projections.items()}
            return formula.bounded_mlp(x, **cast, activation=activation)  # type: ignore[arg-type]
    first, second = (up, None) if gate is None else (gate, up)
    call = BlockCall(first, second, down, activation, backend)
    if recompute is None and _by_layers(x, call):
        return layer_by_layer(x, call, bounded_linear)
    y, *_ = _apply(x, recompute, *call.flat())
    return y


def _by_layers(x: Tensor, call: BlockCall) -> bool:
    """Whether running layer by layer was found, or is found now, to beat the one operator.

    Decided only if a gradient is asked for and nothing intercepts the call; all other calls take
    the one operator.
    """
    if torch.compiler.is_compiling():  # before any size is read, which may be symbolic
        return False
    if call.backend != "auto" or x.numel() < LEAST_ROWS * x.shape[-1]:
        return False
    tensors = call.flat()[:12]
    trained = any(t is not None and t.requires_grad for t in (x, *tensors))
    if not (trained and torch.is_grad_enabled() and nothing_intercepts() and plain(x, *tensors)):
        return False
    X = rows(x.detach())
    route = block_route(X, call, "whole")
    engine = route.engine
    if engine is None:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            engine = route.decide(partial(whole_trial, _WHOLE, X, call))
    return engine.plan.strategy == "layers"


_WHOLE = {
    "block": lambda x, call: _apply(x, None, *call.flat())[0],
    "layers": lambda x, call: layer_by_layer(x, call, bounded_linear),
}


def _check_block(x: Tensor, projections: dict[str, Projection | None], backend: str) -> None:
    gate, up, down = projections["gate"], projections["up"], projections["down"]
    if up is None or down is None:
        raise ValueError("a block needs the projections up and down")
    if gate is not None and gate.weight.shape != up.weight.shape:
        raise ValueError(
            f"gate's weight {list(gate.weight.shape)} and up's {list(up.weight.shape)} differ"
        )
    if down.weight.dim() != 2 or down.weight.shape[1] != up.weight.shape[0]:
        raise ValueError(
            f"down's weight {list(down.weight.shape)} does not match up's "
            f"{list(up.weight.shape)}: it must have as many columns as up has rows"
        )
    hidden = x.new_empty(0, up.weight.shape[0])
    for name, p in projections.items():
        if p is None:
            continue
        if (p.A is None) != (p.B is None):
            raise ValueError(f"{name} has only one of A and B: give both, or neither")
        if p.bias is not None and p.bias.requires_grad:
            raise ValueError(
                f"{name}'s bias requires grad, but the block computes no gradient for it: call "
                "bias.requires_grad_(False)"
            )
        A = p.weight.new_empty(1, p.weight.shape[1]) if p.A is None else p.A
        B = p.weight.new_empty(p.weight.shape[0], 1) if p.B is None else p.B
        try:
            source = hidden if name == "down" else x
            term = Term(A, B, p.scaling, p.omega, backend, form=p.form)
            check_operands(source, term, weight=p.weight, bias=p.bias)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None


def _cast(p: Projection | None, dtype: torch.dtype) -> Projection | None:
    if p is None:
        return None
    bias = None if p.bias is None else p.bias.to(dtype)
    return p._replace(weight=p.weight.to(dtype), bias=bias)
