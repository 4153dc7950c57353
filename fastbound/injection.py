"""Into a model and out of it: its linear layers become `FusedBoundedLinear` in place, and back."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fastbound.conversion import convert, refusal, swap
from fastbound.linear import Adapted, FusedBoundedLinear
from fastbound.mlp import FusedBoundedMLP, obstacle
from fastbound.over_base import BoundedOverBase, is_adaptable
from fastbound.partition import gathered_modules, partition

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
        over_base: name -> reason, for the replaced layers that call the layer they replace
            (`BoundedOverBase`): a quantised one, one with hooks.
        fused: dotted names of the MLP blocks that run as one operator, see `FusedBoundedMLP`.
        unfused: name -> reason, for every other module that holds replaced layers: these run layer
            by layer.
    """

    replaced: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    over_base: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    unfused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        share = self.trainable_parameters / self.total_parameters
        lines = [
            f"replaced {len(self.replaced)} layers",
            *(f"  {count} x {kind}" for kind, count in _kinds(self.replaced).items()),
            *(f"  over it, {r}: {c} x {k}" for r, k, c in _reasons(self.over_base)),
            f"fused {len(self.fused)} MLP blocks",
            *(f"  {count} x {kind}" for kind, count in _kinds(self.fused).items()),
            *(f"  not {c} x {k or 'the model'}: {r}" for r, k, c in _reasons(self.unfused)),
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
    dropout: float = 0.0,
    target_modules: str | Collection[str] = "mlp",
    adapter_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    fuse_mlp: bool = True,
) -> InjectionReport:
    """Replace linear layers of `model` by `FusedBoundedLinear`, in place, and freeze all the rest.

    Right after it the model computes what it did before: B is zero. Weights are shared with the
    replaced layers, not copied. Everything is checked before the first layer is replaced: when this
    raises, the model is as it was.

    Args:
        model: any module that holds `nn.Linear` or transformers' `Conv1D` layers.
        rank, alpha, bound, dropout, adapter_dtype, backend: of each new layer, see
            `FusedBoundedLinear`. `bound="auto"` is worked out for each layer from its own weight.
        target_modules: `"mlp"`, the MLP projections of a model whose `config.model_type` is known
            (GPT-2, GPT-Neo, GPT-NeoX, Phi-1.5/2/3, OPT, Llama, Mistral, Qwen2/3, Gemma 1/2/3,
            ViT); or, with PEFT's meaning, a list of name suffixes (`["q_proj", "mlp.c_fc"]`, each
            a whole dotted end of a name) or a regular expression for the whole name.
        fuse_mlp: run each MLP block of a known form that holds replaced layers as one operator:
            it becomes a `FusedBoundedMLP`. Names, parameters and files are the same either way.

    Exact `nn.Linear` and `Conv1D` layers become `FusedBoundedLinear`. Quantised layers, other
    subclasses of `nn.Linear` and layers with forward or backward hooks, parametrizations or
    accelerate's offloading become `BoundedOverBase`, which calls the layer and adds to its result.
    Sharded layers, layers with forward pre-hooks of the user's and layers tied to another module
    are left alone. The report has the reason for each.

    With gradient checkpointing: the non-reentrant form works as it is. The reentrant form finds no
    gradient to keep when the input of a block needs none, as behind a frozen embedding;
    transformers' `enable_input_require_grads()` mends that, and its own switch for checkpointing
    calls it for language models.

    Raises:
        TypeError: `model` is itself a linear layer, or `target_modules` is of another type.
        ValueError: the model already holds injected layers, `target_modules` matches nothing (near
            misses are named) or nothing that can be replaced, or a layer refuses its arguments.
    """
    if isinstance(model, FusedBoundedLinear) or is_adaptable(model):
        raise TypeError(
            f"model is a single {type(model).__name__}, which cannot be replaced in place: "
            "use FusedBoundedLinear.from_linear(layer)"
        )
    held = adapted_layers(model)
    if len(held) > len(injected_layers(model)):
        raise ValueError(
            f"the model holds bounded adapters of PEFT (first: {next(iter(held))!r}): "
            "call merge_and_unload() or unload() first"
        )
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
        "dropout": dropout,
        "adapter_dtype": adapter_dtype,
        "backend": backend,
    }
    convert(model, dict.fromkeys(chosen, each))
    if fuse_mlp:
        fuse(model)
    return describe(model, skipped)


