"""What a layer keeps for its backward pass, and its peak on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in `run`, parameters left out.

    A storage saved twice, or through several views, counts once and whole; the input counts when
    it is saved. Exact on any device.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    storages: dict[int, int] = {}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
            saved.append(tensor)  # alive until counted: a freed address would be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that `run` holds on a GPU beyond what was held before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
