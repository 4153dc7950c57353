"""save_adapter and load_adapter: write a model's factors and bounds to files, and read them."""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbound.errors import InputError
from fastbound.layers.base import features
from fastbound.layers.conversion import convert, refusal
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.models.adapted import adapted_layers, fuse, injected_layers
from fastbound.models.files import (
    DISAGREE,
    FORMAT_VERSIONS,
    PEFT_TYPE,
    SavedLayer,
    encoded,
    model_fields,
    read_adapter,
    tensor_key,
    unwrapped,
    write_adapter,
)
from fastbound.models.names import check_same_names, exact_targets, some, without_shells
from fastbound.models.report import InjectionReport, injection_report
from fastbound.operator.partition import is_dtensor, like, whole
from fastbound.version import __version__


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write A, B, alpha and bound of every `FusedBoundedLinear` of `model` to `folder`.

    `adapter_model.safetensors` holds `base_model.model.<layer>.fastbound_ab.A` [r, K] and `.B`
    [N, r] bit for bit, in their own dtype; a layer that the model holds under several names is
    written once. `adapter_config.json` holds each layer's rank, alpha and bound as numbers, so that
    `bound="auto"` is restored as the value that it had, whatever the base model then is. PEFT loads
    the folder, too (`PeftModel.from_pretrained`), if fastbound is imported.

    The folder is created if it does not exist, and files of an earlier save are replaced
    atomically. If the model is sharded by FSDP2, the factors are gathered: all processes must call
    this, the first one writes, and the files exist when it returns.

    Raises InputError if the model holds no such layer, holds adapters of PEFT or layers of both
    forms, if a factor is not finite, or if a factor is sharded in another way.
    """
    model = unwrapped(model)
    layers = injected_layers(model)
    if len(adapted_layers(model)) > len(layers):
        raise InputError("the model holds PEFT adapters: use model.save_pretrained(folder)")
    if not layers:
        raise InputError(f"{type(model).__name__} holds no FusedBoundedLinear: nothing to save")
    data, config = adapter_files(model, layers)
    sharded = any(is_dtensor(layer.adapter.A) for layer in layers.values())
    if not sharded or torch.distributed.get_rank() == 0:
        write_adapter(Path(folder), data, config)
    if sharded:
        torch.distributed.barrier()


def adapter_files(
    model: nn.Module,
    layers: Mapping[str, FusedBoundedLinear],
    state_dict: Mapping[str, Tensor] | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """The contents of both files; the factors come from a full ``state_dict`` if one is given."""
    tensors = {
        tensor_key(without_shells(name), factor): _whole(name, factor, layer, state_dict)
        for name, layer in layers.items()
        for factor in "AB"
    }
    data = encoded(tensors)
    layers = {without_shells(name): layer for name, layer in layers.items()}
    form = _form(layers)
    config = {
        "peft_type": PEFT_TYPE,
        **model_fields(model),
        "format_version": FORMAT_VERSIONS[form],
        "fastbound_version": __version__,
        "form": form,
        "r": statistics.mode(layer.rank for layer in layers.values()),
        "alpha": statistics.mode(layer.alpha for layer in layers.values()),
        "bound": statistics.mode(layer.bound for layer in layers.values()),
        "dropout": statistics.mode(layer.adapter.dropout for layer in layers.values()),
        "target_modules": exact_targets(model, layers),
        "rank_pattern": {name: layer.rank for name, layer in layers.items()},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items()},
        "bound_pattern": {name: layer.bound for name, layer in layers.items()},
        "shapes": {n: [layer.out_features, layer.in_features] for n, layer in layers.items()},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    return data, config


def _form(layers: Mapping[str, FusedBoundedLinear]) -> str:
    first, one = next(iter(layers.items()))
    for name, layer in layers.items():
        if layer.form != one.form:
            raise InputError(
                f"{first} has form={one.form!r} and {name} has form={layer.form!r}: a folder "
                "can only hold adapters of one form"
            )
    return one.form


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, fuse_mlp: bool = True
) -> InjectionReport:
    """Load an adapter, written by `save_adapter` or a PEFT model's `save_pretrained`, into `model`.

    In a plain model exactly the saved layers are replaced, as by `inject`, and everything else is
    frozen; `fuse_mlp` has the same meaning as there. An injected model must hold the same layers
    with the same rank and dtype; its A, B, alpha and bound are overwritten. The model is changed in
    place, and everything is checked before anything is changed.

    Returns the same report as `inject`.

    Raises:
        NotThereError: one of the two files does not exist. It is both a FileNotFoundError and an
            InputError.
        InputError: the files are damaged or do not belong together, contain a NaN or an infinity,
            have another method or format version, or are for another model, shape, rank or dtype;
            or `model` holds PEFT adapters, which PEFT loads itself.
    """
    model = unwrapped(model)
    if len(adapted_layers(model)) > len(injected_layers(model)):
        raise InputError("the model holds PEFT adapters: use model.load_adapter(folder, name)")
    saved = read_adapter(Path(folder))
    shells = {without_shells(n): n for n, _ in model.named_modules(remove_duplicate=False)}
    saved = {shells.get(without_shells(name), name): entry for name, entry in saved.items()}
    layers = injected_layers(model)
    if layers:
        _check_injected(layers, saved)
    else:
        _check_plain(model, saved)
        convert(model, {name: entry.settings for name, entry in saved.items()})
        if fuse_mlp:
            fuse(model)
        layers = injected_layers(model)
    with torch.no_grad():
        for name, entry in saved.items():
            adapter = layers[name].adapter
            adapter.A.copy_(like(entry.A, adapter.A))
            adapter.B.copy_(like(entry.B, adapter.B))
            adapter.alpha, adapter.bound = entry.settings.alpha, float(entry.settings.bound)
    return injection_report(model)


def _check_injected(layers: dict[str, FusedBoundedLinear], saved: dict[str, SavedLayer]) -> None:
    check_same_names(f"the model: layers {DISAGREE}", layers, saved)
    for name, entry in saved.items():
        adapter = layers[name].adapter
        if adapter.form != entry.settings.form:
            raise InputError(
                f"{name} has form={adapter.form!r} in the model and "
                f"form={entry.settings.form!r} in the file: inject with that form, or load into a "
                "plain model"
            )
        for factor in "AB":
            here, there = getattr(adapter, factor), getattr(entry, factor)
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                raise InputError(
                    f"{factor} of {name} is {here.dtype} {list(here.shape)} in the model and "
                    f"{there.dtype} {list(there.shape)} in the file: inject with "
                    f"rank={entry.settings.rank} and adapter_dtype={entry.A.dtype}, "
                    "or load into a plain model"
                )


def _check_plain(model: nn.Module, saved: dict[str, SavedLayer]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in saved if name not in modules]
    if missing:
        raise InputError(
            f"the adapter is for another model: {type(model).__name__} has no {some(missing)}"
        )
    for name, entry in saved.items():
        reason = refusal(model, name)
        if reason is not None:
            raise InputError(f"the adapter cannot be put on {name}: it {reason}")
        stored = [entry.B.shape[0], entry.A.shape[1]]
        here = list(features(modules[name]))
        if here != stored:
            raise InputError(
                f"the adapter is for another model: {name} is [N, K] = {here} in the model and "
                f"{stored} in the file"
            )


def factor_key(name: str, factor: str, state_dict: Mapping[str, Tensor]) -> str:
    """The key of a layer's factor; checkpoint_wrapper and FSDP1 leave themselves out of keys."""
    key = f"{name}.adapter.{factor}"
    return key if key in state_dict else f"{without_shells(name)}.adapter.{factor}"


def _whole(
    name: str,
    factor: str,
    layer: FusedBoundedLinear,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Tensor:
    tensor: Tensor = getattr(layer.adapter, factor)
    if state_dict is not None:
        key = factor_key(name, factor, state_dict)
        if key not in state_dict:
            raise InputError(
                f"the state dict holds some factors but not {key!r}: give all of them or none"
            )
        tensor = state_dict[key]
    r, N, K = layer.rank, layer.out_features, layer.in_features
    shape = (r, K) if factor == "A" else (N, r)
    tensor = whole(tensor.detach())
    if type(tensor) is not Tensor or tensor.shape != shape:
        raise InputError(
            f"adapter.{factor} of {name} is a {type(tensor).__name__} {list(tensor.shape)}, "
            f"not a full tensor {list(shape)}: gather the sharded model's parameters first"
        )
    if not torch.isfinite(tensor).all():
        raise InputError(f"adapter.{factor} of {name} holds a NaN or an infinity: nothing is saved")
    return tensor.cpu().contiguous()
