"""Predicted times: each recorded call's operations and bytes divided by a device's ceilings.

A call takes as long as the slower of its operations at the compute ceiling and its bytes at the
bandwidth ceiling. Calls follow one another without overlap, and the cost of a launch on the host is
left out. Each distinct tensor of a call moves once, however small, and a tensor that an operation
adds onto is read too: this is the least that the call must do. `benchmarks/NOTES.md` compares
predictions with outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from fastbound.kernels.launch import Launch
from fastbound.kernels.tiles import Tile
from fastbound.kernels.waves import Cut
from fastbound.performance.recorder import Call

BF16, FP32 = 2, 4  # bytes per element of an operand and of a workspace
RANK = 16


@dataclass(frozen=True)
class Ceilings:
    """A device's ceilings: operations per second in a large GEMM, and bytes per second."""

    flops: float
    bandwidth: float


# From the vendors' datasheets, dense bf16: no measurement exceeds them. A measured pair is better.
DATASHEET: Mapping[str, Ceilings] = {
    "a100-80gb": Ceilings(312e12, 2.039e12),
    "h100": Ceilings(989e12, 3.35e12),
    "h200": Ceilings(989e12, 4.8e12),
    "b200": Ceilings(2250e12, 8.0e12),
    "3090": Ceilings(71e12, 0.936e12),
    "4090": Ceilings(165e12, 1.008e12),
    "5090": Ceilings(209e12, 1.792e12),
    "mi250": Ceilings(181e12, 1.6e12),  # one of its two halves, each of which is a device
    "mi300x": Ceilings(1307e12, 5.3e12),
    "7900": Ceilings(123e12, 0.96e12),
}


def datasheet_of(gpu: str) -> Ceilings:
    """The ceilings of the card in a device's name; for any other card, those of an H100."""
    found = [c for key, c in DATASHEET.items() if key.split("-")[0] in gpu.lower()]
    return found[0] if found else DATASHEET["h100"]


class Region(NamedTuple):
    """A tensor's memory, meta or real; equal for all views of the whole tensor, as W and W.t()."""

    storage: int
    offset: int
    elements: int
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> Region:
        """The region of a tensor, valid while it lives; an expanded dimension has one element."""
        distinct = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            distinct *= size if stride else min(size, 1)
        storage = tensor.untyped_storage()._cdata
        return cls(storage, int(tensor.storage_offset()), distinct, tensor.element_size())

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize


class Prediction(NamedTuple):
    """One call's name, with the sizes of its first two operands, its operations and its bytes."""

    name: str
    flops: int
    nbytes: int

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.flops, self.nbytes / ceilings.bandwidth)

    def bound_by(self, ceilings: Ceilings) -> str:
        by_compute = self.flops / ceilings.flops > self.nbytes / ceilings.bandwidth
        return "compute" if by_compute else "memory"


def prediction_of(call: Call) -> Prediction:
    """The prediction for a kernel launch or a PyTorch operation over real or meta tensors."""
    if isinstance(call, Launch):
        name, flops = kernel_name(call), _launch_flops(call)
    else:
        name, flops = call.name, 0
        if name in PRODUCTS:
            flops = 2 * call.written[0][1].numel() * call.read[-1][1].shape[-2]
    sizes = " ".join(str(list(tensor.shape)) for _, tensor in operands(call)[:2])
    return Prediction(f"{name} {sizes}", flops, sum(region.nbytes for region in moved(call)))


def moved(call: Call) -> list[Region]:
    """The regions that a call moves: each tensor once, and twice those an operation adds onto."""
    regions = [Region.of(tensor) for _, tensor in operands(call)]
    if isinstance(call, Launch):
        return regions
    read, written = ({Region.of(tensor) for _, tensor in some} for some in call[1:])
    return [*regions, *(read & written)]


def operands(call: Call) -> list[tuple[str, Tensor]]:
    """A call's distinct tensors by name; an unused argument repeats another argument's tensor."""
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

# The kernels that multiply, from their arguments and constants; the others compute little.
_FLOPS: Mapping[str, Callable[[Any], int]] = {
    "_pointer_kernel": lambda given: 2 * given.M * given.N * (given.K + given.R),
    "_descriptor_kernel": lambda given: 2 * given.M * given.N * (given.K + given.R),
    "_thin_kernel": lambda given: 2 * given.M * given.K * given.R,
    "_reduce_kernel": lambda given: 2 * given.M * given.N * given.R * (1 + given.WITH_P),
    "_activate_kernel": lambda given: 2 * given.M * given.N * given.R * given.WITH_P,
    # These two include the angle B A, although no matrix unit computes it; sines are not counted.
    "_adapt_kernel": lambda given: 2 * given.N * given.K * given.rank,
    "_contract_kernel": lambda given: 6 * given.N * given.K * given.rank,
    "_activate_backward_kernel": lambda given: (
        2 * given.M * given.N * (2 * given.WIDTH + given.R * given.ADAPT_DOWN)
    ),
}


def kernel_name(launch: Launch) -> str:
    """The kernel's file, and its own name if that differs: `lowrank_gemm` or `reduce: finish`."""
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
    """The total seconds of calls that follow one another."""
    return sum(one.seconds(ceilings) for one in predictions)


def share_busy(cut: Cut, M: int, N: int, tile: Tile, slots: int) -> float:
    """The share, 0 to 1, of a GPU's program slots that are busy during a launch over M x N.

    The rest is the launch's tail: the last wave's empty slots and the last chunk's missing rows.
    """
    steps = -(-M // tile.block_m) * -(-N // tile.block_n)
    longest = cut.span * -(-cut.chunk // tile.block_m)
    return steps / (-(-cut.programs // slots) * longest * slots)
