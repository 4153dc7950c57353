"""Gradients of frozen weights, met as x and dy of each layer in a backward pass, never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbound.truth.linear_algebra import without_autocast

Loss = Callable[[nn.Module], Tensor | Iterable[Tensor]]


class Sum(Protocol):
    """What is kept of the gradient dyᵀ x of one layer over several backward passes."""

    def add(self, x: Tensor, dy: Tensor) -> None: ...


def pass_gradients(model: nn.Module, sums: Mapping[str, Sum], loss: Loss) -> None:
    """Add every gradient of `loss` to the sums of its layers; the model is left as it was.

    The passes run in evaluation mode with all weights frozen, and keep x of every named layer.

    Args:
        sums: by layer name; `add(x, dy)` is called once for each call of the layer, with x
            `[..., K]` and dy `[..., N]`.
        loss: called once with `model`; returns a loss, or yields several.

    Raises ValueError for a layer that receives no gradient.
    """
    with _frozen_and_evaluated(model), _watching(model, sums), torch.enable_grad():
        found = loss(model)
        for each in (found,) if isinstance(found, Tensor) else found:
            each.backward()


@contextmanager
def _watching(model: nn.Module, sums: Mapping[str, Sum]) -> Iterator[None]:
    """Within this context every backward pass through the layers adds to their sums."""

    def tracked(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        return (x if x.requires_grad else x.detach().requires_grad_(), *rest)

    def watch(name: str, added: Sum) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
            if not y.requires_grad:
                raise ValueError(
                    f"{name} receives no gradient from the loss: leave it out of those to adapt"
                )
            x = inputs[0].detach()

            def add(dy: Tensor) -> None:
                with without_autocast(dy.device):
                    added.add(x, dy)

            y.register_hook(add)

        return hook

    handles = []
    try:
        for name, added in sums.items():
            layer = model.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(tracked))
            handles.append(layer.register_forward_hook(watch(name, added)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen_and_evaluated(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    modes = {module: module.training for module in model.modules()}
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
