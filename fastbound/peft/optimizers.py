"""PEFT's optimizers that recognise A and B by LoRA's names: LoRA+ is adapted, LoRA-FA refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastbound.layers.adapter import BoundedAdapter


def correct_optimizers() -> None:
    """Once `peft.optimizers` is imported, replace its functions by those below."""
    package: Any = sys.modules["peft.optimizers"]
    for name, around in (
        ("create_loraplus_optimizer", _with_B_apart),
        ("create_lorafa_optimizer", _refused),
    ):
        theirs = getattr(package, name)
        if not hasattr(theirs, "__wrapped__"):
            ours = functools.wraps(theirs)(functools.partial(around, theirs))
            setattr(package, name, ours)
            setattr(sys.modules[theirs.__module__], name, ours)


def _with_B_apart(
    theirs: Callable[..., Optimizer], model: nn.Module, *args: Any, **kwargs: Any
) -> Optimizer:
    """LoRA+ with every B in the group of the higher learning rate, as for LoRA's B."""
    optimizer = theirs(model, *args, **kwargs)
    factors = {adapter.B for adapter in _adapters(model)}
    # In PEFT's order: A, embeddings, B, and B without weight decay.
    first, _, third, _ = optimizer.param_groups
    third["params"] = third["params"] + [p for p in first["params"] if p in factors]
    first["params"] = [p for p in first["params"] if p not in factors]
    return optimizer


def _refused(
    theirs: Callable[..., Optimizer], model: nn.Module, *args: Any, **kwargs: Any
) -> Optimizer:
    if _adapters(model):
        raise ValueError(
            "create_lorafa_optimizer corrects the gradient of LoRA's B for a frozen A, which does "
            "not hold for sin(ωB): use another optimizer for bounded adapters"
        )
    return theirs(model, *args, **kwargs)


def _adapters(model: nn.Module) -> list[BoundedAdapter]:
    return [module for module in model.modules() if isinstance(module, BoundedAdapter)]
