"""Into a model and out of it: its linear layers become `FusedBoundedLinear` in place, and back."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fastbound.linear import FusedBoundedLinear, is_conv1d

_GATED = r"mlp\.(gate_proj|up_proj|down_proj)"
_FC = r"mlp\.(c_fc|c_proj)"  # with `mlp.`: GPT-2's attention has a c_proj too

# The MLP projections by `config.model_type`: the end of a layer's dotted name, from a dot on.
_MLP = {
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3": _GATED,  # with images: the language model's; the vision tower has fc1 and fc2
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


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did: printable, and as data.

    Attributes:
        replaced: dotted names of the layers that are now `FusedBoundedLinear`; a layer that the
            model holds under several names stands here once, under the first.
        trainable_parameters: elements of all A and B, which are all that still trains.
        total_parameters: elements of all parameters, A and B included.
        skipped: name -> reason, for what `target_modules` matched and could not be replaced.
    """

    replaced: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in self.replaced)
        share = self.trainable_parameters / self.total_parameters
        lines = [
            f"replaced {len(self.replaced)} layers",
            *(f"  {count} x {kind}" for kind, count in kinds.items()),
            f"training {self.trainable_parameters:,} of {self.total_parameters:,} parameters"
            f" ({share:.2%})",
            *(f"skipped {name}: {reason}" for name, reason in self.skipped.items()),
        ]
        return "\n".join(lines)


def inject(
    model: nn.Module,
    rank: int = 8,
    *,
    alpha: float | None = None,
    bound: float | Literal["auto"] | None = None,
    target_modules: str | Collection[str] = "mlp",
    adapter_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> InjectionReport:
    """Replace linear layers of `model` by `FusedBoundedLinear`, in place, and freeze all the rest.

    Right after it the model computes what it did before: B is zero. Weights are shared with the
    replaced layers, not copied. Everything is checked before the first layer is replaced: when this
    raises, the model is as it was.

    Args:
        model: any module that holds `nn.Linear` or transformers' `Conv1D` layers.
        rank, alpha, bound, adapter_dtype, backend: of each new layer, see `FusedBoundedLinear`.
            `bound="auto"` is worked out for each layer from its own weight.
        target_modules: `"mlp"`, the MLP projections of a model whose `config.model_type` is known
            (GPT-2, GPT-Neo, GPT-NeoX, Phi-1.5/2/3, OPT, Llama, Mistral, Qwen2/3, Gemma 1/2/3,
            ViT); or, with PEFT's meaning, a list of name suffixes (`["q_proj", "mlp.c_fc"]`, each
            a whole dotted end of a name) or a regular expression for the whole name.

    Only exact `nn.Linear` and `Conv1D` are replaced. Subclasses, quantised and sharded layers,
    layers with hooks or parametrizations and layers tied to another module are left alone, with
    the reason in the report.

    With gradient checkpointing: the non-reentrant form works as it is. The reentrant form finds no
    gradient to keep when the input of a block needs none, as behind a frozen embedding;
    transformers' `enable_input_require_grads()` mends that, and its own switch for checkpointing
    calls it for language models.

    Raises:
        TypeError: `model` is itself a linear layer, or `target_modules` is of another type.
        ValueError: the model already holds injected layers, `target_modules` matches nothing (near
            misses are named) or nothing that can be replaced, or a layer refuses its arguments.
    """
    if isinstance(model, FusedBoundedLinear) or _is_linear(model):
        raise TypeError(
            f"model is a single {type(model).__name__}, which cannot be replaced in place: "
            "use FusedBoundedLinear.from_linear(layer)"
        )
    held = injected_layers(model)
    if held:
        raise ValueError(
            f"the model already holds {len(held)} injected layers (first: {next(iter(held))!r}): "
            "call fastbound.merge(model) first, and target all layers in one call of inject"
        )
    first = {module: name for name, module in model.named_modules()}
    names = _match(model, target_modules)
    matched = list(dict.fromkeys(first[model.get_submodule(name)] for name in names))
    reasons = {name: refusal(model, name) for name in matched}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    chosen = [name for name, reason in reasons.items() if reason is None]
    if not chosen:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise ValueError(
            f"target_modules={target_modules!r} matches {len(skipped)} modules, "
            f"none of which can be replaced ({listed})"
        )
    each: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "bound": bound,
        "adapter_dtype": adapter_dtype,
        "backend": backend,
    }
    convert(model, dict.fromkeys(chosen, each))
    return describe(model, skipped)


