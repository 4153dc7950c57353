"""The PEFT method `fastbound`: BoundedModel puts BoundedLayers into a model, PEFT does the rest.

Importing this module registers the method; `fastbound.peft.hook` imports it once PEFT is imported.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import AuxiliaryTrainingWrapper, constants, register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from fastbound.hook import after_import
from fastbound.layers.base import Adapted, features
from fastbound.layers.conversion import swap
from fastbound.layers.mlp import FusedBoundedMLP
from fastbound.models.adapted import fuse
from fastbound.models.files import PEFT_TYPE
from fastbound.models.names import exact_targets, renamed, unmatched
from fastbound.models.ranks import check_ranks
from fastbound.models.targets import has_mlp_suffixes, mlp_suffixes
from fastbound.peft.optimizers import correct_optimizers


def _add_peft_type(name: str) -> None:
    """Add a member to PEFT's enumeration, which its tables and `register_peft_method` require."""
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

# These imports need the new member of the enumeration.
from fastbound.peft.checks import (  # noqa: E402
    NoMatchingPeftModuleError,
    check_each_is_there,
    check_tokens,
    layers_with,
    no_default,
    no_match,
    plain_name,
    refusal,
)
from fastbound.peft.combination import combined  # noqa: E402
from fastbound.peft.config import BoundedConfig  # noqa: E402
from fastbound.peft.layer import BASE_ROWS, BoundedLayer  # noqa: E402
from fastbound.peft.loading import keeping_numbers  # noqa: E402

__all__ = ["BoundedConfig", "BoundedLayer", "BoundedModel"]


_HALF = (torch.float16, torch.bfloat16)

# For models without known MLP projections: PEFT's default targets, LoRA's own table first.
DEFAULT_TARGETS: Mapping[str, list[str] | str] = ChainMap(
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
    {"dinov2": ["query", "value"]},
)


