"""The two adapters a run can train, behind one interface: fastbound's and PEFT's plain LoRA."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

import fastbound
from fastbound.errors import InputError
from fastbound.files import whole_folder
from fastbound.layers.settings import adapter_settings
from fastbound.models.injection import layers_to_adapt
from fastbound.models.ranks import check_budget, check_ranks, even_rank
from fastbound.operator.partition import whole
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.model import quiet
from fastbound.unlearning.training.fila import fila_factors

LORA_RATE = 3e-3  # for lr="auto": the best of the stability maps, on a small and a real model
Ranks = int | Mapping[str, int]
Layers = Mapping[str, tuple[int, int]]  # [N, K] by name
Importance = Mapping[str, Tensor]  # see fila.fila_importance
_TRAINED, _START = "default", "start"  # PEFT's names of B A and of −B₀ A₀


class Delta(NamedTuple):
    """The largest |ΔW_ij| in any adapted layer, and the bound of that layer (None for LoRA).

    `in_use` is the root mean square of ΔW divided by the bound, averaged over the layers.
    """

    largest: float
    bound: float | None
    in_use: float | None


class Adapter(Protocol):
    """An adapted model: what to train, how far it has moved, and how to save it.

    `frozen` are parameters of its own that are not trained, by name: its start, if it has one.
    """

    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]: ...

    def delta(self) -> Delta: ...

    def save(self, folder: Path) -> None: ...

    def disabled(self) -> AbstractContextManager[object]: ...

    def frozen(self) -> dict[str, nn.Parameter]: ...


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

    def frozen(self) -> dict[str, nn.Parameter]:
        return {}


class _Lora:
    """PEFT's LoRA. From the start of FILA it adds B A − B₀ A₀, whose second term is frozen."""

    def __init__(
        self, model: nn.Module, config: UnlearnConfig, ranks: Ranks, importance: Importance | None
    ) -> None:
        from peft import LoraConfig, get_peft_model

        layers, _ = target_layers(model, config)
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
        self.starts = config.lora_start == "fila"
        with quiet():
            adapted: Any = get_peft_model(cast(Any, model), settings)
            if self.starts:
                adapted.add_adapter(_START, copy.copy(settings))
                adapted.base_model.set_adapter([_TRAINED, _START])
        self.model: nn.Module = adapted
        self._freeze()
        if importance is not None:
            self._put_start(importance)
        self.lr = LORA_RATE if config.lr == "auto" else config.lr

    def parameter_groups(self) -> list[dict[str, Any]]:
        return _one_group(self.model, self.lr)

    def frozen(self) -> dict[str, nn.Parameter]:
        """A₀ and −B₀."""
        return {n: p for n, p in self.model.named_parameters() if _factor(n, _START)}

    @torch.no_grad()
    def delta(self) -> Delta:
        largest = [self._delta_weight(layer).abs().amax() for layer in self._layers().values()]
        return Delta(float(torch.stack(largest).amax()), None, None)

    def save(self, folder: Path) -> None:
        """Save it for PEFT and the model as it was: from the start of FILA as a LoRA of rank 2r."""
        from peft.tuners.lora import LoraConfig

        model: Any = self.model
        kept: LoraConfig = model.peft_config[_TRAINED]
        state = None
        if self.starts:
            doubled = copy.copy(kept)
            doubled.r, doubled.lora_alpha = 2 * kept.r, 2 * kept.lora_alpha
            doubled.rank_pattern = {name: 2 * rank for name, rank in kept.rank_pattern.items()}
            model.peft_config[_TRAINED] = doubled
            state = _with_start(model.state_dict())
        try:
            with whole_folder(folder) as part:
                model.save_pretrained(part, selected_adapters=[_TRAINED], state_dict=state)
        finally:
            model.peft_config[_TRAINED] = kept

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        try:
            with cast(Any, self.model).disable_adapter():
                yield
        finally:
            self._freeze()

    def _freeze(self) -> None:
        """PEFT makes every active adapter trainable, and again each time that it is switched on."""
        for parameter in self.frozen().values():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def _put_start(self, importance: Importance) -> None:
        from peft.utils.integrations import dequantize_module_weight

        for name, layer in self._layers().items():
            base = layer.get_base_layer()
            weight = cast(Tensor, dequantize_module_weight(base))
            A, B = fila_factors(
                weight.t() if layer.fan_in_fan_out else weight,
                importance[name],
                layer.r[_TRAINED],
                layer.scaling[_TRAINED],
            )
            for adapter, sign in ((_TRAINED, 1), (_START, -1)):
                layer.lora_A[adapter].weight.copy_(A)
                layer.lora_B[adapter].weight.copy_(sign * B)

    def _delta_weight(self, layer: Any) -> Tensor:
        return cast(Tensor, sum(layer.get_delta_weight(name) for name in layer.active_adapters))

    def _layers(self) -> dict[str, Any]:
        """PEFT's layers by the names that they had before."""
        from peft.tuners.lora import LoraLayer

        inner = cast(Any, self.model).base_model.model
        return {name: m for name, m in inner.named_modules() if isinstance(m, LoraLayer)}


def _with_start(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which every trained factor holds the frozen one beside it."""
    joined = dict(state)
    for name, tensor in state.items():
        factor = _factor(name, _TRAINED)
        if factor is not None:
            frozen = state[name.removesuffix(f"{_TRAINED}.weight") + f"{_START}.weight"]
            joined[name] = torch.cat([tensor, frozen], dim=0 if factor == "A" else 1)
    return joined


def _factor(name: str, adapter: str) -> str | None:
    """Which factor of PEFT's adapter a parameter is: "A", "B" or none."""
    found = (each for each in "AB" if name.endswith(f".lora_{each}.{adapter}.weight"))
    return next(found, None)


def _one_group(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


def attach(
    model: nn.Module, config: UnlearnConfig, ranks: Ranks, importance: Importance | None = None
) -> Adapter:
    """Put a new adapter on `model` in place, draw A from torch's generator, and freeze the rest.

    Args:
        ranks: one rank for every layer, or ranks by name.
        importance: of each layer's rows, for lora_start "fila". Without it, the factors are those
            of another start and must be replaced, as those of a checkpoint are.

    Raises:
        InputError: `target_modules` names no layer of the model.
    """
    torch.manual_seed(config.seed)
    try:
        if config.adapter == "bounded":
            return _Bounded(model, config, ranks)
        return _Lora(model, config, ranks, importance)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def target_layers(
    model: nn.Module, config: UnlearnConfig, *, loaded: bool = True
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """As `layers_to_adapt`: [N, K] by name of what a run adapts, and why it skips other layers.

    Raises InputError where that raises TypeError or ValueError, and for a rank, a budget, an alpha
    or a bound that these layers cannot have.
    """
    try:
        layers, skipped = layers_to_adapt(model, config.target_modules, loaded=loaded)
        adapter_settings(1, config.alpha, config.bound, form=config.form, omega=config.omega)
        if config.rank == "auto":
            check_budget(config.rank_budget, layers)
        else:
            check_ranks(dict.fromkeys(layers, config.rank), layers)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    return layers, skipped
