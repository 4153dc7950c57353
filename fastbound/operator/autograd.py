"""What the operators' autograd Functions share: eager calls, second derivatives, ``torch.func``.

Eager calls, which nothing traces or intercepts, go without what takes time: a registered operator's
dispatch takes about 5 µs, and `Function.apply` reads a signature for another 6 where the Function
has a `setup_context`. Where nothing asks for a gradient there is no Function at all: a tracer
(torch.compile, torch.jit.trace) then meets the operator alone, which it can keep. A second
derivative is an error: torch's own ``once_differentiable`` says nothing under ``torch.func.grad``,
where it comes out as zero. A forward-mode one is an error, too.
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
    """No compiler, tracer, dispatch mode or transform of torch.func is at work."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
    )


def plain(*arguments: Any) -> bool:
    """No argument is of a subclass of Tensor, whose ``__torch_dispatch__`` must see an operator."""
    return _PLAIN.issuperset(map(type, arguments))


def direct(operator: Callable[..., _R], implementation: Callable[..., _R]) -> Callable[..., _R]:
    """A registered operator, without its dispatch where nothing could see it.

    Arguments are given by position.
    """

    def call(*arguments: Any) -> _R:
        if nothing_intercepts() and _PLAIN.issuperset(map(type, arguments)):
            return implementation(*arguments)
        return operator(*arguments)

    return call


def apply_of(function: type[_F]) -> Callable[..., Any]:
    """``function.apply``, and where nothing intercepts that of a form without `setup_context`.

    Where no derivative can be asked for, ``function.forward``.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    def form(**methods: Callable[..., Any]) -> Any:
        bound = {name: staticmethod(method) for name, method in methods.items()}
        return type(function.__name__, (function,), bound)

    # torch.compile takes no Function with a jvp.
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
                "torch.jit.trace keeps no gradient of fastbound's operators: trace under "
                "torch.no_grad(), or take torch.compile or torch.export"
            )
        return (eager if nothing_intercepts() else transformed).apply(*arguments)

    return apply


def _no_jvp(ctx: Any, *tangents: Any) -> Any:
    raise RuntimeError(
        "fastbound's operators have no forward-mode derivative (torch.func.jvp, jacfwd, "
        'forward_ad): take torch.func.vjp or jacrev, or call them with backend="reference"'
    )


def _differentiated(arguments: tuple[Any, ...]) -> bool:
    """Whether a derivative by one of the arguments, or a batch of them, can be asked for."""
    if forward_ad._current_level >= 0 or torch._C._functorch.get_dynamic_layer_stack_depth():
        return True
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


class _Once(torch.autograd.Function):
    """Its first tensors, as functions of all of them that cannot be differentiated."""

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
            "fastbound's operators are differentiable once: for a second derivative call them with "
            'backend="reference"'
        )


def differentiable_once(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A Function's backward whose gradients raise where they are differentiated again."""

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
    """x with the dimension that ``torch.func.vmap`` maps over put first: rows like others.

    Raises ValueError where anything but x is mapped over, the mask of dropout included.
    """
    dims = [d for d in in_dims if isinstance(d, int)]  # of a list: one for each of its parts
    seeded = any(isinstance(a, Tensor) and not a.is_floating_point() for a in arguments)
    if in_dims[0] is None or len(dims) > 1 or seeded:
        what = "with dropout" if seeded else "over weights or adapters"
        raise ValueError(
            f"torch.func.vmap {what} is not supported: call the operator once for each, or map "
            "over x alone, without dropout"
        )
    x: Tensor = arguments[0]
    return x.movedim(in_dims[0], 0)
