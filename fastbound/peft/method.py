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
from peft.utils import constants, register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from fastbound.layers.base import Adapted, features
from fastbound.layers.conversion import swap
from fastbound.layers.mlp import FusedBoundedMLP
from fastbound.models.adapted import fuse
from fastbound.models.files import PEFT_TYPE
from fastbound.models.names import renamed, unmatched
from fastbound.models.targets import has_mlp_suffixes, mlp_suffixes


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
from fastbound.peft.checks import (  # noqa: E402
    NoMatchingPeftModuleError,
    bare_name,
    check_each_is_there,
    no_match,
    plain_name,
    refusal,
)
from fastbound.peft.config import BoundedConfig  # noqa: E402
from fastbound.peft.layer import BoundedLayer  # noqa: E402

__all__ = ["BoundedConfig", "BoundedLayer", "BoundedModel"]


# Where no MLP is known: what PEFT adapts by default, LoRA's own table first.
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **constants.TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING,
    **constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
}


class BoundedModel(BaseTuner):
    """PEFT's tuner for `BoundedConfig`. Users meet it through `get_peft_model`.

    Everything is checked before the first layer is replaced: when adding an adapter raises, the
    model is as it was. MLP blocks of a known form run as one operator (`FusedBoundedMLP`) whenever
    their layers have one active adapter; names and files do not depend on it.
    """

    prefix = "fastbound_"
    tuner_layer_cls = BoundedLayer
    target_module_mapping: ClassVar[dict[str, list[str] | str]] = DEFAULT_TARGETS

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """BaseTuner's, with the config's values for each layer worked out and checked first."""
        config: Any = self.peft_config[adapter_name]
        if config.worked_out is not None and not hasattr(BaseTuner, "_get_adapter_state_dict"):
            # PEFT 0.20 does not say whose config it saves: this one is another adapter's already.
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        before = dict(vars(config))
        try:
            self._work_out(model, config, adapter_name, state_dict)
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        except BaseException:
            vars(config).clear()
            vars(config).update(before)
            self.peft_config.pop(adapter_name, None)
            raise
        _share(model)
        fuse(model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        known = peft_config.target_modules is None and has_mlp_suffixes(self.model)
        if known or peft_config.target_modules == "mlp":
            peft_config.target_modules = mlp_suffixes(self.model)
        elif peft_config.target_modules is None:
            if model_config.get("model_type") not in self.target_module_mapping:
                mlp_suffixes(self.model)  # raises, and says what is known and what there is
            super()._prepare_adapter_config(peft_config, model_config)
        elif str(peft_config.target_modules).lower() == "all-linear":
            _maybe_include_all_linear_layers(peft_config, self.model)
            # PEFT tells them by a class that has "Linear" in its name.
            held = {n for n, m in self.model.named_modules() if isinstance(m, BoundedLayer)}
            peft_config.target_modules |= held
        return peft_config

    def _work_out(self, model: nn.Module, config: Any, adapter_name: str, state_dict: Any) -> None:
        """Give the config the bound and shape of every layer that it will adapt.

        Raises ValueError for layers that cannot be adapted, names and patterns that fit none, and
        shapes that are not those of the saved adapter.
        """
        asked = config.target_modules
        self._prepare_adapter_config(config, self.get_model_config(model))
        targets = self._targets(model, config, state_dict)
        if not targets and config.target_modules != DUMMY_TARGET_MODULES:
            raise NoMatchingPeftModuleError(no_match(model, config))
        if state_dict is None and not isinstance(asked, str | None):
            check_each_is_there(model, config)
        for name, module in targets.items():
            reason = refusal(model, name, module, adapter_name)
            if reason is not None:
                it = "" if reason.startswith("its ") else "it "
                raise ValueError(f"cannot adapt {name}: {it}{reason}")
        if config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"bias={config.bias!r} needs PEFT 0.21: earlier ones do not save biases"
            )
        names = renamed(targets, config.shapes)
        for field in ("rank_pattern", "alpha_pattern", "bound_pattern", "shapes"):
            left = unmatched(getattr(config, field), names.values()) if targets else []
            if left:
                raise ValueError(
                    f"{field}: {', '.join(map(repr, left[:5]))} fits none of the {len(targets)} "
                    f"layers that are adapted (first: {next(iter(targets))!r})"
                )
        bounds, shapes = {}, {}
        for name, module in targets.items():
            base = module.base_layer if isinstance(module, BoundedLayer) else module
            bounds[name] = config.of_layer(names[name], base).bound
            shapes[name] = list(features(base))
            saved = config.shapes.get(names[name], shapes[name])
            if saved != shapes[name]:
                raise ValueError(
                    f"the adapter is for another model: {name} is [N, K] = {shapes[name]} in the "
                    f"model and {saved} in the adapter"
                )
        config.worked_out = {"bound_pattern": bounds, "shapes": shapes}
        self._names = names

    def _targets(self, model: nn.Module, config: Any, state_dict: Any) -> dict[str, nn.Module]:
        """The modules that BaseTuner is going to hand over, by name."""
        saved = None
        if state_dict is not None:
            saved = {plain_name(key.rsplit(f".{self.prefix}", 1)[0]) for key in state_dict}
        found: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
            if (
                plain_name(name) in saved
                if saved is not None
                else self._check_target_module_exists(config, name)
            ):
                found[plain_name(name)] = module
        return found

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """BaseTuner's; the config, which PEFT saves next, gets the numbers of this model's layers.

        It may have been put on other models since.
        """
        found: dict[str, Any] = {
            bare_name(name): module
            for name, module in model.named_modules()
            if isinstance(module, BoundedLayer) and adapter_name in module.fastbound_ab
        }
        config.worked_out = {
            "bound_pattern": {n: m.fastbound_ab[adapter_name].bound for n, m in found.items()},
            "shapes": {n: [m.out_features, m.in_features] for n, m in found.items()},
        }
        state: dict[str, Any] = super()._get_adapter_state_dict(
            model, config, adapter_name, *args, **kwargs
        )
        return state

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
            peft_config.of_layer(self._names[plain_name(current_key)], layer.base_layer),
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


if PeftType[PEFT_TYPE] not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=BoundedConfig, model_cls=BoundedModel)