def merge(model: nn.Module) -> nn.Module:
    """Turn every `FusedBoundedLinear` back into its original class, with ΔW in the weight.

    ΔW is added in fp32 and rounded once. The work is done in place, one layer at a time, and the
    merged layers stay frozen. Returns the model, or the plain layer when `model` is itself a
    `FusedBoundedLinear`.

    Raises:
        ValueError: there is no such layer, or an A or B holds a NaN or an infinity (nothing is
            merged then).
    """
    layers = injected_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no FusedBoundedLinear: nothing to merge")
    for name, layer in layers.items():
        for factor, tensor in (("A", layer.adapter.A), ("B", layer.adapter.B)):
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"adapter.{factor} of {name or 'the layer'!r} holds a NaN or an infinity: "
                    "go back to an adapter saved earlier"
                )
    if isinstance(model, FusedBoundedLinear):
        return model.to_linear(merge=True)
    for layer in layers.values():
        _swap(model, {layer: layer.to_linear(merge=True)})
    return model


def injected_layers(model: nn.Module) -> dict[str, FusedBoundedLinear]:
    """Name -> layer, for every `FusedBoundedLinear` of `model`; a shared one once, first name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedBoundedLinear)}


def refusal(model: nn.Module, name: str) -> str | None:
    """Why the module of that name cannot be replaced, or None when it can."""
    layer = model.get_submodule(name)
    if not _is_linear(layer):
        return f"is a {type(layer).__name__}: only exact nn.Linear and Conv1D are replaced"
    if _hooked(layer):
        return "has forward or backward hooks, which a replacement would lose"
    if "forward" in vars(layer) or hasattr(layer, "_hf_hook"):
        return "has a forward of its own (accelerate's offloading?), which a replacement would lose"
    weight = layer.weight
    if type(weight) is not nn.Parameter:
        kind = type(weight).__name__
        return f"its weight is a {kind}, not a plain parameter: inject before sharding"
    if hasattr(weight, "ds_id"):
        return "its weight is partitioned by DeepSpeed ZeRO-3: inject before deepspeed.initialize"
    if weight.is_meta:
        return "its weight is on the meta device: load the model first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    for owner, module in model.named_modules():
        if module is not layer and any(p is weight for p in module.parameters(recurse=False)):
            return f"its weight is tied to {owner}, which a merge would untie"
    return None


def convert(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the named layers by `FusedBoundedLinear.from_linear(layer, **settings[name])`.

    Freezes all other parameters. All layers are made before the first is put in place; when one
    refuses its settings, the model is left as it was.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    made: dict[nn.Module, nn.Module] = {}
    try:
        for name, each in settings.items():
            layer = model.get_submodule(name)
            made[layer] = FusedBoundedLinear.from_linear(layer, **each)
    except BaseException:
        for parameter in trained:  # the layers made so far have frozen the weights they share
            parameter.requires_grad_(True)
        raise
    for parameter in trained:
        parameter.requires_grad_(False)
    _swap(model, made)


def describe(model: nn.Module, skipped: Mapping[str, str] | None = None) -> InjectionReport:
    """The report on an injected model."""
    return InjectionReport(
        replaced=tuple(injected_layers(model)),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
        skipped=dict(skipped or {}),
    )


def _swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[module]` wherever `module` hangs in `model`, under every name it has."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[module])


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def _hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _match(model: nn.Module, target_modules: str | Collection[str]) -> list[str]:
    """The names of modules that `target_modules` means, in the model's order."""
    if isinstance(target_modules, str):
        return _match_pattern(model, target_modules)
    suffixes = list(target_modules)
    if not all(isinstance(suffix, str) for suffix in suffixes):
        raise TypeError(f"target_modules must hold strings, got {suffixes!r}")
    if not suffixes:
        raise ValueError("target_modules is empty: give 'mlp', suffixes or a regular expression")
    names = _names(model)
    matches = {s: [n for n in names if n == s or n.endswith(f".{s}")] for s in suffixes}
    for suffix, found in matches.items():
        if not found:
            raise ValueError(
                f"target_modules: no module's name ends in {suffix!r}; {_near(model, suffix)}"
            )
    wanted = {name for found in matches.values() for name in found}
    return [name for name in names if name in wanted]


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
            f"{_near(model, target_modules)}; to match the end of a name give a list of suffixes"
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


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def _suffixes(model: nn.Module) -> list[str]:
    """The last one and two parts of the names of the linear layers, sorted, without numbers."""
    names = [name.split(".") for name, module in model.named_modules() if _is_linear(module)]
    ends = {".".join(parts[-n:]) for parts in names for n in (1, 2)}
    return sorted(end for end in ends if not re.search(r"(^|\.)\d+(\.|$)", end))


def _near(model: nn.Module, target: str) -> str:
    near = difflib.get_close_matches(target, _suffixes(model), n=3, cutoff=0.5)
    return f"near misses: {', '.join(near)}" if near else _linear_kinds(model)


def _linear_kinds(model: nn.Module) -> str:
    ends = [end for end in _suffixes(model) if "." not in end]
    return f"its linear layers end in: {', '.join(ends) or '(numbers only, or there is none)'}"
