"""BoundedConfig: what a PEFT user asks of bounded adapters, under PEFT's own names."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import PeftConfig, PeftType
from torch import nn

from fastbound.layers.settings import AdapterSettings, adapter_settings
from fastbound.models.files import FORMAT_VERSION, PEFT_TYPE
from fastbound.models.names import lookup

BIAS = ("none", "all", "fastbound_only")


@dataclass
class BoundedConfig(PeftConfig):
    """Bounded low-rank adapters as a PEFT method: ΔW = s·sin(ωB) sin(ωA), |ΔW_ij| <= bound.

    Args:
        r: rank of ΔW.
        target_modules: PEFT's: a list of name suffixes, a regular expression for the whole name, or
            "all-linear". None or "mlp": the MLP projections of a known `config.model_type`.
        exclude_modules: PEFT's: suffixes or a regular expression of what not to adapt.
        alpha: LoRA's `lora_alpha`: alpha / r is the slope of ΔW at zero. None means r.
        bound: the largest magnitude of an entry of ΔW; None means alpha; "0.5*spectral" half of
            σ₁(W) / sqrt(NK) of each layer's weight, and so any multiple, also of its root mean
            square ("2*rms"); "auto" means "4*rms".
        rank_pattern, alpha_pattern, bound_pattern: {suffix or regular expression: value} for layers
            that differ from `r`, `alpha` and `bound`. In an adapter that was put on a model,
            `bound_pattern` holds the number that each layer got, and so does its file.
        dropout: LoRA's `lora_dropout`, on what enters the low-rank term.
        bias: biases to train: "none", "all", or "fastbound_only" (of adapted layers).
        modules_to_save: other modules to train and to save whole.
        layers_to_transform: indices of the layers to adapt, of those that `target_modules` names.
        layers_pattern: name of the list of layers that these indices count in.
        init_weights: True: B starts at zero and the model is unchanged. False: B is random, which
            is for tests.
        shapes: [N, K] of each adapted layer; filled in, and compared when the adapter is loaded.

    Raises ValueError for settings that are out of range or contradict each other, and TypeError for
    a name that is none of these.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    alpha: float | None = None
    bound: float | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bound_pattern: dict[str, float | str | None] = field(default_factory=dict)
    dropout: float = 0.0
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True
    shapes: dict[str, list[int]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    # What `fastbound.save_adapter` writes beside these; they describe one file, not the adapter.
    fastbound_version: InitVar[str | None] = None
    tensors_sha256: InitVar[str | None] = None

    def __post_init__(self, fastbound_version: str | None, tensors_sha256: str | None) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version {self.format_version!r} was written by fastbound "
                f"{fastbound_version}; this one reads format_version {FORMAT_VERSION}"
            )
        if self.bias not in BIAS:
            raise ValueError(f"bias must be one of {', '.join(BIAS)}, got {self.bias!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if isinstance(self.target_modules, str | None):
            default = self.target_modules in (None, "mlp")
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None and not default:
                    raise ValueError(
                        f"{name} cannot be used when target_modules is a regular expression: "
                        "give a list of suffixes, or write the indices into the expression"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, the indices to adapt")
        adapter_settings(self.r, self.alpha, self.bound)
        for rank in self.rank_pattern.values():
            adapter_settings(rank, self.alpha, self.bound)
        for alpha in self.alpha_pattern.values():
            adapter_settings(self.r, alpha, self.bound)
        for bound in self.bound_pattern.values():
            adapter_settings(self.r, self.alpha, bound)

    def of_layer(self, name: str, base: nn.Module) -> AdapterSettings:
        """The settings of the layer of that name, the bound a number; a text reads base.weight."""
        settings = adapter_settings(
            lookup(self.rank_pattern, name, self.r),
            lookup(self.alpha_pattern, name, self.alpha),
            lookup(self.bound_pattern, name, self.bound),
            self.dropout,
        )
        weight: Any = base.weight
        if isinstance(settings.bound, str) and not weight.is_floating_point():
            raise ValueError(
                f'bound="{settings.bound}" cannot read the quantised weight of {name}: give a '
                "number, or load an adapter whose bounds were worked out on the unquantised model"
            )
        return settings.for_weight(weight)
