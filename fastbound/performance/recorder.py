"""Record a call: every kernel launch and PyTorch operation that it makes, without running any.

    with recording(Device("sm_90", 132)) as calls:
        ...  # the operator over meta tensors

The tensors are on the meta device, so the GPU need not be present and the sizes need not fit in any
memory: a launch depends only on shapes, strides and dtypes. This one list tells what is compiled,
which bytes move and what takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbound.dispatch.device import Device, pretending
from fastbound.kernels.launch import Launch, recorded
from fastbound.operator import block_ops, ops
from fastbound.operator.call import BlockCall, Term
from fastbound.truth.formula import Projection

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FILLS = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like"}
_OVERWRITES = {"copy_", "fill_", "zero_"}  # in place, without reading what was there


class Operation(NamedTuple):
    """One PyTorch operation: its name, and the tensors it reads and writes by argument name."""

    name: str
    read: tuple[tuple[str, Tensor], ...]
    written: tuple[tuple[str, Tensor], ...]


Call: TypeAlias = "Launch | Operation"


class Directions(NamedTuple):
    """The calls of a forward and of a backward pass, in order."""

    forward: list[Call]
    backward: list[Call]

    @property
    def launches(self) -> list[Launch]:
        """The kernel launches of both passes."""
        return [call for call in (*self.forward, *self.backward) if isinstance(call, Launch)]


@contextmanager
def recording(device: Device) -> Iterator[list[Call]]:
    """Collect the calls made in this context over meta tensors, planned as if on ``device``."""
    with pretending(device), recorded() as launches:
        calls: list[Call] = launches
        with Operations(calls.append):
            yield calls


def layer_calls(
    device: Device,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
    *,
    backend: str = "auto",
    bias: bool = False,
    dropout: float = 0.0,
    over_base: bool = False,
    strided: bool = False,
    form: str = "factors",
    layout: str = "rows",
    adapter_dtype: torch.dtype = torch.float32,
) -> Directions:
    """The calls of one layer with x [M, K] and weight [N, K].

    With ``over_base``, only the adapter's term is computed and added to a base layer's result. With
    ``strided``, x, dy and the weight are columns of wider matrices, so that their rows are not
    aligned. ``layout`` is that of the weight: "rows", or "columns" as in a transformers Conv1D.
    """
    x, dy = (_meta(M, n + strided, dtype=dtype)[:, :n] for n in (K, N))
    weight = _weight(N, K + strided, dtype, layout)[:, :K]
    b = _meta(N, dtype=dtype) if bias else None
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout else None
    A, B = _factors(N, K, rank, adapter_dtype)
    term = Term(A, B, 1.0, 1.0, backend, seed, dropout, form)
    base = (None, None, _meta(M, N, dtype=dtype)) if over_base else (weight, b, None)
    with recording(device) as forward:
        _, S = ops.compute_forward(x, *base, *term)
    with recording(device) as backward:
        ops.compute_backward(dy, x, S, base[0], dtype, True, True, True, *term)
    return Directions(forward, backward)


def block_calls(
    device: Device,
    M: int,
    N: int,
    K: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    *,
    activation: str = "silu",
    gated: bool = True,
    backend: str = "auto",
    bias: bool = False,
    form: str = "factors",
    layout: str = "rows",
    adapter_dtype: torch.dtype = torch.float32,
) -> Directions:
    """The calls of an MLP block K -> N -> K.

    ``ranks`` are those of gate, up and down (of up and down in a plain block); 0 means that a
    projection is not adapted. ``layout`` is as in :func:`layer_calls`.
    """

    def projection(N: int, K: int, rank: int) -> Projection:
        A, B = _factors(N, K, rank, adapter_dtype) if rank else (None, None)
        b = _meta(N, dtype=dtype) if bias else None
        return Projection(_weight(N, K, dtype, layout), b, A, B, form=form)

    *first, down = ranks
    projections = [projection(N, K, rank) for rank in first]
    up = projections[1] if gated else None
    call = BlockCall(projections[0], up, projection(K, N, down), activation, backend).flat()
    x, dy = _meta(M, K, dtype=dtype), _meta(M, K, dtype=dtype)
    with recording(device) as forward:
        _, G, U, S, S_down = block_ops.compute_forward(x, *call)
    with recording(device) as backward:
        block_ops.compute_backward(dy, x, G, U if gated else None, S, S_down, True, *call)
    return Directions(forward, backward)


def _weight(N: int, K: int, dtype: torch.dtype, layout: str) -> Tensor:
    return _meta(K, N, dtype=dtype).t() if layout == "columns" else _meta(N, K, dtype=dtype)


def _factors(N: int, K: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _meta(rank, K, dtype=dtype), _meta(N, rank, dtype=dtype)


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


class Operations(TorchDispatchMode):
    """Report every operation that moves bytes; for fastbound's operators, those inside them."""

    def __init__(self, found: Callable[[Operation], object]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastbound":
            with self:  # a meta tensor's own key would only compute shapes
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        operation = operation_of(func, args, kwargs, result)
        if operation is not None:
            self._found(operation)
        return result


def operation_of(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> Operation | None:
    """What an operation reads and writes; None for a view or allocation, which moves nothing."""
    name = function.overloadpacket.__name__
    if name in _ALLOCATIONS:
        return None
    read: list[tuple[str, Tensor]] = []
    written: list[tuple[str, Tensor]] = []
    for i, argument in enumerate(function._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [(argument.name, t) for t in tree_leaves(value) if isinstance(t, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written += tensors
        if name not in _FILLS and not (writes and (argument.is_out or name in _OVERWRITES)):
            read += tensors
    if not written:
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        sources = {t.untyped_storage()._cdata for _, t in read}
        if not made or any(t.untyped_storage()._cdata in sources for t in made):
            return None  # no tensor, or a view that the operator's schema does not declare
        written = [("out" if i == 0 else f"out{i}", t) for i, t in enumerate(made)]
    return Operation(name, tuple(read), tuple(written))
