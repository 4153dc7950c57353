"""Linear algebra whose result depends on neither autocast nor the caller's random state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the operands' own dtypes, although the caller may have switched autocast on."""
    # Autocast does not support the meta device.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@torch.no_grad()
def largest_singular(
    matrix: Tensor, count: int, *, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, count], the `count` largest singular values [count] and V [K, count] of `matrix`.

    Subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) by `torch.svd_lowrank`:
    approximate, and exact if `count` is the smaller side. Its random start is always the same, and
    no generator moves: `torch.manual_seed` would seed those of all devices.
    """
    on_gpu = matrix.is_cuda
    with torch.random.fork_rng([matrix.device] if on_gpu else []), without_autocast(matrix.device):
        if on_gpu:
            torch.cuda.default_generators[matrix.device.index].manual_seed(0)
        else:
            torch.default_generator.manual_seed(0)
        U, values, V = torch.svd_lowrank(matrix, q=count, niter=iterations)
    return U, values, V
