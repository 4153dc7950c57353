"""RMU: losses over the hidden states of one layer, and capturing these during a pass."""

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
    the width as in its code. With `control_vector` as the target it scrambles the rows to forget;
    with the hidden states of the frozen model as the target it preserves the rows to retain.

    Args:
        hidden: `[rows, length, width]`, of one layer.
        target: the same shape, or a vector `[width]`.
        labels: int64 `[rows, length]`; a row without a label counts as 0.
    """
    if hidden.dtype != torch.float64:
        hidden, target = hidden.float(), target.float()
    answered = (labels != IGNORED).to(hidden.dtype)
    distance = (hidden - target).square().mean(-1)
    return ((distance * answered).sum(1) / answered.sum(1).clamp_min(1)).mean()


def control_vector(width: int, steering: float = 20.0, seed: int = 0) -> Tensor:
    """c · u, fp32 `[width]`: c is `steering`, u a normalised vector drawn from [0, 1)^width."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return drawn * (steering / drawn.norm())


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers that a model runs in sequence: its longest list of modules.

    Raises InputError for a model without one.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of layers (nn.ModuleList), from which rmu takes "
            "hidden states: use another loss"
        )
    return max(lists, key=len)


def layer_at(model: nn.Module, index: int | None) -> nn.Module:
    """The layer whose output RMU uses; None means a quarter of the way up, 7 of 32 as in the paper.

    Raises InputError for a layer that does not exist.
    """
    layers = decoder_layers(model)
    if index is None:
        index = max(0, len(layers) // 4 - 1)
    if index >= len(layers):
        raise InputError(
            f"rmu: no layer {index}: the model has {len(layers)}, numbered 0 to {len(layers) - 1}"
        )
    return layers[index]


@contextlib.contextmanager
def capturing(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the output `[rows, length, width]` of `layer` in each pass; None collects nothing."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hook = None if layer is None else layer.register_forward_hook(keep)
    try:
        yield found
    finally:
        if hook is not None:
            hook.remove()
