"""RMU: losses over the hidden states of one layer, and how these are taken from a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastbound.errors import InputError
from fastbound.unlearning.data.encoding import IGNORED


def rmu(hidden: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows of the mean over answer tokens of `mean_d (h − target)²`.

    Li et al. 2024, "The WMDP benchmark", arXiv 2403.03218, section 4, with the squared norm over
    the width as in its code. Towards `control_vector` it scrambles the rows to forget; towards the
    hidden states of the frozen model it keeps those to retain.

    Args:
        hidden: `[rows, length, width]`, of one layer.
        target: of the same shape, or a vector `[width]`.
        labels: int64 `[rows, length]`; a row without a label counts as 0.
    """
    if hidden.dtype != torch.float64:
        hidden, target = hidden.float(), target.float()
    answered = (labels != IGNORED).to(hidden.dtype)
    distance = (hidden - target).square().mean(-1)
    return ((distance * answered).sum(1) / answered.sum(1).clamp_min(1)).mean()


def control_vector(width: int, steering: float = 20.0, seed: int = 0) -> Tensor:
    """c · u: u a unit vector of entries drawn from [0, 1), fp32 `[width]`, c the `steering`."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return drawn * (steering / drawn.norm())


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers that a model runs one after the other: its longest list of modules.

    Raises InputError for a model without one.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of layers (nn.ModuleList), which rmu takes hidden "
            "states from: take another loss"
        )
    return max(lists, key=len)


def layer_at(model: nn.Module, index: int | None) -> nn.Module:
    """The layer whose output RMU takes; None: a quarter of the way up, 7 of 32 as in the paper.

    Raises InputError for one that is not there.
    """
    layers = decoder_layers(model)
    if index is None:
        index = max(0, len(layers) // 4 - 1)
    if index >= len(layers):
        raise InputError(
            f"rmu: layer {index} is not there: the model has {len(layers)}, 0 to {len(layers) - 1}"
        )
    return layers[index]


@contextlib.contextmanager
def capturing(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """What `layer` gives in each pass of the block, `[rows, length, width]`; None: nothing."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hook = None if layer is None else layer.register_forward_hook(keep)
    try:
        yield found
    finally:
        if hook is not None:
            hook.remove()
