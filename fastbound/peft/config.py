"""BoundedConfig: the settings of bounded adapters under PEFT's names."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType
from torch import nn

from fastbound.layers.over_base import for_weight
from fastbound.layers.settings import AdapterSettings, adapter_settings, rank_stabilised
from fastbound.models.files import FORMAT_VERSIONS, PEFT_TYPE
from fastbound.models.names import lookup

BIAS = ("none", "all", "fastbound_only")

# LoRA's names for the same settings, which BoundedConfig also accepts and provides.
LORA_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init_weights",
}
_PATTERNS = ("rank_pattern", "alpha_pattern", "bound_pattern")
# What to do instead of using one of LoRA's options; all others get `_NO_SUCH`.
_INSTEAD = {
    "target_parameters": "adapters are for linear layers, not for parameters such as the 3-D "
    "weights of experts: name linear layers in target_modules",
    "layer_replication": "replicate the layers of the model before it is adapted",
    "loftq_config": "quantise the base on its own, as docs/quantised.md shows",
}
_NO_SUCH = "leave it out, or use LoraConfig in a model of its own"


def _taking_lora_names(cls: type[Any]) -> type[Any]:
    """Let the constructor accept LoRA's names, and LoRA's other options at their defaults."""
    init: Callable[..., None] = cls.__init__
    ours = inspect.signature(init)
    defaults = {f.name: _default(f) for f in dataclasses.fields(LoraConfig)}

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for theirs, name in LORA_NAMES.items():
            if theirs in kwargs:
                value = kwargs.pop(theirs)
                if kwargs.get(name, value) != value:
                    raise ValueError(
                        f"{theirs}={value!r} and {name}={kwargs[name]!r} are two names of one "
                        "setting with different values: give one of them"
                    )
                kwargs[name] = value
        kwargs.pop("fan_in_fan_out", None)  # read of each layer itself
        for name in [name for name in kwargs if name in defaults and name not in ours.parameters]:
            value = kwargs.pop(name)
            if value != defaults[name]:
                raise TypeError(
                    f"{name}={value!r} is an option of LoRA that bounded adapters do not have: "
                    f"{_INSTEAD.get(name, _NO_SUCH)}"
                )
        init(self, *args, **kwargs)

    cls.__init__ = __init__
    for theirs, name in LORA_NAMES.items():
        setattr(cls, theirs, _other_name(name))
    return cls


def _default(one: dataclasses.Field[Any]) -> Any:
    if one.default_factory is not dataclasses.MISSING:
        return one.default_factory()
    return one.default


def _other_name(name: str) -> property:
    return property(
        lambda self: getattr(self, name),
        lambda self, value: setattr(self, name, value),
        doc=f"LoRA's name of `{name}`.",
    )


@_taking_lora_names
@dataclass
class BoundedConfig(PeftConfig):
    """Bounded low-rank adapters as a PEFT method: |ΔW_ij| <= bound, and LoRA's slope at zero.

        form="factors"    ΔW = s·sin(ωB) sin(ωA)    s = bound / r    ω = sqrt(alpha / bound)
        form="product"    ΔW = s·sin(ω·B A)         s = bound        ω = alpha / (r · bound)

    Args:
        r: rank of ΔW.
        target_modules: as in PEFT, a list of name suffixes, a regular expression for the whole
            name, or "all-linear". Also "mlp", the MLP projections of a known `config.model_type`.
            None means "mlp", or for other model types the defaults of PEFT's own table.
        exclude_modules: as in PEFT, suffixes or a regular expression for modules not to adapt.
        alpha: LoRA's `lora_alpha`: alpha / r is the slope of ΔW at zero. None means r.
        bound: the largest magnitude of an entry of ΔW. "0.5*spectral" means 0.5 σ₁(W) / sqrt(NK)
            of each layer's weight; "2*rms" means twice the weight's root mean square; other
            multiples work alike; "auto" means "0.5*spectral"; None means alpha.
        form: "factors", whose ΔW has rank r, or "product", whose ΔW has full rank and which does
            not support dropout.
        omega: ω instead of alpha (100 in the paper); `bound=None` then means 1.
        rank_pattern, alpha_pattern, bound_pattern: {suffix or regular expression: value} for layers
            that differ from `r`, `alpha` and `bound`. Once the config has been applied to a model,
            :meth:`to_dict`, and so the file, holds each layer's bound as a number.
        use_rslora: as in LoRA, use alpha·sqrt(r) as alpha, so that the slope is alpha / sqrt(r). A
            given `bound` is not changed; None then means alpha·sqrt(r).
        dropout: LoRA's `lora_dropout`, applied to the input of the low-rank term.
        bias: biases to train: "none", "all", or "fastbound_only" (those of adapted layers), for
            which "lora_only" is accepted, too.
        modules_to_save: other modules to train and to save whole.
        trainable_token_indices: as in PEFT, rows of the embedding to train beside the adapter.
        ensure_weight_tying: as in PEFT, keep tied embeddings tied if `modules_to_save` trains them.
        layers_to_transform: indices of the layers to adapt, among those of `target_modules`.
        layers_pattern: name of the list of layers that these indices refer to.
        init_weights: LoRA's `init_lora_weights`. True: B starts at zero, so that the model is
            unchanged. False: B is random, which is meant for tests.
        shapes: [N, K] of each adapted layer, from the file; checked when it is loaded.

    LoRA's own names, `lora_alpha`, `lora_dropout` and `init_lora_weights`, are accepted for the
    same settings. Other options of LoRA are accepted at values that have no effect, and refused by
    name otherwise.

    Raises ValueError for settings that are out of range or contradict each other, and TypeError for
    a name that is none of these.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    alpha: float | None = None
    bound: float | str | None = "auto"
    form: str = "factors"
    omega: float | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bound_pattern: dict[str, float | str | None] = field(default_factory=dict)
    use_rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True
    shapes: dict[str, list[int]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSIONS["factors"]
    # Also written by `fastbound.save_adapter`; they describe one file, not the adapter.
    fastbound_version: InitVar[str | None] = None
    tensors_sha256: InitVar[str | None] = None

    # bound_pattern and shapes of the layers that the config has been applied to.
    worked_out = None
    # LoRA's attribute, read by PEFT and others: no single parameters are adapted.
    target_parameters = None

    def __post_init__(self, fastbound_version: str | None, tensors_sha256: str | None) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]
        known = FORMAT_VERSIONS.values()
        if self.format_version not in known:
            raise ValueError(
                f"format_version {self.format_version!r} was written by fastbound "
                f"{fastbound_version}; this one reads {' and '.join(map(str, known))}"
            )
        if self.form == "factors" and self.format_version != FORMAT_VERSIONS["factors"]:
            raise ValueError(
                f'format_version {self.format_version!r} and form="factors" do not belong '
                "together: copy the adapter's folder again"
            )
        self._check_names()
        self._check_mappings()
        if self.bias == "lora_only":
            self.bias = "fastbound_only"
        if self.bias not in BIAS:
            raise ValueError(f"bias must be one of {', '.join(BIAS)}, got {self.bias!r}")
        for name in ("r", "alpha", "bound", "omega", "dropout", "init_weights", "use_rslora"):
            setattr(self, name, _plain(getattr(self, name)))
        for name in _PATTERNS:
            setattr(self, name, {k: _plain(v) for k, v in getattr(self, name).items()})
        for name, meaning in (
            ("init_weights", "True (B is zero and the model unchanged) or False (B is random)"),
            ("use_rslora", "True or False"),
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{name} must be {meaning}: bounded adapters support nothing else, "
                    f"got {getattr(self, name)!r}"
                )
        number = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
        if not number or not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be a number, at least 0 and below 1, got {self.dropout!r}"
            )
        if self.omega is not None and (self.alpha_pattern or self.use_rslora):
            name = "alpha_pattern" if self.alpha_pattern else "use_rslora"
            raise ValueError(
                f"omega={self.omega!r} replaces alpha, which {name} changes: give alpha, "
                f"or leave {name} out"
            )
        self._settings(self.r, self.alpha, self.bound)
        self.format_version = FORMAT_VERSIONS[self.form]
        for rank in self.rank_pattern.values():
            self._settings(rank, self.alpha, self.bound)
        for alpha in self.alpha_pattern.values():
            self._settings(self.r, alpha, self.bound)
        for bound in self.bound_pattern.values():
            self._settings(self.r, self.alpha, bound)

    def _settings(
        self, rank: int, alpha: float | None, bound: float | str | None
    ) -> AdapterSettings:
        """The settings of one layer: these numbers, and what all layers share."""
        return adapter_settings(rank, alpha, bound, self.dropout, form=self.form, omega=self.omega)

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and value and name != "modules_to_save":
                _check_pattern(name, value)
                continue
            listed = isinstance(value, list | tuple | set)
            if value is not None and not (listed and all(v and isinstance(v, str) for v in value)):
                raise TypeError(f"{name} must be a list of names, got {value!r}")
            if listed:
                setattr(self, name, list(value) if name == "modules_to_save" else set(value))
        layers = self.layers_to_transform
        indices: Any = [layers] if isinstance(layers, int) else layers
        if indices is not None:
            if not _are_indices(indices):
                raise TypeError(
                    f"layers_to_transform must be the index of a layer, or a list of them, "
                    f"got {layers!r}"
                )
            self.layers_to_transform = layers if isinstance(layers, int) else list(indices)
        if isinstance(self.target_modules, str) and self.target_modules != "mlp":
            everything = self.target_modules.lower() == "all-linear"
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} cannot be used when target_modules is "
                        + ('"all-linear"' if everything else "a regular expression")
                        + ": give a list of suffixes"
                        + ("" if everything else ", or write the indices into the expression")
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, the indices to adapt")
        patterns = self.layers_pattern
        for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
            _check_pattern("layers_pattern", pattern)
        tokens = self.trainable_token_indices
        for rows in tokens.values() if isinstance(tokens, dict) else [tokens]:
            if tokens is not None and not (rows and _are_indices(rows)):
                raise TypeError(
                    "trainable_token_indices must be a list of rows of the embedding, or a dict "
                    f"from layer names to such lists, got {tokens!r}"
                )

    def _check_mappings(self) -> None:
        for name in (*_PATTERNS, "shapes"):
            value = getattr(self, name)
            if not isinstance(value, dict):
                raise TypeError(f"{name} must be a dict of values by layer, got {value!r}")
            for key in value:
                _check_pattern(f"{name}: the key", key)
        for layer, shape in self.shapes.items():
            if not (_are_indices(shape) and len(shape) == 2):
                raise ValueError(f"shapes of {layer} must be [N, K], got {shape!r}")

    def to_dict(self) -> dict[str, Any]:
        """PEFT's dict, with the bounds and shapes of the layers that the config was applied to."""
        return {**super().to_dict(), **(self.worked_out or {})}

    def of_layer(self, name: str, base: nn.Module) -> AdapterSettings:
        """The settings of the named layer, with the bound as a number; may read base.weight."""
        rank = lookup(self.rank_pattern, name, self.r)
        alpha = lookup(self.alpha_pattern, name, self.alpha)
        if self.use_rslora:
            alpha = rank_stabilised(rank, alpha)
        bound = lookup(self.bound_pattern, name, self.bound)
        settings = self._settings(rank, alpha, bound)
        try:
            return for_weight(settings, base)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _register_custom_module(self, mapping: Mapping[type[nn.Module], type[nn.Module]]) -> None:
        raise TypeError(
            "only LoRA supports custom modules: bounded adapters are for nn.Linear, its subclasses "
            f"and Conv1D, got {', '.join(kind.__name__ for kind in mapping)}"
        )


def _check_pattern(name: str, value: object) -> None:
    try:
        re.compile(value)  # type: ignore[call-overload]
    except (TypeError, re.error) as error:
        raise ValueError(f"{name} {value!r} is not a regular expression: {error}") from error


def _are_indices(values: Any) -> bool:
    return isinstance(values, list | tuple | range) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )


def _plain(value: Any) -> Any:
    """A numpy or torch number as a Python number, for JSON; anything else as it is."""
    single = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if single else value