class BoundedModel(BaseTuner):
    """PEFT's tuner for `BoundedConfig`; users create it with `get_peft_model`.

    Everything is checked before the first layer is replaced: if adding an adapter raises, the model
    is unchanged. MLP blocks of a known form run as one operator (`FusedBoundedMLP`) whenever their
    layers have one active adapter; names and files are the same either way.
    """

    prefix = "fastbound_"
    tuner_layer_cls = BoundedLayer
    target_module_mapping: ClassVar[Mapping[str, list[str] | str]] = DEFAULT_TARGETS

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """BaseTuner's method, after computing and checking the config's values for each layer."""
        config: Any = self.peft_config[adapter_name]
        if config.worked_out is not None and not hasattr(BaseTuner, "_get_adapter_state_dict"):
            # PEFT 0.20 does not tell whose config it saves: here it already is another adapter's.
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        before = dict(vars(config))
        as_it_was = _Snapshot(model)
        try:
            self._work_out(model, config, adapter_name, state_dict)
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        except BaseException:
            vars(config).clear()
            vars(config).update(before)
            self.peft_config.pop(adapter_name, None)
            as_it_was.put_back(adapter_name)
            raise
        # PEFT replaces a module only under its first name.
        swap(model, {m.base_layer: m for m in model.modules() if isinstance(m, BoundedLayer)})
        fuse(model)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        **unused: Any,
    ) -> None:
        """Add Σ weight_i·ΔW_i of the named adapters as a new one, exactly; weights of any sign.

        Its rank is the sum of their ranks, and no entry of it exceeds Σ |weight_i|·bound_i. Its own
        bound, which holds for further training, is max_i(|weight_i|·bound_i / r_i) times its rank:
        the same number if adapters and weights are alike, and a larger one otherwise. Call
        `set_adapter` to activate it.

        Raises ValueError for adapters that do not exist, a new name that does, adapters of the form
        "product" (their sum does not have that form), adapters that trained more than ΔW, and
        combination types other than "cat". LoRA's other arguments belong to those and are ignored.
        """
        _check_combination(self.peft_config, adapters, weights, adapter_name, combination_type)
        held = layers_with(self.model, *adapters)
        sums = {}
        for name, layer in held.items():
            terms = {
                adapter: weight
                for adapter, weight in zip(adapters, weights, strict=True)
                if adapter in layer.fastbound_ab
            }
            present: list[Any] = [layer.fastbound_ab[a] for a in terms]
            sums[name] = combined(present, list(terms.values()))
        bounds: dict[str, Any] = {name: each.bound for name, each in sums.items()}
        first = self.peft_config[adapters[0]]
        self.peft_config[adapter_name] = BoundedConfig(
            task_type=first.task_type,
            base_model_name_or_path=first.base_model_name_or_path,
            r=max(each.rank for each in sums.values()),
            dropout=first.dropout,
            target_modules=exact_targets(self.model, sums),
            rank_pattern={name: each.rank for name, each in sums.items()},
            alpha_pattern=bounds,
            bound_pattern=bounds,
        )
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for name, each in sums.items():
                adapter: Any = held[name].fastbound_ab[adapter_name]
                adapter.A.copy_(each.A)
                adapter.B.copy_(each.B)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hooks: pass the `adapter_names` of a call or of `generate` on to the layers."""
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets: only LoRA supports activated LoRA, leave them out")
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval()"
            )
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names must be a list of names, one per row, got {names!r}")
        layers = [m for m in self.modules() if isinstance(m, BoundedLayer)]
        known = {name for layer in layers for name in layer.fastbound_ab}
        unknown = sorted(set(names) - known - {BASE_ROWS})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there "
                f"{'are' if len(known) > 1 else 'is'} {', '.join(sorted(known))}, and {BASE_ROWS}"
            )
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        encoder = getattr(self.model, "get_encoder", lambda: None)()
        apart = set() if encoder in (None, self.model) else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                partial(_with_names, list(names) if module in apart else repeated),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, BoundedLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_modules_to_save_to_tie(
        self, peft_config: Any, tied_weight_keys: Iterable[str]
    ) -> None:
        """For `ensure_weight_tying`: train the embedding, and tie the other weights to it."""
        followers = set(tied_weight_keys)
        embedding = self.model.get_input_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is embedding)
        own = [m for m in peft_config.modules_to_save if not any(_is_end(m, f) for f in followers)]
        peft_config.modules_to_tie = followers
        peft_config.modules_to_save = [*own, *([] if name in own else [name])]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """BaseTuner's method; without the cast to fp32, A and B get the dtype of a 16-bit base."""
        for module in self.model.modules():
            held = isinstance(module, BoundedLayer) and adapter_name in module.fastbound_ab
            if held and not autocast_adapter_dtype and module.weight.dtype in _HALF:
                module.fastbound_ab[adapter_name].to(module.weight.dtype)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _check_merge_allowed(self) -> None:
        """BaseTuner's check, and that every base can be merged: no model is merged in part."""
        super()._check_merge_allowed()
        for name, module in self.model.named_modules():
            if isinstance(module, BoundedLayer):
                obstacle = module.base_merge_obstacle()
                if obstacle is not None:
                    raise TypeError(f"{name} cannot be merged: {obstacle}")

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(child, BoundedLayer) or isinstance(new_module, BoundedLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # another wrapper of PEFT's, which is complete by itself
            setattr(parent, child_name, new_module)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        known = peft_config.target_modules is None and has_mlp_suffixes(self.model)
        if known or peft_config.target_modules == "mlp":
            peft_config.target_modules = mlp_suffixes(self.model)
        elif peft_config.target_modules is None:
            if model_config.get("model_type") not in self.target_module_mapping:
                raise ValueError(no_default(self.model, model_config))
            super()._prepare_adapter_config(peft_config, model_config)
        elif str(peft_config.target_modules).lower() == "all-linear":
            _maybe_include_all_linear_layers(peft_config, self.model)
            # PEFT recognises them by "Linear" in the name of their class.
            held = {n for n, m in self.model.named_modules() if isinstance(m, BoundedLayer)}
            peft_config.target_modules |= held
        return peft_config

    def _work_out(self, model: nn.Module, config: Any, adapter_name: str, state_dict: Any) -> None:
        """Set the config's bound and shape for every layer that it will adapt.

        Raises ValueError for layers that cannot be adapted, for names and patterns that match none,
        and for shapes that differ from the saved adapter's.
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
                f"bias={config.bias!r} needs PEFT 0.21: earlier versions do not save biases"
            )
        check_tokens(model, config)
        names = renamed(targets, config.shapes)
        for field in ("rank_pattern", "alpha_pattern", "bound_pattern", "shapes"):
            left = unmatched(getattr(config, field), names.values()) if targets else []
            if left:
                raise ValueError(
                    f"{field}: {', '.join(map(repr, left[:5]))} matches none of the {len(targets)} "
                    f"layers that are adapted (first: {next(iter(targets))!r})"
                )
        alphas, bounds, shapes = {}, {}, {}
        for name, module in targets.items():
            base = module.base_layer if isinstance(module, BoundedLayer) else module
            settings = config.of_layer(names[name], base)
            check_ranks({name: settings.rank}, {name: features(base)})
            alphas[name], bounds[name] = settings.alpha, settings.bound
            shapes[name] = list(features(base))
            saved = config.shapes.get(names[name], shapes[name])
            if saved != shapes[name]:
                raise ValueError(
                    f"the adapter is for another model: {name} is [N, K] = {shapes[name]} in the "
                    f"model and {saved} in the adapter"
                )
        config.worked_out = {**_numbers(config, alphas, bounds), "shapes": shapes}
        self._names = names

    def _targets(self, model: nn.Module, config: Any, state_dict: Any) -> dict[str, nn.Module]:
        """The modules that BaseTuner is going to pass to `_create_and_replace`, by name."""
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
        """BaseTuner's method; also writes the numbers of this model's layers into the config.

        PEFT saves the config next, and it may have been applied to other models since.
        """
        found = layers_with(model, adapter_name)
        adapters = {name: module.fastbound_ab[adapter_name] for name, module in found.items()}
        alphas, bounds = (
            {n: getattr(a, x) for n, a in adapters.items()} for x in ("alpha", "bound")
        )
        config.worked_out = {
            **_numbers(config, alphas, bounds),
            "shapes": {n: [m.out_features, m.in_features] for n, m in found.items()},
        }
        if any(m.fastbound_ab[adapter_name].scale != 1 for m in found.values()):
            warnings.warn(
                f"the scale of {adapter_name!r} (set_scale, scale_layer) is not saved: the saved "
                "adapter has scale 1",
                stacklevel=2,
            )
        state: dict[str, Any] = super()._get_adapter_state_dict(
            model, config, adapter_name, *args, **kwargs
        )
        given = kwargs["state_dict"] if "state_dict" in kwargs else args[0]
        if given and sum(".fastbound_ab." in key for key in state) < 2 * len(found):
            raise ValueError(
                f"the state dict does not name the layers of {adapter_name!r} as the model does, "
                "so their A and B would not be saved: take off what was put around parts of the "
                "model, such as checkpoint_wrapper, and save then"
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


class _Snapshot:
    """What an injection may change in a model: its modules, and which parameters are trained."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.trained = {p: p.requires_grad for p in model.parameters()}

    def put_back(self, adapter_name: str) -> None:
        """Restore the model, without the adapter of that name."""
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            if name and self.modules[parent]._modules.get(child) is not module:
                self.modules[parent]._modules[child] = module
            if isinstance(module, BoundedLayer) and adapter_name in module.fastbound_ab:
                known = f"{name}.fastbound_ab.{adapter_name}".removeprefix(".")
                if known not in self.modules:
                    del module.fastbound_ab[adapter_name]
        for parameter, trained in self.trained.items():
            parameter.requires_grad_(trained)


def _with_names(names: list[str], _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


def _numbers(
    config: BoundedConfig, alphas: dict[str, Any], bounds: dict[str, Any]
) -> dict[str, Any]:
    """The numbers in the file: each layer's bound, and its alpha if omega was given instead."""
    if config.omega is None:
        return {"bound_pattern": bounds}
    return {"bound_pattern": bounds, "alpha_pattern": alphas, "omega": None}


def _is_end(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_combination(
    configs: dict[str, Any],
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    if combination_type != "cat":
        raise ValueError(
            f"combination_type={combination_type!r} does not give the sum of bounded adapters: "
            'only combination_type="cat" does, exactly, with the sum of their ranks'
        )
    missing = [name for name in adapters if name not in configs]
    if missing or not adapters:
        raise ValueError(
            f"Adapter {', '.join(map(repr, missing)) or 'to combine'} does not exist: there is "
            f"{', '.join(configs)}"
        )
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters contains a name twice: add up its weights, got {adapters}")
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must have a finite number for each of {adapters}, got {weights}")
    if adapter_name in configs:
        raise ValueError(
            f"an adapter {adapter_name!r} already exists: call delete_adapter() first, or give "
            "another name"
        )
    for name in adapters:
        if configs[name].form == "product":
            raise ValueError(
                f'{name!r} has form="product": a sum of sines of products is not the sine of a '
                "product. Activate the adapters together, or merge them one after the other"
            )
        for field in ("bias", "modules_to_save", "trainable_token_indices"):
            value = getattr(configs[name], field)
            if value not in (None, "none"):
                raise ValueError(
                    f"{field}={value!r} of {name!r}: weights trained beside ΔW cannot be combined"
                )


setattr(PeftModel, "load_adapter", keeping_numbers(PeftModel.load_adapter))  # noqa: B010
after_import("peft.optimizers", correct_optimizers)
if PeftType[PEFT_TYPE] not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=BoundedConfig, model_cls=BoundedModel)
