"""A bounded adapter as a plain LoRA adapter, exactly: ΔW has rank r, and so has LoRA's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbound.errors import InputError
from fastbound.layers.base import Adapted
from fastbound.models.adapted import adapted_layers
from fastbound.models.files import encoded, model_fields, unwrapped, write_adapter
from fastbound.models.names import exact_targets
from fastbound.truth.formula import wide_dtype


def export_lora(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` as a LoRA adapter that stock PEFT and LoRA servers load.

        ΔW = s·sin(ωB) sin(ωA):     lora_A = sin(ωA)     lora_B = sin(ωB)     lora_alpha / r = s

    so that lora_alpha is the layer's bound, in `alpha_pattern`. The sines are taken in fp64 and
    stored as fp32 (fp64 for fp64 factors). `model` is an injected model or a PEFT model with one
    active adapter. What is exported no longer has a bound: trained on, it is LoRA.

    Raises InputError when the model holds no adapted layer, more than one adapter is active, a
    factor is not finite, a layer hangs in the model under two names, or biases or whole modules
    were trained beside the adapter.
    """
    base: Any = unwrapped(model)
    if hasattr(base, "get_base_model"):  # a PeftModel, whose files name layers from the base on
        base = base.get_base_model()
    model = base
    layers = adapted_layers(model)
    _check_whole(model, layers.values())
    for name, layer in layers.items():
        if layer.adapter is None and layer.obstacle() is not None:
            raise InputError(
                f"{name} {layer.obstacle()}: export one adapter, active (set_adapter), enabled and "
                "not merged"
            )
    layers = {name: layer for name, layer in layers.items() if layer.adapter is not None}
    if not layers:
        raise InputError(f"{type(model).__name__} holds no bounded adapter: nothing to export")
    _check_shared(model, layers)
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": _sine(name, factor, layer)
        for name, layer in layers.items()
        for factor in "AB"
    }
    # The longest names first: PEFT takes the first pattern that a name ends in.
    ordered = sorted(layers, key=len, reverse=True)
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        **model_fields(model),
        "r": first.adapter.rank,
        "lora_alpha": _alpha(first),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": first.fan_in_fan_out,
        "inference_mode": True,
        "target_modules": exact_targets(model, layers),
        "rank_pattern": {name: layers[name].adapter.rank for name in ordered},
        "alpha_pattern": {name: _alpha(layers[name]) for name in ordered},
    }
    write_adapter(Path(folder), encoded(tensors), config)


def _check_whole(model: Any, layers: Iterable[Any]) -> None:
    """Raise where what PEFT trained is more than ΔW."""
    active = {name for layer in layers for name in getattr(layer, "active_adapters", ())}
    for name in active:
        for field in ("bias", "modules_to_save", "trainable_token_indices"):
            value = getattr(model.peft_config[name], field, None)
            if value not in (None, "none"):
                raise InputError(
                    f"{field}={value!r}: what was trained beside the adapter is not part of ΔW; "
                    "use merge_and_unload() and save the whole model"
                )


def _check_shared(model: nn.Module, layers: Mapping[str, Adapted]) -> None:
    """Raise for a layer under several names: PEFT's LoRA puts an adapter on the first alone."""
    held = {layer: name for name, layer in layers.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Adapted) and held.get(module, name) != name:
            raise InputError(
                f"{held[module]!r} is also {name!r}, one layer under two names, and PEFT's LoRA "
                "adapts the first alone: use fastbound.save_adapter, or merge and save the model"
            )


def _alpha(layer: Adapted) -> float:
    """LoRA's alpha, of which it makes the scaling alpha / r: the bound, scaled as ΔW is."""
    return float(layer.adapter.scaling * layer.adapter.rank)


def _sine(name: str, factor: str, layer: Adapted) -> Tensor:
    tensor: Tensor = getattr(layer.adapter, factor).detach()
    if not torch.isfinite(tensor).all():
        raise InputError(f"{factor} of {name} holds a NaN or an infinity: nothing is exported")
    sine = torch.sin(layer.adapter.omega * tensor.double())
    return sine.to(wide_dtype(tensor)).cpu().contiguous()
