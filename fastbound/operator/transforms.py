"""What torch.func and second derivatives find in the autograd Functions: an answer or an error.

torch's own ``once_differentiable`` says nothing under ``torch.func.grad``, where a second
derivative comes out as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


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
