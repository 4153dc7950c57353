"""Bounded adapters and LoRA in open-unlearning: two handlers for its model registry.

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
from fastbound.errors import InputError
from fastbound.models.adapted import injected_layers
from fastbound.truth.linear_algebra import without_autocast
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
        """The transformers model with its weights frozen; only A and B are trained.

        Its `save_pretrained` writes the merged weights under their usual names, which any code can
        load, and the adapter into a subfolder `adapter`.

        Args:
            rank, alpha, bound, target_modules: as for `fastbound.inject`.
            kwargs: passed on to transformers' `from_pretrained`.

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
        """As `BoundedCausalLM`, with LoRA of slope alpha / rank (1 if alpha is None).

        The model keeps its class and its modules' names, which regular expressions in trainers rely
        on. Only the merged weights are saved, without an adapter.
        """
        from peft import LoraConfig, inject_adapter_in_model

        model = _load(pretrained_model_name_or_path, kwargs)
        layers, _ = target_layers(model, UnlearnConfig(target_modules=_names(target_modules)))
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
    """Add both handlers to open-unlearning's `MODEL_REGISTRY` under their class names."""
    registry.update({handler.__name__: handler for handler in HANDLERS})


def merged_state(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state dict of `model` with its adapters merged, under the names of the base model.

    ΔW is added in fp32 and rounded once.

    Args:
        model: with bounded adapters (`fastbound.inject`) or LoRA layers.
        state_dict: full tensors, if the model's own are sharded over processes.

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
    """Mixed into the class of a loaded model, so that it saves a plain model."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Save the merged weights as transformers does, and bounded factors in `adapter`."""
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
    """Accepts OmegaConf's lists, too, which are not `list` instances."""
    return target_modules if isinstance(target_modules, str) else tuple(map(str, target_modules))


def _ready(model: Any) -> nn.Module:
    """Let gradients reach the adapters under checkpointing, and let saving merge."""
    model.enable_input_require_grads()
    model.register_load_state_dict_pre_hook(_refuse_merged)
    kind = type(model)
    # The name stays: transformers writes it into config.json and chooses the loss by it.
    model.__class__ = type(kind.__name__, (_SavesMerged, kind), {"__module__": kind.__module__})
    return cast(nn.Module, model)


def _refuse_merged(model: nn.Module, state: Mapping[str, Tensor], *_: Any) -> None:
    """Raise InputError for weights into which ΔW was merged: the model would add its own again."""
    for name in (*_bounded(model), *_lora(model)):
        trained = any(key.startswith((f"{name}.adapter.", f"{name}.lora_")) for key in state)
        if f"{name}.weight" in state and not trained:
            raise InputError(
                f"these weights are of a checkpoint, into which the adapter of {name} is merged, "
                "and cannot be loaded into a model with an adapter: leave out "
                "load_best_model_at_end and resume_from_checkpoint, and load the checkpoint's "
                "folder as a model of its own"
            )


def _bounded(model: nn.Module) -> dict[str, Any]:
    return dict(injected_layers(model))


def _lora(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def _bounded_sum(layer: Any, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """W + ΔW by the layer's own rule, from the tensors of `state`."""
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
    with without_autocast(A.device):
        delta = (B @ A) * layer.scaling[adapter]
    weight = state[f"{name}.base_layer.weight"]
    total = (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
    if not total.isfinite().all():
        raise ValueError(f"{name!r} cannot be merged: W + ΔW is not finite in {weight.dtype}")
    return total


def _parents(key: str) -> Iterable[str]:
    """The names of all modules around a tensor of a state dict, innermost first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _register_where_it_runs() -> None:
    """Register the handlers if this process runs open-unlearning."""
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
