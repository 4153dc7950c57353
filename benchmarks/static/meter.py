"""A meter of memory traffic: the bytes that each kernel and PyTorch operation reads and writes.

Triton kernels are counted in Triton's interpreter, lane by lane: a masked-off lane moves nothing,
and a tile that is read twice counts twice. PyTorch operations are counted by their operands, each
moved once, which is the least that an operation can do; views and allocations are free. Both are
requests to the memory system; the meter does not see how many of them a cache answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

from fastbound.performance.prediction import PRODUCTS, Region
from fastbound.performance.recorder import Operation, Operations


@dataclass
class Moved:
    """Bytes read and written."""

    read: int = 0
    written: int = 0


@dataclass
class Step:
    """A kernel launch or PyTorch operation: its operands by name, and the bytes it moved."""

    name: str
    gemm: bool
    operands: dict[str, Region]
    moved: dict[Region, Moved] = field(default_factory=dict)

    def count(self, region: Region, *, read: int = 0, written: int = 0) -> None:
        moved = self.moved.setdefault(region, Moved())
        moved.read += read
        moved.written += written


class Meter:
    """Counts everything that runs inside ``with Meter(weights) as meter``; see ``meter.steps``.

    ``weights`` are the large frozen matrices. A product that takes one of them is a GEMM, whose
    tiles read operands several times by design. The meter keeps every tensor it meets alive, so
    that no address is used twice. Use one meter at a time, with tensors on the CPU and interpreted
    kernels (``TRITON_INTERPRET=1`` set before triton is imported).

    Raises:
        RuntimeError: a kernel accessed memory outside its tensors, or a tensor is on a GPU.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        self.steps: list[Step] = []
        self._weights = {Region.of(weight) for weight in weights}
        self._kept: list[Tensor] = []
        self._launch: tuple[Step, list[Tensor]] | None = None
        self._scope = ExitStack()

    def __enter__(self) -> Meter:
        with ExitStack() as scope:
            scope.enter_context(self._interpreter())
            scope.enter_context(Operations(self._operation))
            self._scope = scope.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._scope.__exit__(*raised)

    def _is_gemm(self, read: Iterable[Region]) -> bool:
        return not self._weights.isdisjoint(read)

    def _operation(self, operation: Operation) -> None:
        name, read, written = operation
        step = Step(name, name in PRODUCTS and self._is_gemm(Region.of(t) for _, t in read), {})
        for operands, direction in ((read, "read"), (written, "written")):
            for argument, tensor in operands:
                region = step.operands[argument] = Region.of(tensor)
                step.count(region, **{direction: region.nbytes})
                self._kept.append(tensor)
        self.steps.append(step)

    @contextmanager
    def _interpreter(self) -> Iterator[None]:
        """Replace the interpreter's launch and memory accesses by versions that count."""
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        launch = executor.__call__

        def counted_launch(grid: Any, *args: Any, **kwargs: Any) -> None:
            named = {**dict(zip(grid.arg_names, args, strict=False)), **kwargs}
            with _disable_current_modes(), self._launching(grid.fn.__name__, named):
                launch(grid, *args, **kwargs)

        def counting(method: str, mask_at: int | None, **directions: bool) -> Any:
            original = getattr(builder, method)

            def counted(self_: Any, *args: Any, **kwargs: Any) -> Any:
                # The pointers come first; an atomic has its operation before them.
                first = 1 if method == "create_atomic_rmw" else 0
                mask = None if mask_at is None else args[mask_at].data
                self._accessed(args[first], mask, **directions)
                return original(self_, *args, **kwargs)

            return mock.patch.object(builder, method, counted)

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(executor, "__call__", counted_launch))
            # Loads and stores of every kind, including descriptors', end in these four.
            patches.enter_context(counting("create_masked_load", 1, read=True))
            patches.enter_context(counting("create_masked_store", 2, written=True))
            patches.enter_context(counting("create_atomic_rmw", 3, read=True, written=True))
            patches.enter_context(counting("create_atomic_cas", None, read=True, written=True))
            yield

    @contextmanager
    def _launching(self, name: str, arguments: dict[str, Any]) -> Iterator[None]:
        operands = {
            argument: value if isinstance(value, Tensor) else value.base
            for argument, value in arguments.items()
            if isinstance(value, Tensor) or isinstance(getattr(value, "base", None), Tensor)
        }
        for argument, tensor in operands.items():
            if tensor.device.type != "cpu":
                raise RuntimeError(
                    f"{name}: {argument} is on {tensor.device}, but the meter reads the "
                    "interpreter's addresses: use tensors on the CPU"
                )
        step = Step(name, False, {key: Region.of(tensor) for key, tensor in operands.items()})
        self._launch = step, list(operands.values())
        self._kept += operands.values()
        try:
            yield
        finally:
            self._launch = None
        step.gemm = self._is_gemm(region for region, moved in step.moved.items() if moved.read)
        self.steps.append(step)

    def _accessed(
        self, pointers: Any, mask: Any, *, read: bool = False, written: bool = False
    ) -> None:
        if self._launch is None:
            return  # outside any launch that is metered
        step, tensors = self._launch
        addresses = pointers.data
        if mask is not None:
            addresses = addresses[numpy.broadcast_to(mask, addresses.shape)]
        if addresses.size == 0:
            return
        ends = int(addresses.min()), int(addresses.max())
        for tensor in tensors:
            if all(_holds(tensor, address) for address in ends):
                break
        else:
            raise RuntimeError(f"{step.name} accesses memory outside its tensors")
        nbytes = addresses.size * tensor.element_size()
        step.count(Region.of(tensor), read=nbytes if read else 0, written=nbytes if written else 0)


def _holds(tensor: Tensor, address: int) -> bool:
    """Whether the address is an element of the tensor, even if others share its storage."""
    element, within = divmod(address - tensor.data_ptr(), tensor.element_size())
    if element < 0 or within or tensor.numel() == 0:
        return False
    layout = zip(tensor.shape, tensor.stride(), strict=True)
    for size, stride in sorted(layout, key=lambda dimension: -dimension[1]):
        if stride == 0:
            continue
        index, element = divmod(element, stride)
        if index >= size:
            return False
    return element == 0
