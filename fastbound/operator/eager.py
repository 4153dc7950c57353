"""Eager calls, which nothing traces or intercepts: what they can go without, since it takes time.

A registered operator's dispatch takes about 5 µs, and `Function.apply` reads a signature for
another 6 where the Function has a `setup_context`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_F = TypeVar("_F", bound=torch.autograd.Function)
_R = TypeVar("_R")

# No subclass of Tensor, whose __torch_dispatch__ must see an operator.
_PLAIN = frozenset({Tensor, nn.Parameter, type(None), bool, float, str, list, torch.dtype})


def nothing_intercepts() -> bool:
    """No compiler, tracer, dispatch mode or transform of torch.func is at work."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
    )


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
    """``function.apply``, and where nothing intercepts that of a form without `setup_context`."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    eager = type(
        function.__name__,
        (function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(torch.autograd.Function.setup_context),
        },
    )

    def apply(*arguments: Any) -> Any:
        return (eager if nothing_intercepts() else function).apply(*arguments)  # type: ignore[attr-defined]

    return apply
