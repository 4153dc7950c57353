"""Checks of a config against a model, made before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fastbound.layers.base import Adapted, is_adaptable
from fastbound.layers.conversion import tied
from fastbound.layers.readers import weight_reader
from fastbound.models.names import COMPILED_OR_FSDP, without_shells
from fastbound.models.targets import near_misses
from fastbound.peft.layer import BoundedLayer

try:
    from peft.utils.error import NoMatchingPeftModuleError
except ImportError:  # PEFT 0.20
    NoMatchingPeftModuleError = ValueError


def plain_name(name: str) -> str:
    """The name without the prefix that torch.compile adds."""
    return name.removeprefix("_orig_mod.")


def bare_name(name: str) -> str:
    """The name inside the base model, without the prefixes of PEFT, torch.compile and FSDP.

    That of checkpoint_wrapper stays: PEFT does not find such a layer in its files, and a name that
    matches would hide it.
    """
    return without_shells(name, COMPILED_OR_FSDP).removeprefix("base_model.model.")


def layers_with(model: nn.Module, *adapters: str) -> dict[str, Any]:
    """Bare name -> layer, for every layer that has one of these adapters."""
    return {
        bare_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, BoundedLayer) and any(a in module.fastbound_ab for a in adapters)
    }


def no_match(model: nn.Module, config: Any) -> str:
    wanted = config.target_modules
    one = wanted if isinstance(wanted, str) else min(wanted, default="")
    limits = {
        name: getattr(config, name)
        for name in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    }
    given = "".join(f", {name}={value!r}" for name, value in limits.items() if value is not None)
    stacked = any(p.dim() == 3 and ".experts." in name for name, p in model.named_parameters())
    experts = ", and experts stored as 3-D parameters cannot be adapted" if stacked else ""
    return f"target_modules={wanted!r}{given} matches no module{experts}; {near_misses(model, one)}"


def no_default(model: nn.Module, model_config: Mapping[str, Any]) -> str:
    """The message for a config without targets and a model that has no default."""
    kind = model_config.get("model_type")
    what = f"is of type {kind!r}, which has no default"
    if kind in (None, "custom"):
        what = "has no config.model_type"
    return (
        f"Please specify `target_modules`: {type(model).__name__} {what}; give a list of name "
        f"suffixes, a regular expression or 'all-linear'; {near_misses(model, '')}"
    )


def check_each_is_there(model: nn.Module, config: Any) -> None:
    """Raise for a suffix that matches nothing, and for a whole name with layers_to_transform."""
    names = {plain_name(name) for name, _ in model.named_modules()}
    for target in sorted(config.target_modules):
        if target in names and config.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform chooses among the layers of a suffix, but {target!r} in "
                "target_modules is a whole name: give its last part, or leave out "
                "layers_to_transform"
            )
        if target not in names and not any(name.endswith(f".{target}") for name in names):
            raise NoMatchingPeftModuleError(
                f"target_modules: no module's name ends in {target!r}; {near_misses(model, target)}"
            )


def check_tokens(model: Any, config: Any) -> None:
    """Raise for token rows that the embeddings to be trained do not have."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        layers = [("the embedding", wanted, [embedding] if embedding is not None else [])]
    else:
        named = list(model.named_modules())
        layers = [
            (key, rows, [m for n, m in named if n == key or n.endswith(f".{key}")])
            for key, rows in wanted.items()
        ]
    for name, rows, found in layers:
        if not found:
            raise ValueError(f"trainable_token_indices: the model has no layer {name!r}")
        weights = [m.weight for m in found if isinstance(getattr(m, "weight", None), Tensor)]
        count = min(map(len, weights), default=0)
        if max(rows) >= count:
            raise ValueError(
                f"trainable_token_indices: {name} has {count} rows, the last of which is "
                f"{count - 1}, got {max(rows)}"
            )


def refusal(model: nn.Module, name: str, module: nn.Module, adapter_name: str) -> str | None:
    """Why a module cannot get an adapter of that name, or None if it can."""
    if isinstance(module, BoundedLayer):
        held = adapter_name in module.fastbound_ab
        if held:
            return (
                f"already has an adapter named {adapter_name!r}: use another adapter_name, or "
                "delete that adapter first"
            )
        return None
    if isinstance(module, BaseTunerLayer):
        return (
            f"already holds another method's adapter ({type(module).__module__}): merge and unload "
            "that one first, or target other layers"
        )
    if isinstance(module, Adapted):
        return "was injected by fastbound: call fastbound.merge(model) first"
    if not is_adaptable(module):
        return f"is of class {type(module).__name__}, {_not_linear(module)}"
    return tied(model, module) or weight_reader(model, name)


def _not_linear(module: nn.Module) -> str:
    """What to do about a module that is not a linear layer."""
    only = "and only linear layers (nn.Linear, its subclasses and Conv1D) can be adapted: "
    if isinstance(module, nn.Embedding):
        return f"{only}train it with modules_to_save, or rows of it with trainable_token_indices"
    if isinstance(module, nn.MultiheadAttention):
        return f"{only}it keeps q, k and v in one parameter; train it whole with modules_to_save"
    if next(module.parameters(), None) is not None:
        return f"{only}train it whole with modules_to_save, or leave it out of target_modules"
    return f"{only}leave it out of target_modules"
