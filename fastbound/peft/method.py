"""The PEFT method `fastbound`: BoundedModel puts BoundedLayers into a model, PEFT does the rest.

Importing this module registers the method; `fastbound.peft.hook` does so once PEFT is imported.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from fastbound.layers.base import Adapted, features, is_adaptable
from fastbound.layers.conversion import swap
from fastbound.layers.mlp import FusedBoundedMLP
from fastbound.models.adapted import fuse
from fastbound.models.files import PEFT_TYPE
from fastbound.models.names import unmatched
from fastbound.models.targets import mlp_suffixes, near_misses


def _add_peft_type(name: str) -> None:
    """Add a member to PEFT's enumeration: its tables and `register_peft_method` take no other."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13
        PeftType._hashable_values_.append(name)


if PEFT_TYPE not in PeftType.__members__:
    _add_peft_type(PEFT_TYPE)

# After the enumeration knows the name.
from fastbound.peft.config import BoundedConfig  # noqa: E402
from fastbound.peft.layer import BoundedLayer  # noqa: E402

__all__ = ["BoundedConfig", "BoundedLayer", "BoundedModel"]


class BoundedModel(BaseTuner):
    """PEFT's tuner for `BoundedConfig`. Users meet it through `get_peft_model`.

    Everything is checked before the first layer is replaced: when adding an adapter raises, the
    model is as it was. MLP blocks of a known form run as one operator (`FusedBoundedMLP`) whenever
    their layers have one active adapter; names and files do not depend on it.
    """

    prefix = "fastbound_"
    tuner_layer_cls = BoundedLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """BaseTuner's, with the config's values for each layer worked out and checked first."""
        try:
            self.peft_config[adapter_name] = self._worked_out(model, adapter_name, state_dict)
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise
        _share(model)
        fuse(model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules in (None, "mlp"):
            peft_config.target_modules = mlp_suffixes(self.model)
        return peft_config

    def _worked_out(self, model: nn.Module, adapter_name: str, state_dict: Any) -> BoundedConfig:
        """A copy of the config with rank, alpha, bound and shape of every layer it will adapt.

        Raises ValueError for layers that cannot be adapted, patterns that fit no layer, and shapes
        that are not those of the saved adapter.
        """
        config: Any = copy.deepcopy(self.peft_config[adapter_name])
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
        targets = self._targets(model, config, state_dict)
        if not targets and config.target_modules != DUMMY_TARGET_MODULES:
            wanted = config.target_modules
            one = wanted if isinstance(wanted, str) else min(wanted, default="")
            near = near_misses(model, one)
            limits = {n: getattr(config, n) for n in ("exclude_modules", "layers_to_transform")}
            given = "".join(f", {name}={value!r}" for name, value in limits.items() if value)
            raise ValueError(f"target_modules={wanted!r}{given} matches no module; {near}")
        output = getattr(model, "get_output_embeddings", lambda: None)()
        for name, module in targets.items():
            reason = _refusal(module, adapter_name, module is output)
            if reason is not None:
                raise ValueError(f"cannot adapt {name}: it {reason}")
        if config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"bias={config.bias!r} needs PEFT 0.21: earlier ones do not save biases"
            )
        for field in ("rank_pattern", "alpha_pattern", "bound_pattern", "shapes"):
            left = unmatched(getattr(config, field), targets) if targets else []
            if left:
                raise ValueError(
                    f"{field}: {', '.join(map(repr, left[:5]))} fits none of the {len(targets)} "
                    f"layers that are adapted (first: {next(iter(targets))!r})"
                )
        bounds, shapes = {}, {}
        for name, module in targets.items():
            base = module.base_layer if isinstance(module, BoundedLayer) else module
            bounds[name] = config.of_layer(name, base).bound
            shapes[name] = list(features(base))
            if config.shapes.get(name, shapes[name]) != shapes[name]:
                raise ValueError(
                    f"the adapter is for another model: {name} is [N, K] = {shapes[name]} in the "
                    f"model and {config.shapes[name]} in the adapter"
                )
        config.bound_pattern, config.shapes = bounds, shapes
        return config

    def _targets(self, model: nn.Module, config: Any, state_dict: Any) -> dict[str, nn.Module]:
        """The modules that BaseTuner is going to hand over, by name."""
        saved = None
        if state_dict is not None:
            saved = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
        found: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside or ("\0",)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
            if (
                name in saved
                if saved is not None
                else self._check_target_module_exists(config, name)
            ):
                found[name] = module
        return found

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, BoundedLayer) else BoundedLayer(target)
        if layer is not target:
            layer.train(target.training)
            layer._active_adapter = self.active_adapters
            self._replace_module(parent, target_name, layer, target)
        layer.add_adapter(
            adapter_name,
            peft_config.of_layer(current_key, layer.base_layer),
            zero=peft_config.init_weights,
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        left = [m for m in model.modules() if isinstance(m, BoundedLayer)]  # under a second name
        swap(model, {layer: layer.base_layer for layer in left})
        blocks = [m for m in model.modules() if isinstance(m, FusedBoundedMLP)]
        bare = [m for m in blocks if not any(isinstance(c, Adapted) for c in m.children())]
        swap(model, {block: block.to_mlp(merge=False) for block in bare})
        return model


def _share(model: nn.Module) -> None:
    """Put a bounded layer wherever its base hangs: PEFT replaces a module under its first name."""
    held = {m.base_layer: m for m in model.modules() if isinstance(m, BoundedLayer)}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        if module in held and owner is not held[module]:
            setattr(owner, child, held[module])


def _refusal(module: nn.Module, adapter_name: str, is_output: bool) -> str | None:
    """Why a module cannot get an adapter of that name, or None when it can."""
    if isinstance(module, BoundedLayer):
        held = adapter_name in module.fastbound_ab
        return f"already has an adapter named {adapter_name!r}" if held else None
    if isinstance(module, BaseTunerLayer):
        return (
            f"already holds another method's adapter ({type(module).__module__}): merge and unload "
            "that one first, or target other layers"
        )
    if isinstance(module, Adapted):
        return "was injected by fastbound: call fastbound.merge(model) first"
    if is_output:
        return "is the model's output layer, which is left alone: name other layers"
    if not is_adaptable(module):
        return f"is a {type(module).__name__}: only linear layers (and Conv1D) can be adapted"
    return None


if PeftType[PEFT_TYPE] not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=BoundedConfig, model_cls=BoundedModel)
