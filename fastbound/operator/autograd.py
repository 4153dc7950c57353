"""What the operators' autograd Functions share: eager calls, second derivatives, ``torch.func``.

Eager calls, which nothing traces or intercepts, skip the expensive machinery: dispatching a
registered operator takes about 5 µs, and `Function.apply` spends another 6 µs on reading the
signature of a Function with a `setup_context`. If no gradient is asked for, no Function is used, so
that a tracer (torch.compile, torch.jit.trace) sees only the operator, which it can record.

A second derivative raises an error. PyTorch's own ``once_differentiable`` does not: under
``torch.func.grad`` the second derivative silently comes out as zero. Forward-mode derivatives raise
an error too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_F = TypeVar("_F", bound=torch.autograd.Function)
_R = TypeVar("_R")

_PLAIN = frozenset({Tensor, nn.Parameter, type(None), bool, float, str, list, torch.dtype})


def nothing_intercepts() -> bool:
    """Whether no compiler, tracer, dispatch mode, vmap or torch.func transform is active."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        # autograd.grad(is_grads_batched=True) and functional.jacobian(vectorize=True)
        or torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")
    )


def plain(*arguments: Any) -> bool:
    """Whether no argument is a Tensor subclass, whose ``__torch_dispatch__`` must see operators."""
    return _PLAIN.issuperset(map(type, arguments))


def direct(operator: Callable[..., _R], implementation: Callable[..., _R]) -> Callable[..., _R]:
    """A function that calls the operator, or its implementation directly if nothing intercepts.

    Arguments are positional.
    """

    def call(*arguments: Any) -> _R:
        if nothing_intercepts() and _PLAIN.issuperset(map(type, arguments)):
            return implementation(*arguments)
        return operator(*arguments)

    return call


def apply_of(function: type[_F]) -> Callable[..., Any]:
    """A faster ``function.apply``.

    If nothing intercepts the call, it applies a variant of the Function without `setup_context`. If
    no derivative can be asked for, it calls ``function.forward``.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    def form(**methods: Callable[..., Any]) -> Any:
        bound = {name: staticmethod(method) for name, method in methods.items()}
        return type(function.__name__, (function,), bound)

    # torch.compile does not accept a Function that has a jvp.
    transformed = form(jvp=_no_jvp)
    no_setup = torch.autograd.Function.setup_context
    eager = form(jvp=_no_jvp, forward=forward, setup_context=no_setup)

    def apply(*arguments: Any) -> Any:
        if not _differentiated(arguments):
            return function.forward(*arguments)
        if torch.compiler.is_compiling():
            return function.apply(*arguments)
        if torch._C._is_tracing():
            raise RuntimeError(
                "torch.jit.trace does not record the gradient of fastbound's operators: trace "
                "under torch.no_grad(), or use torch.compile or torch.export"
            )
        return (eager if nothing_intercepts() else transformed).apply(*arguments)

    return apply


def _no_jvp(ctx: Any, *tangents: Any) -> Any:
    raise RuntimeError(
        "fastbound's operators have no forward-mode derivative (torch.func.jvp, jacfwd, "
        'forward_ad): use torch.func.vjp or jacrev, or call them with backend="reference"'
    )


def _differentiated(arguments: tuple[Any, ...]) -> bool:
    """Whether a derivative with respect to an argument, or a vmap over one, can be asked for."""
    if forward_ad._current_level >= 0 or torch._C._functorch.get_dynamic_layer_stack_depth():
        return True
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


class _Once(torch.autograd.Function):
    """The first ``count`` tensors, as functions of all of them that cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "fastbound's operators are differentiable only once: for a second derivative call them "
            'with backend="reference"'
        )


def differentiable_once(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Wrap a Function's backward so that differentiating its gradients again raises an error."""

    @wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if torch.compiler.is_compiling():  # a compiled graph refuses a second derivative by itself
            return found
        made = [gradient for gradient in found if gradient is not None]
        sources = [t for t in (*gradients, *ctx.saved_tensors) if t is not None]
        once = iter(_Once.apply(len(made), *made, *sources))
        return tuple(None if gradient is None else next(once) for gradient in found)

    return wrapper


def rows_alone(info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Tensor:
    """x with the dimension that ``torch.func.vmap`` maps over moved to the front, as more rows.

    Raises ValueError if anything but x is mapped over, which includes dropout's mask.
    """
    dims = [d for d in in_dims if isinstance(d, int)]  # a list argument has one for each part
    seeded = any(isinstance(a, Tensor) and not a.is_floating_point() for a in arguments)
    if in_dims[0] is None or len(dims) > 1 or seeded:
        what = "with dropout" if seeded else "over weights or adapters"
        raise ValueError(
            f"torch.func.vmap {what} is not supported: call the operator in a loop, or map over x "
            "only, without dropout"
        )
    x: Tensor = arguments[0]
    return x.movedim(in_dims[0], 0)
