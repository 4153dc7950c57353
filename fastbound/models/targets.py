"""Resolving `target_modules`: the MLP projections of known models, suffixes and patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from torch import nn

from fastbound.layers.base import Adapted, is_adaptable

_GATED = r"mlp\.(gate_proj|up_proj|down_proj)"
_FC = r"mlp\.(c_fc|c_proj)"  # with `mlp.`, because GPT-2's attention also has a c_proj

# The MLP projections by `config.model_type`: the end of a layer's dotted name, after a dot.
_MLP = {
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3": _GATED,  # with images: only the language model; the vision tower has fc1 and fc2
    "gemma3_text": _GATED,
    "gpt2": _FC,
    "gpt_neo": _FC,
    "gpt_neox": r"mlp\.(dense_h_to_4h|dense_4h_to_h)",
    "llama": _GATED,
    "mistral": _GATED,
    "opt": r"layers\.\d+\.(fc1|fc2)",
    "phi": r"mlp\.(fc1|fc2)",
    "phi3": r"mlp\.(gate_up_proj|down_proj)",
    "qwen2": _GATED,
    "qwen3": _GATED,
    "vit": r"mlp\.(fc1|fc2)",
}


def match(model: nn.Module, target_modules: str | Collection[str]) -> list[str]:
    """The names of the modules that `target_modules` selects, in the model's order."""
    if target_modules == "all-linear":
        return _all_linear(model)
    if isinstance(target_modules, str):
        return _match_pattern(model, target_modules)
    suffixes = list(target_modules)
    if not all(isinstance(suffix, str) for suffix in suffixes):
        raise TypeError(f"target_modules must hold strings, got {suffixes!r}")
    if not suffixes:
        raise ValueError("target_modules is empty: give 'mlp', suffixes or a regular expression")
    names = _names(model)
    matches = {s: [n for n in names if n == s or n.endswith(f".{s}")] for s in suffixes}
    unknown = [f"{s!r} ({near_misses(model, s)})" for s, found in matches.items() if not found]
    if unknown:
        raise ValueError(f"target_modules: no module's name ends in {', nor in '.join(unknown)}")
    wanted = {name for found in matches.values() for name in found}
    return [name for name in names if name in wanted]


def _all_linear(model: nn.Module) -> list[str]:
    """Every linear layer except the output layer of a language model, as in PEFT."""
    found: list[Any] = [m for m in model.modules() if hasattr(m, "get_output_embeddings")]
    heads = [module.get_output_embeddings() for module in found]
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [n for n, m in modules.items() if n and is_adaptable(m) and m not in heads]
    if not names:
        raise ValueError(
            f"target_modules='all-linear': {type(model).__name__} holds no linear layer beside its "
            "output layer"
        )
    return names


def _match_pattern(model: nn.Module, target_modules: str) -> list[str]:
    pattern = target_modules
    if target_modules == "mlp":
        pattern = rf"(.*\.)?({_mlp_pattern(model)})"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"target_modules={target_modules!r} is not a regular expression: {error}"
        ) from error
    found = [name for name in _names(model) if compiled.fullmatch(name)]
    if not found:
        raise ValueError(
            f"target_modules={target_modules!r} matches no module's whole name; "
            f"{near_misses(model, target_modules)}; "
            "to match the end of a name, give a list of suffixes"
        )
    return found


def _mlp_pattern(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _MLP:
        what = "has no config.model_type" if model_type is None else f"is a {model_type!r}"
        raise ValueError(
            f"target_modules='mlp': {type(model).__name__} {what}, and the MLP projections are "
            f"known for {', '.join(sorted(_MLP))}; give a list of name suffixes or a regular "
            f"expression instead; {_linear_kinds(model)}"
        )
    return _MLP[model_type]


def has_mlp_suffixes(model: nn.Module) -> bool:
    """Whether the MLP projections of the model are known."""
    return getattr(getattr(model, "config", None), "model_type", None) in _MLP


def mlp_suffixes(model: nn.Module) -> set[str]:
    """The MLP projections of a known model as suffixes. Raises ValueError for an unknown model."""
    found = (name.split(".") for name in _match_pattern(model, "mlp"))
    return {".".join(p[-1:] if p[-2].isdigit() else p[-2:]) for p in found}


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def _is_target(module: nn.Module) -> bool:
    return is_adaptable(module) or isinstance(module, Adapted)


def _suffixes(model: nn.Module) -> list[str]:
    """The last one and two parts of the names of the linear layers, sorted, without numbers."""
    found = [name for name, module in model.named_modules() if _is_target(module)]
    adapted = tuple(f"{n}." for n in found if isinstance(model.get_submodule(n), Adapted))
    names = [name.split(".") for name in found if not name.startswith(adapted)]
    ends = {".".join(parts[-n:]) for parts in names for n in (1, 2)}
    return sorted(end for end in ends if not re.search(r"(^|\.)\d+(\.|$)", end))


def near_misses(model: nn.Module, target: str) -> str:
    """Names that a misspelt target may have meant, or else the names there are."""
    near = difflib.get_close_matches(target, _suffixes(model), n=3, cutoff=0.5)
    return f"near misses: {', '.join(near)}" if near else _linear_kinds(model)


def _linear_kinds(model: nn.Module) -> str:
    ends = [end for end in _suffixes(model) if "." not in end]
    return f"its linear layers end in: {', '.join(ends) or '(only numbers, or it has none)'}"
