"""The bytes that a layer saves for its backward pass, and its peak on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """The bytes of the distinct storages that autograd saves in `run`, without `parameters`.

    A storage saved twice, or through several views, counts once, in full. The input counts if it is
    saved. The result is exact on any device.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    storages: dict[int, int] = {}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
            saved.append(tensor)  # kept alive until counted, as a freed address would be reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that `run` allocates on a GPU beyond those allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
