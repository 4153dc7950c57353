"""Loading a saved adapter into one that a PEFT model already has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftConfig

from fastbound.models.names import renamed
from fastbound.peft.checks import layers_with
from fastbound.peft.config import BoundedConfig


def keeping_numbers(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.load_adapter`, which also takes alpha and bound from the file.

    For an adapter that the model already has, PEFT reads only the tensors: they would run under the
    bounds of another config, or of another base.
    """

    @functools.wraps(plain)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        held = self.peft_config.get(adapter_name)
        if not isinstance(held, BoundedConfig):
            return plain(self, model_id, adapter_name, *args, **kwargs)
        hub = {k: kwargs[k] for k in ("subfolder", "revision", "token", "cache_dir") if k in kwargs}
        saved = PeftConfig.from_pretrained(model_id, **hub)
        if not isinstance(saved, BoundedConfig) or saved.form != held.form:
            theirs = f"form={saved.form!r}" if isinstance(saved, BoundedConfig) else saved.peft_type
            raise ValueError(
                f"{model_id} holds {theirs}, but {adapter_name!r} is a bounded adapter of "
                f"form={held.form!r}: load it under another name"
            )
        found = plain(self, model_id, adapter_name, *args, **kwargs)
        layers = layers_with(self, adapter_name)
        names = renamed(layers, saved.shapes)
        for name, layer in layers.items():
            settings = saved.of_layer(names[name], layer.base_layer)
            adapter = layer.fastbound_ab[adapter_name]
            adapter.alpha, adapter.bound = settings.alpha, float(settings.bound)
        return found

    return load_adapter