def merge(model: nn.Module) -> nn.Module:
    """Turn every `FusedBoundedLinear` back into its original class, with ΔW in the weight.

    So does every `FusedBoundedMLP`. ΔW is added in fp32 and rounded once. The work is done in
    place, one layer at a time, and the merged layers stay frozen. Returns the model, or the plain
    layer or block when `model` is itself a `FusedBoundedLinear` or `FusedBoundedMLP`.

    Raises:
        ValueError: there is no such layer, an A or B holds a NaN or an infinity, a weight is
            spread over processes, or a layer is over a base whose weight cannot take ΔW, such as a
            quantised one (nothing is merged then).
    """
    layers = injected_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no FusedBoundedLinear: nothing to merge")
    for name, layer in layers.items():
        stands = layer.merge_obstacle() if isinstance(layer, BoundedOverBase) else None
        if stands is not None:
            raise ValueError(f"{name or 'the layer'!r} cannot be merged: {stands}")
        spread = partition(layer.weight)
        if spread is not None:
            raise ValueError(
                f"the weight of {name or 'the layer'!r} {spread}: save the adapter, load it into a "
                "whole model and merge it there"
            )
        for factor, tensor in (("A", layer.adapter.A), ("B", layer.adapter.B)):
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"adapter.{factor} of {name or 'the layer'!r} holds a NaN or an infinity: "
                    "go back to an adapter saved earlier"
                )
    if isinstance(model, FusedBoundedLinear):
        return model.to_linear(merge=True)
    for layer in layers.values():
        swap(model, {layer: layer.to_linear(merge=True)})
    if isinstance(model, FusedBoundedMLP):
        return model.to_mlp()
    swap(model, {m: m.to_mlp() for m in model.modules() if isinstance(m, FusedBoundedMLP)})
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside it an injected model computes what its base does, from the same weights.

    The reference of NPO, DPO or a KL term without a second model. PEFT's models have a method of
    this name.

    Raises ValueError when `model` holds no `FusedBoundedLinear`.
    """
    layers = injected_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no FusedBoundedLinear: nothing to disable")
    before = {layer: layer.enabled for layer in layers.values()}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Name -> layer, as `injected_layers`, PEFT's bounded layers included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def injected_layers(model: nn.Module) -> dict[str, FusedBoundedLinear]:
    """Name -> layer, for every `FusedBoundedLinear` of `model`; a shared one once, first name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedBoundedLinear)}


def fuse(model: nn.Module) -> None:
    """Put a `FusedBoundedMLP` in the place of every block that can be one, inside `model`."""
    blocks = [m for m in adapted_blocks(model).values() if not isinstance(m, FusedBoundedMLP)]
    swap(model, {m: FusedBoundedMLP(m) for m in blocks if m is not model and obstacle(m) is None})


def adapted_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, for every module that holds an adapted layer as a direct part."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(child, Adapted) for child in module.children())
    }


def unfused_reason(name: str, block: nn.Module, gathered: bool = False) -> str | None:
    """Why a module of `adapted_blocks` runs layer by layer, or None where it is one operator."""
    reason = obstacle(block, gathered)
    if reason is not None or isinstance(block, FusedBoundedMLP):
        return reason
    if not name:
        return "is the model itself, which is not replaced in place: use FusedBoundedMLP.from_mlp"
    return "was injected with fuse_mlp=False"


def describe(model: nn.Module, skipped: Mapping[str, str] | None = None) -> InjectionReport:
    """The report on an injected model."""
    inside = gathered_modules(model)
    blocks = adapted_blocks(model)
    reasons = {name: unfused_reason(name, m, m in inside) for name, m in blocks.items()}
    layers = adapted_layers(model)
    return InjectionReport(
        replaced=tuple(layers),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
        skipped=dict(skipped or {}),
        over_base={n: m.reason for n, m in layers.items() if isinstance(m, BoundedOverBase)},
        fused=tuple(name for name, reason in reasons.items() if reason is None),
        unfused={name: reason for name, reason in reasons.items() if reason is not None},
    )


def _kinds(names: Iterable[str]) -> Counter[str]:
    """How many names there are of each kind, `layers.0.mlp` and `layers.1.mlp` being one kind."""
    return Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names)


def _reasons(named: Mapping[str, str]) -> Iterable[tuple[str, str, int]]:
    """Each reason with the kinds of names that it stands for, and how many."""
    for reason in dict.fromkeys(named.values()):
        for kind, count in _kinds(n for n, r in named.items() if r == reason).items():
            yield reason, kind, count


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
                f"target_modules: no module's name ends in {suffix!r}; {near_misses(model, suffix)}"
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
            f"{near_misses(model, target_modules)}; "
            "to match the end of a name give a list of suffixes"
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


def mlp_suffixes(model: nn.Module) -> set[str]:
    """The MLP projections of a known model as suffixes; ValueError where the model is unknown."""
    found = (name.split(".") for name in _match_pattern(model, "mlp"))
    return {".".join(p[-1:] if p[-2].isdigit() else p[-2:]) for p in found}


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def _is_target(module: nn.Module) -> bool:
    return is_adaptable(module) or isinstance(module, Adapted)


def _suffixes(model: nn.Module) -> list[str]:
    """The last one and two parts of the names of the linear layers, sorted, without numbers."""
    names = [name.split(".") for name, module in model.named_modules() if _is_target(module)]
    ends = {".".join(parts[-n:]) for parts in names for n in (1, 2)}
    return sorted(end for end in ends if not re.search(r"(^|\.)\d+(\.|$)", end))


def near_misses(model: nn.Module, target: str) -> str:
    """The names that a misspelt target may have meant, or what there is."""
    near = difflib.get_close_matches(target, _suffixes(model), n=3, cutoff=0.5)
    return f"near misses: {', '.join(near)}" if near else _linear_kinds(model)


def _linear_kinds(model: nn.Module) -> str:
    ends = [end for end in _suffixes(model) if "." not in end]
    return f"its linear layers end in: {', '.join(ends) or '(numbers only, or there is none)'}"
