"""transformers' save_pretrained of a model with injected layers: base and adapter in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastbound.errors import InputError
from fastbound.layers.base import offloaded
from fastbound.layers.over_base import BoundedOverBase
from fastbound.models.adapted import injected_layers
from fastbound.models.files import CONFIG, PEFT_TYPE, write_adapter
from fastbound.models.storage import adapter_files, factor_key


def save_pretrained(
    plain: Callable[..., Any],
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' method, ``plain``; with injected layers it also writes `save_adapter`'s files.

    The folder then holds what transformers calls a model with an embedded adapter:
    `from_pretrained` loads the base model and the adapter onto it, or raises
    ``KeyError: 'FASTBOUND'`` if fastbound is not imported. The weights file also contains A and B,
    from which Trainer resumes. A ``state_dict`` without A and B is saved as it is, as the base
    model alone.

    Raises InputError, before anything is written, for ``push_to_hub`` of an injected model (it
    would upload only the base), layers over an offloaded base, and PEFT adapters beside injected
    layers; also for a model without injected layers if the folder holds an adapter of fastbound,
    which `from_pretrained` would load onto that model.
    """
    folder, peft = Path(save_directory), getattr(model, "_hf_peft_config_loaded", False)
    layers = injected_layers(model)
    if state_dict is not None:
        held = any(factor_key(name, "A", state_dict) in state_dict for name in layers)
        layers = layers if held else {}
    if not layers:
        if not peft and _holds_adapter(folder):
            raise InputError(
                f"{folder} holds an adapter of fastbound, which from_pretrained would load onto "
                f"the {type(model).__name__} saved there: use another folder, or remove {CONFIG}"
            )
        return plain(
            model, save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs
        )
    _check(model, layers, peft, push_to_hub)
    if state_dict is None or is_main_process:
        data, config = adapter_files(model, layers, state_dict)
        config["base_model_name_or_path"] = None  # the base in this folder may have been trained
        if is_main_process:
            write_adapter(folder, data, config)
    if state_dict is not None:
        state_dict = dict(state_dict)
        _with_names_of_the_base(model, state_dict)
    hook = model.register_state_dict_post_hook(
        lambda m, state, *_: _with_names_of_the_base(m, state)
    )
    try:
        return plain(model, save_directory, is_main_process, state_dict, False, *args, **kwargs)
    finally:
        hook.remove()


def save_peft_pretrained(
    plain: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """PEFT's method, ``plain``. Raises InputError if it would leave out injected layers."""
    if injected_layers(model):
        raise InputError(
            f"{type(model).__name__} holds injected layers beside its PEFT adapters, and "
            "save_pretrained keeps only PEFT's: use fastbound.save_adapter for the injected ones, "
            "or call merge_and_unload() before inject"
        )
    return plain(model, *args, **kwargs)


def _check(model: nn.Module, layers: dict[str, Any], peft: bool, push_to_hub: bool) -> None:
    if peft:
        raise InputError(
            f"{type(model).__name__} holds PEFT adapters beside injected layers, and "
            "save_pretrained keeps only PEFT's: use fastbound.save_adapter for the injected ones"
        )
    if push_to_hub:
        raise InputError(
            "save_pretrained(push_to_hub=True) would upload the base without its adapter: use "
            "model.push_to_hub(name)"
        )
    for name, layer in layers.items():
        if isinstance(layer, BoundedOverBase) and offloaded(layer.base_layer):
            raise InputError(
                f"the base of {name} is offloaded: save only the adapter, with "
                "fastbound.save_adapter(model, folder)"
            )


def _with_names_of_the_base(model: nn.Module, state: dict[str, Any]) -> None:
    """Rename the weights of layers over a base, in place, to their names in the base model."""
    over = [
        f"{name}.base_layer."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BoundedOverBase)
    ]
    for key in list(state):
        prefix = next((start for start in over if key.startswith(start)), None)
        if prefix is not None:
            state[prefix.removesuffix("base_layer.") + key.removeprefix(prefix)] = state.pop(key)


def _holds_adapter(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / CONFIG).read_bytes()).get("peft_type") == PEFT_TYPE)
    except (OSError, ValueError, AttributeError):
        return False
