"""The two adapters a run can train, behind one interface: fastbound's and PEFT's plain LoRA."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import nn

import fastbound
from fastbound.partition import whole
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.errors import InputError
from fastbound.unlearning.pretrained import quiet


class Delta(NamedTuple):
    """The largest |ΔW_ij| of all adapted layers, and that layer's own bound (None for LoRA)."""

    largest: float
    bound: float | None


class Adapter(Protocol):
    """An adapted model: what to train, how far it has moved, how to keep it."""

    model: nn.Module

    def delta(self) -> Delta: ...

    def save(self, folder: Path) -> None: ...

    def disabled(self) -> AbstractContextManager[object]: ...


class _Bounded:
    def __init__(self, model: nn.Module, config: UnlearnConfig) -> None:
        fastbound.inject(
            model,
            config.rank,
            alpha=config.alpha,
            bound=config.bound,
            target_modules=config.target_modules,
        )
        self.model = model

    @torch.no_grad()
    def delta(self) -> Delta:
        layers = [m for m in self.model.modules() if isinstance(m, fastbound.FusedBoundedLinear)]
        largest = torch.stack([whole(layer.delta_weight().abs().amax()) for layer in layers])
        index = int(largest.argmax())
        return Delta(float(largest[index]), layers[index].bound)

    def save(self, folder: Path) -> None:
        fastbound.save_adapter(self.model, folder)

    def disabled(self) -> AbstractContextManager[object]:
        return fastbound.disable_adapter(self.model)


class _Lora:
    def __init__(self, model: nn.Module, config: UnlearnConfig) -> None:
        from peft import LoraConfig, get_peft_model

        alpha = config.rank if config.alpha is None else config.alpha
        settings = LoraConfig(
            r=config.rank,
            lora_alpha=cast(int, alpha),  # any number will do: the slope is lora_alpha / r
            target_modules=list(target_names(model, config)),
            lora_dropout=0.0,
        )
        with quiet():
            self.model: nn.Module = get_peft_model(cast(Any, model), settings)

    @torch.no_grad()
    def delta(self) -> Delta:
        from peft.tuners.lora import LoraLayer

        layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        deltas = [cast(Any, layer).get_delta_weight("default") for layer in layers]
        return Delta(float(torch.stack([delta.abs().amax() for delta in deltas]).amax()), None)

    def save(self, folder: Path) -> None:
        cast(Any, self.model).save_pretrained(folder)

    def disabled(self) -> AbstractContextManager[object]:
        return cast("AbstractContextManager[object]", cast(Any, self.model).disable_adapter())


def attach(model: nn.Module, config: UnlearnConfig) -> Adapter:
    """Put a new adapter on `model`, in place, drawing A from torch's generator; freeze the rest.

    Raises:
        InputError: the model has no layer that `target_modules` names.
    """
    torch.manual_seed(config.seed)
    try:
        return _Bounded(model, config) if config.adapter == "bounded" else _Lora(model, config)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def target_names(model: nn.Module, config: UnlearnConfig) -> tuple[str, ...]:
    """Names of the layers that `fastbound.inject` adapts; the model is left as it was."""
    trained = [p for p in model.parameters() if p.requires_grad]
    names = fastbound.inject(
        model, 1, target_modules=config.target_modules, fuse_mlp=False
    ).replaced
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = cast(fastbound.FusedBoundedLinear, model.get_submodule(name))
        setattr(model.get_submodule(parent), child, layer.to_linear(merge=False))
    for parameter in trained:
        parameter.requires_grad_(True)
    return names
