"""Export of a bounded adapter as a plain LoRA adapter, exactly if ΔW has rank r as in LoRA."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbound.errors import InputError
from fastbound.layers.base import Adapted
from fastbound.models.adapted import adapted_layers, other_adapters
from fastbound.models.files import encoded, model_fields, unwrapped, write_adapter
from fastbound.models.names import exact_targets, without_shells
from fastbound.truth.formula import wide_dtype
from fastbound.truth.linear_algebra import largest_singular, without_autocast

_EXACT = 1024  # a full decomposition takes seconds if the smaller side is at most this
_OVERSAMPLING, _ITERATIONS = 16, 8  # of the randomised decomposition of larger ones


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote; print it or read its fields.

    ``errors`` has ‖ΔW - BA‖_F / ‖ΔW‖_F of each layer by name; it is 0 if LoRA equals ΔW exactly.
    """

    folder: str
    ranks: Mapping[str, int]
    errors: Mapping[str, float]

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        worst = max(self.errors, key=lambda name: self.errors[name])
        error = self.errors[worst]
        said = f"error at most {error:.1%} of ΔW (in {worst})" if error else "exactly ΔW"
        return f"wrote {len(self.ranks)} layers as LoRA of {rank} to {self.folder}: {said}"


def export_lora(
    model: nn.Module, folder: str | os.PathLike[str], *, rank: int | None = None
) -> LoraExport:
    """Write the adapter of `model` as a LoRA adapter that stock PEFT and LoRA servers load.

        ΔW = s·sin(ωB) sin(ωA):     lora_A = sin(ωA)     lora_B = s·sin(ωB)     lora_alpha = r

    The factors are computed in fp64 and stored as fp32 (fp64 for fp64 factors). All layers get the
    same r, that of the largest, by rows and columns of zeros, so that nothing depends on
    `rank_pattern` and `alpha_pattern`, which vLLM and llama.cpp ignore. `model` is an injected
    model or a PEFT model with one active adapter. The exported adapter no longer has a bound:
    further training trains it as LoRA.

    ΔW of the form "product" has full rank, so that no LoRA of rank r equals it. With ``rank`` the
    nearest LoRA of that rank is written instead, for either form: the largest singular values of ΔW
    and their vectors (Eckart and Young 1936; if N and K are both above 1024 by a randomised
    decomposition). The returned report has the relative error of each layer.

    Raises InputError for an adapter of the form "product" without ``rank``; for a rank below 1 or
    above a layer's smaller side; and if the model holds no adapted layer, more than one adapter is
    active, an adapter of another method is active beside it, a factor is not finite, the model
    holds a layer under two names, or biases or whole modules were trained beside the adapter.
    """
    model = unwrapped(model)
    layers = adapted_layers(model)
    _check_whole(model, layers.values())
    for name, other in other_adapters(model).items():
        if (
            other.disable_adapters
            or not set(other.active_adapters) & other._get_available_adapters()
        ):
            continue
        raise InputError(
            f"{name} holds an adapter of another method, which is not part of ΔW: merge that "
            "one first, or merge both and save the whole model"
        )
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
    layers = {without_shells(name): layer for name, layer in layers.items()}
    made = {name: _lora_of(name, layer, rank) for name, layer in layers.items()}
    ranks = {name: lora.A.shape[0] for name, lora in made.items()}
    r = max(ranks.values())
    tensors = {}
    for name, lora in made.items():
        missing = r - ranks[name]
        key = f"base_model.model.{name}.lora_{{}}.weight"
        tensors[key.format("A")] = nn.functional.pad(lora.A, (0, 0, 0, missing))
        tensors[key.format("B")] = nn.functional.pad(lora.B, (0, missing))
    config = {
        "peft_type": "LORA",
        **model_fields(model),
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": next(iter(layers.values())).fan_in_fan_out,
        "inference_mode": True,
        "target_modules": exact_targets(model, layers),
    }
    write_adapter(Path(folder), encoded(tensors), config)
    return LoraExport(str(folder), ranks, {name: lora.error for name, lora in made.items()})


def _check_whole(model: Any, layers: Iterable[Any]) -> None:
    """Raise if PEFT trained more than ΔW."""
    active = {name for layer in layers for name in getattr(layer, "active_adapters", ())}
    for name in active:
        for field in ("bias", "modules_to_save", "trainable_token_indices"):
            value = getattr(model.peft_config[name], field, None)
            if value not in (None, "none"):
                raise InputError(
                    f"{field}={value!r}: what was trained beside the adapter is not part of ΔW; "
                    "call merge_and_unload() and save the whole model"
                )


def _check_shared(model: nn.Module, layers: Mapping[str, Adapted]) -> None:
    """Raise for a layer under several names: PEFT's LoRA adapts only the first of them."""
    held = {layer: name for name, layer in layers.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Adapted) and held.get(module, name) != name:
            raise InputError(
                f"{held[module]!r} is also {name!r}, one layer under two names, and PEFT's LoRA "
                "adapts only the first: use fastbound.save_adapter, or merge and save the model"
            )


class _Lora(NamedTuple):
    """LoRA's A [r, K] and B [N, r], with ΔW = B A, and the relative error of that."""

    A: Tensor
    B: Tensor
    error: float = 0.0


def _lora_of(name: str, layer: Adapted, rank: int | None) -> _Lora:
    adapter = layer.adapter
    for factor in "AB":
        if not torch.isfinite(getattr(adapter, factor)).all():
            raise InputError(f"{factor} of {name} holds a NaN or an infinity: nothing is exported")
    if rank is not None:
        return _nearest(name, adapter.delta_weight().detach(), rank)
    if adapter.form == "product":
        raise InputError(
            f'{name} has form="product", whose ΔW = s·sin(ω·B A) has full rank: no LoRA is equal '
            "to it. Give rank= for the nearest LoRA of that rank, or merge and save the model"
        )
    A, B = (
        (s * torch.sin(adapter.omega * f.detach().double())).to(wide_dtype(f)).cpu().contiguous()
        for f, s in ((adapter.A, 1.0), (adapter.B, adapter.scaling))
    )
    return _Lora(A, B)


def _nearest(name: str, delta: Tensor, rank: int) -> _Lora:
    """The LoRA of that rank with the least ‖ΔW - BA‖_F."""
    least = min(delta.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= least:
        raise InputError(
            f"rank must be a number from 1 to {least}, the smaller side of {name}, got {rank!r}"
        )
    if least <= _EXACT:
        U, values, V = torch.linalg.svd(delta, full_matrices=False)
        V = V.t()
    else:
        most = min(least, rank + _OVERSAMPLING)
        U, values, V = largest_singular(delta, most, iterations=_ITERATIONS)
    root = values[:rank].sqrt()
    A, B = (root[:, None] * V[:, :rank].t()), U[:, :rank] * root
    whole = float(torch.linalg.vector_norm(delta))
    with without_autocast(delta.device):
        error = float(torch.linalg.vector_norm(delta - B @ A)) / whole if whole else 0.0
    return _Lora(A.cpu().contiguous(), B.cpu().contiguous(), error)
