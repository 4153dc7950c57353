"""Triton's interpreter: whether it is in use, a fix for its bf16, and NaN-filled memory for tests.

``TRITON_INTERPRET=1``, set before triton is imported, runs kernels on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def interpreting() -> bool:
    """Whether kernels run in Triton's CPU interpreter: ``TRITON_INTERPRET=1`` before import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Make torch.empty, empty_like and new_empty return NaN, so that unwritten elements show."""

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


@contextmanager
def interpreted_bf16() -> Iterator[None]:
    """Fix bf16 in Triton's interpreter, which stores it as uint16.

    Its dot would multiply the bit patterns; here it gets the values as fp32. Its cast from fp32
    would truncate; here it rounds to nearest, ties to even, as a GPU does.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    original_cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return original_cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        kept = np.where(np.isnan(src.data), (bits >> 16).astype(np.uint16) | 0x40, nearest)
        return TensorHandle(kept.astype(np.uint16), tl.bfloat16)

    with (
        mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        mock.patch.object(InterpreterBuilder, "cast_impl", cast_impl),
    ):
        yield
