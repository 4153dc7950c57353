"""The two adapters a run can train, behind one interface: fastbound's and PEFT's plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import nn

import fastbound
from fastbound.errors import InputError
from fastbound.files import whole_folder
from fastbound.layers.settings import adapter_settings
from fastbound.models.injection import layers_to_adapt
from fastbound.models.ranks import check_ranks, even_rank
from fastbound.operator.partition import whole
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.model import quiet

LORA_RATE = 3e-3  # for lr="auto": the best of the stability maps, on a small and a real model
Ranks = int | Mapping[str, int]


class Delta(NamedTuple):
    """The largest |ΔW_ij| in any adapted layer, and the bound of that layer (None for LoRA).

    `in_use` is the root mean square of ΔW divided by the bound, averaged over the layers.
    """

    largest: float
    bound: float | None
    in_use: float | None


class Adapter(Protocol):
    """An adapted model: what to train, how far it has moved, and how to save it."""

    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]: ...

    def delta(self) -> Delta: ...

    def save(self, folder: Path) -> None: ...

    def disabled(self) -> AbstractContextManager[object]: ...


class _Bounded:
    def __init__(self, model: nn.Module, config: UnlearnConfig, ranks: Ranks) -> None:
        fastbound.inject(
            model,
            ranks,
            alpha=config.alpha,
            bound=config.bound,
            form=config.form,
            omega=config.omega,
            target_modules=config.target_modules,
        )
        self.model = model
        self.lr = config.lr

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.lr == "auto":
            return fastbound.parameter_groups(self.model)
        return _one_group(self.model, self.lr)

    @torch.no_grad()
    def delta(self) -> Delta:
        layers = [m for m in self.model.modules() if isinstance(m, fastbound.FusedBoundedLinear)]
        largest = torch.stack([whole(layer.delta_weight().abs().amax()) for layer in layers])
        index = int(largest.argmax())
        used = [layer.adapter.bound_in_use() for layer in layers]
        return Delta(float(largest[index]), layers[index].bound, sum(used) / len(used))

    def save(self, folder: Path) -> None:
        fastbound.save_adapter(self.model, folder)

    def disabled(self) -> AbstractContextManager[object]:
        return fastbound.disable_adapter(self.model)


class _Lora:
    def __init__(self, model: nn.Module, config: UnlearnConfig, ranks: Ranks) -> None:
        from peft import LoraConfig, get_peft_model

        layers = target_layers(model, config)
        check_ranks(dict.fromkeys(layers, ranks) if isinstance(ranks, int) else ranks, layers)
        rank = ranks if isinstance(ranks, int) else even_rank(ranks, layers)
        alpha = rank if config.alpha is None else config.alpha
        settings = LoraConfig(
            r=round(rank),
            lora_alpha=cast(int, alpha),  # any number works: the slope is lora_alpha / r
            target_modules=list(layers),
            lora_dropout=0.0,
            rank_pattern={} if isinstance(ranks, int) else dict(ranks),
        )
        with quiet():
            self.model: nn.Module = get_peft_model(cast(Any, model), settings)
        self.lr = LORA_RATE if config.lr == "auto" else config.lr

    def parameter_groups(self) -> list[dict[str, Any]]:
        return _one_group(self.model, self.lr)

    @torch.no_grad()
    def delta(self) -> Delta:
        from peft.tuners.lora import LoraLayer

        layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        deltas = [cast(Any, layer).get_delta_weight("default") for layer in layers]
        return Delta(
            float(torch.stack([delta.abs().amax() for delta in deltas]).amax()), None, None
        )

    def save(self, folder: Path) -> None:
        with whole_folder(folder) as part:
            cast(Any, self.model).save_pretrained(part)

    def disabled(self) -> AbstractContextManager[object]:
        return cast("AbstractContextManager[object]", cast(Any, self.model).disable_adapter())


def _one_group(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


def attach(model: nn.Module, config: UnlearnConfig, ranks: Ranks) -> Adapter:
    """Put a new adapter on `model` in place, draw A from torch's generator, and freeze the rest.

    Args:
        ranks: one rank for every layer, or ranks by name.

    Raises:
        InputError: `target_modules` names no layer of the model.
    """
    torch.manual_seed(config.seed)
    try:
        adapter_settings(1, config.alpha, config.bound, form=config.form, omega=config.omega)
        kind = _Bounded if config.adapter == "bounded" else _Lora
        return kind(model, config, ranks)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def target_layers(
    model: nn.Module, config: UnlearnConfig, *, loaded: bool = True
) -> dict[str, tuple[int, int]]:
    """Names and [N, K] of the layers that a run adapts; see `layers_to_adapt`, which may raise."""
    return layers_to_adapt(model, config.target_modules, loaded=loaded)[0]
