"""Predicted times by arithmetic: each recorded call's operations and bytes over the ceilings.

A call takes the longer of its operations over a device's compute ceiling and its bytes over the
bandwidth ceiling; calls follow one another, nothing overlaps, and what a launch costs the host is
left out. Each distinct tensor of a call moves once, however small, and what an operation writes
onto is read too: the least that the call can do. `benchmarks/NOTES.md` holds predictions against
outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from fastbound.kernels.launch import Launch
from fastbound.performance.recorder import Call

BF16, FP32 = 2, 4  # bytes of an element of an operand and of a workspace
RANK = 16


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: operations per second in a large GEMM, bytes per second."""

    flops: float
    bandwidth: float


# Vendors' datasheets, dense bf16: bounds that no measurement passes. A measured pair is better.
DATASHEET: Mapping[str, Ceilings] = {
    "a100-80gb": Ceilings(312e12, 2.039e12),
    "h100": Ceilings(989e12, 3.35e12),
    "h200": Ceilings(989e12, 4.8e12),
    "b200": Ceilings(2250e12, 8.0e12),
    "3090": Ceilings(71e12, 0.936e12),
    "4090": Ceilings(165e12, 1.008e12),
    "5090": Ceilings(209e12, 1.792e12),
    "mi250": Ceilings(181e12, 1.6e12),  # one of its two halves, which is a device
    "mi300x": Ceilings(1307e12, 5.3e12),
    "7900": Ceilings(123e12, 0.96e12),
}


def datasheet_of(gpu: str) -> Ceilings:
    """Of the card in a device's name; of an H100 for any other, whose ratio of the two is usual."""
    found = [c for key, c in DATASHEET.items() if key.split("-")[0] in gpu.lower()]
    return found[0] if found else DATASHEET["h100"]


class Region(NamedTuple):
    """The memory of a tensor, meta or real, the same for every view of all of it: W and W.t()."""

    storage: int
    offset: int
    elements: int
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> Region:
        """While the tensor lives; an expanded dimension holds one element."""
        distinct = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            distinct *= size if stride else min(size, 1)
        storage = tensor.untyped_storage()._cdata
        return cls(storage, int(tensor.storage_offset()), distinct, tensor.element_size())

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize


class Prediction(NamedTuple):
    """Of one call: its name with the sizes of its first two operands, operations, bytes."""

    name: str
    flops: int
    nbytes: int

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.flops, self.nbytes / ceilings.bandwidth)

    def bound_by(self, ceilings: Ceilings) -> str:
        by_compute = self.flops / ceilings.flops > self.nbytes / ceilings.bandwidth
        return "compute" if by_compute else "memory"


def prediction_of(call: Call) -> Prediction:
    """Of a kernel's launch or of a PyTorch operation, over real or meta tensors."""
    if isinstance(call, Launch):
        name, flops = kernel_name(call), _launch_flops(call)
    else:
        name, flops = call.name, 0
        if name in PRODUCTS:
            flops = 2 * call.written[0][1].numel() * call.read[-1][1].shape[-2]
    sizes = " ".join(str(list(tensor.shape)) for _, tensor in operands(call)[:2])
    return Prediction(f"{name} {sizes}", flops, sum(region.nbytes for region in moved(call)))


def moved(call: Call) -> list[Region]:
    """What a call moves: each of its tensors once, and twice what an operation adds onto."""
    regions = [Region.of(tensor) for _, tensor in operands(call)]
    if isinstance(call, Launch):
        return regions
    read, written = ({Region.of(tensor) for _, tensor in some} for some in call[1:])
    return [*regions, *(read & written)]


def operands(call: Call) -> list[tuple[str, Tensor]]:
    """A call's tensors by name, each once: an argument without use holds another's tensor."""
    if isinstance(call, Launch):
        named = zip(call.kernel.arg_names, call.arguments, strict=False)
        given = ((name, getattr(value, "base", value)) for name, value in named)
        tensors = [(name, value) for name, value in given if isinstance(value, Tensor)]
    else:
        tensors = [*call.read, *call.written]
    once: dict[Region, tuple[str, Tensor]] = {}
    for name, tensor in tensors:
        if tensor.numel():
            once.setdefault(Region.of(tensor), (name, tensor))
    return list(once.values())


# PyTorch's products, whose last operand is the second factor.
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_addmm_activation"}

# Of the kernels that multiply, from their arguments and constants; the others do little.
_FLOPS: Mapping[str, Callable[[Any], int]] = {
    "_pointer_kernel": lambda given: 2 * given.M * given.N * (given.K + given.R),
    "_descriptor_kernel": lambda given: 2 * given.M * given.N * (given.K + given.R),
    "_thin_kernel": lambda given: 2 * given.M * given.K * given.R,
    "_reduce_kernel": lambda given: 2 * given.M * given.N * given.R * (1 + given.WITH_P),
    "_activate_kernel": lambda given: 2 * given.M * given.N * given.R * given.WITH_P,
    "_activate_backward_kernel": lambda given: (
        2 * given.M * given.N * (2 * given.WIDTH + given.R * given.ADAPT_DOWN)
    ),
}


def kernel_name(launch: Launch) -> str:
    """As `lowrank_gemm` or `reduce: finish`: its file, and the kernel where it has another name."""
    function = launch.kernel.fn
    module = function.__module__.rpartition(".")[2]
    kernel = function.__name__.strip("_").removesuffix("_kernel").replace("_", " ")
    return module if kernel in (module, "pointer", "descriptor") else f"{module}: {kernel}"


def _launch_flops(launch: Launch) -> int:
    flops = _FLOPS.get(launch.kernel.fn.__name__)
    if flops is None:
        return 0
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    return flops(SimpleNamespace(**arguments, **launch.constants))


def seconds(predictions: Iterable[Prediction], ceilings: Ceilings) -> float:
    """One after the other."""
    return sum(one.seconds(ceilings) for one in predictions)
