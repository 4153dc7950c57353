"""Adapters for open-unlearning's trainers: two handlers for its model registry.

`import fastbound.unlearning.open_unlearning`, in its `src/train.py`, registers `BoundedCausalLM`
and `LoraCausalLM`; its config then names one as `model_handler`: docs/open_unlearning.md.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastbound
from fastbound.models.adapted import injected_layers
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.training.adapters import target_layers

REGISTRY = "MODEL_REGISTRY"  # of open-unlearning's package `model`
ADAPTER = "adapter"  # beside the merged weights


class BoundedCausalLM:
    """A causal language model with bounded adapters, as open-unlearning loads a model."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        rank: int = 8,
        alpha: float | None = None,
        bound: float | str | None = "auto",
        target_modules: str | Iterable[str] = "mlp",
        **kwargs: Any,
    ) -> nn.Module:
        """The model of transformers with its weights frozen; only A and B are trained.

        `save_pretrained` of it writes the merged weights under their own names, which every code
        loads, and the adapter into a folder `adapter` beside them.

        Args:
            rank, alpha, bound, target_modules: as in `fastbound.inject`.
            kwargs: for transformers' own `from_pretrained`.

        Raises:
            ValueError: the model has no layer of that name, or a number is out of range.
        """
        model = _load(pretrained_model_name_or_path, kwargs)
        fastbound.inject(
            model, rank, alpha=alpha, bound=bound, target_modules=_names(target_modules)
        )
        return _ready(model)


class LoraCausalLM:
    """A causal language model with PEFT's LoRA, as open-unlearning loads a model."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | Iterable[str] = "mlp",
        **kwargs: Any,
    ) -> nn.Module:
        """As `BoundedCausalLM`, with LoRA of slope alpha / rank (None: 1) on the same layers.

        The model keeps its class and the names of its modules, as regular expressions of trainers
        expect; no adapter is written beside the merged weights.
        """
        from peft import LoraConfig, inject_adapter_in_model

        model = _load(pretrained_model_name_or_path, kwargs)
        layers = target_layers(model, UnlearnConfig(target_modules=_names(target_modules)))
        settings = LoraConfig(
            r=rank,
            lora_alpha=cast(int, rank if alpha is None else alpha),
            lora_dropout=dropout,
            target_modules=list(layers),
        )
        inject_adapter_in_model(settings, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        return _ready(model)


HANDLERS = (BoundedCausalLM, LoraCausalLM)


def register(registry: MutableMapping[str, Any]) -> None:
    """Put both handlers into open-unlearning's `MODEL_REGISTRY`, by the names of their classes."""
    registry.update({handler.__name__: handler for handler in HANDLERS})


def merged_state(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state of `model` without its adapters, W + ΔW in their place, by the base's own names.

    ΔW is added in fp32 and rounded once.

    Args:
        model: with bounded adapters (`fastbound.inject`) or LoRA layers.
        state_dict: whole tensors where the model's own are spread over processes.

    Raises ValueError for a factor or a sum that is not finite.
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    merged = {name: _bounded_sum(layer, name, state) for name, layer in _bounded(model).items()}
    merged.update({name: _lora_sum(layer, name, state) for name, layer in _lora(model).items()})
    plain = {}
    for key, tensor in state.items():
        owner = next((n for n in _parents(key) if n in merged), None)
        if owner is None:
            plain[key] = tensor
            continue
        rest = key.removeprefix(f"{owner}.").removeprefix("base_layer.")
        if rest in ("weight", "bias"):
            plain[f"{owner}.{rest}"] = merged[owner] if rest == "weight" else tensor
    return plain


class _SavesMerged:
    """Mixed into the class of a loaded model: what it saves is a plain model."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' own, of the merged weights; bounded factors go into `adapter` as well."""
        model = cast(nn.Module, self)
        if state_dict is None and is_main_process and _bounded(model):
            fastbound.save_adapter(model, Path(save_directory) / ADAPTER)
        return super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process, merged_state(model, state_dict), *args, **kwargs
        )


def _load(name: str, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = kwargs.pop("torch_dtype", None)  # transformers calls it dtype now
    if dtype is not None:
        kwargs.setdefault("dtype", dtype)
    trusted = kwargs.pop("trust_remote_code", False)
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trusted, **kwargs)


def _names(target_modules: str | Iterable[str]) -> str | tuple[str, ...]:
    """Also of a list of OmegaConf, which is no list."""
    return target_modules if isinstance(target_modules, str) else tuple(map(str, target_modules))


def _ready(model: Any) -> nn.Module:
    """Gradients reach the adapters under checkpointing, and saving merges."""
    model.enable_input_require_grads()
    kind = type(model)
    # The name stays: transformers writes it into config.json and chooses the loss by it.
    model.__class__ = type(kind.__name__, (_SavesMerged, kind), {"__module__": kind.__module__})
    return cast(nn.Module, model)


def _bounded(model: nn.Module) -> dict[str, Any]:
    return dict(injected_layers(model))


def _lora(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def _bounded_sum(layer: Any, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """By the layer's own rule, over the tensors of `state`."""
    holder, adapter = copy.copy(layer), copy.copy(layer.adapter)
    vars(holder)["_parameters"] = {
        key: None if tensor is None else nn.Parameter(state[f"{name}.{key}"], requires_grad=False)
        for key, tensor in layer._parameters.items()
    }
    vars(adapter)["_parameters"] = {
        key: nn.Parameter(state[f"{name}.adapter.{key}"], requires_grad=False) for key in "AB"
    }
    vars(holder)["_modules"] = {**layer._modules, "adapter": adapter}
    return cast(Tensor, holder.to_linear(merge=True).weight.data)


@torch.no_grad()
def _lora_sum(layer: Any, name: str, state: Mapping[str, Tensor]) -> Tensor:
    (adapter,) = layer.active_adapters
    A, B = (state[f"{name}.lora_{factor}.{adapter}.weight"].float() for factor in "AB")
    delta = (B @ A) * layer.scaling[adapter]
    weight = state[f"{name}.base_layer.weight"]
    total = (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
    if not total.isfinite().all():
        raise ValueError(f"{name!r} cannot be merged: W + ΔW is not finite in {weight.dtype}")
    return total


def _parents(key: str) -> Iterable[str]:
    """Every module that a tensor of a state dict can lie in, the innermost first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _register_where_it_runs() -> None:
    """Into the registry of the open-unlearning that this process runs in, if it is one."""
    module = sys.modules.get("model")
    if module is None:
        found = importlib.util.find_spec("model")
        origin = None if found is None else found.origin
        if origin is None or REGISTRY not in Path(origin).read_text(errors="replace"):
            return
        module = importlib.import_module("model")
    if hasattr(module, REGISTRY):
        register(getattr(module, REGISTRY))


_register_where_it_runs()
