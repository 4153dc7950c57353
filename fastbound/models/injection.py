"""`inject`, `merge` and `disable_adapter`: adapt a model's linear layers in place, and undo it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from fastbound.layers.base import Adapted, features, is_adaptable
from fastbound.layers.conversion import convert, refusal, swap
from fastbound.layers.disabling import disabled
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.layers.mlp import FusedBoundedMLP
from fastbound.layers.settings import adapter_settings
from fastbound.models.adapted import (
    adapted_layers,
    came_with_adapter,
    fuse,
    injected_layers,
    other_adapters,
)
from fastbound.models.gradients import Loss
from fastbound.models.names import check_same_names
from fastbound.models.ranks import allocate_ranks, check_ranks, even_rank
from fastbound.models.report import InjectionReport, injection_report
from fastbound.models.targets import match
from fastbound.operator.partition import partition


def inject(
    model: nn.Module,
    rank: int | Mapping[str, int] | Literal["auto"] = 8,
    *,
    alpha: float | None = None,
    bound: float | str | None = "auto",
    dropout: float = 0.0,
    target_modules: str | Collection[str] = "mlp",
    adapter_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    form: str = "factors",
    omega: float | None = None,
    fuse_mlp: bool = True,
    forget: Loss | None = None,
    retain: Loss | None = None,
    budget: int | None = None,
) -> InjectionReport:
    """Replace linear layers of `model` by `FusedBoundedLinear` in place, and freeze all the rest.

    The model computes the same as before until it is trained, because B starts at zero. Weights are
    shared with the replaced layers, not copied. Everything is checked before the first layer is
    replaced: if this raises, the model is unchanged.

    Args:
        model: any module that holds `nn.Linear` or transformers' `Conv1D` layers.
        rank: the rank of each new layer; or a mapping from layer name to rank; or `"auto"`, which
            distributes `budget` by the gradients of two losses (`fastbound.allocate_ranks`;
            docs/ranks.md says when that helps).
        alpha, bound, dropout, adapter_dtype, backend, form, omega: settings of each new layer, see
            `FusedBoundedLinear`.
            If ranks differ, all layers still have the same alpha, so that the slope alpha / rank is
            smaller in a layer of higher rank. `alpha=None` then means the uniform rank that has the
            same number of parameters.
            A bound of `"auto"`, `"0.5*spectral"` or `"2*rms"` is computed for each layer from its
            own weight.
        target_modules: `"mlp"`, the MLP projections of a model whose `config.model_type` is known
            (GPT-2, GPT-Neo, GPT-NeoX, Phi-1.5/2/3, OPT, Llama, Mistral, Qwen2/3, Gemma 1/2/3,
            ViT); `"all-linear"`, every linear layer but the output head; or, as in PEFT, a list of
            name suffixes (`["q_proj", "mlp.c_fc"]`, each of one or more whole dotted parts) or a
            regular expression that matches the whole name.
        fuse_mlp: run each MLP block of a known form that holds replaced layers as one operator:
            it becomes a `FusedBoundedMLP`. Names, parameters and files are the same either way.
        forget, retain: for `rank="auto"`: functions that take the model and return the loss of a
            sample of rows to forget and to retain, or an iterable of several losses. Each is
            called once.
        budget: for `rank="auto"`: the largest total number of elements of A and B; None means as
            many as rank 8 everywhere has.

    Exact `nn.Linear` and `Conv1D` layers become `FusedBoundedLinear`. Quantised layers, other
    subclasses of `nn.Linear` and layers with forward or backward hooks, parametrizations or
    accelerate's offloading become `BoundedOverBase`, which calls the layer and adds to its result.
    Some layers are not replaced: sharded layers, layers with user-defined forward pre-hooks, layers
    tied to another module, and layers whose owner reads their weight instead of calling them
    (`nn.MultiheadAttention`'s out_proj, Mamba's dt_proj). The report names the reason for each.

    Gradient checkpointing: the non-reentrant form works as it is. The reentrant form computes no
    gradients if the input of a block requires none, as after a frozen embedding. In that case call
    transformers' `enable_input_require_grads()`; `gradient_checkpointing_enable()` calls it for
    language models.

    Returns:
        An `InjectionReport`, which lists what was replaced, fused and skipped; print it.

    Raises:
        TypeError: `model` is itself a linear layer, or `target_modules` has the wrong type.
        ValueError: the model already holds injected layers; `target_modules` matches nothing (near
            misses are named) or nothing that can be replaced; a setting is out of range for a
            layer; a rank is out of proportion to its layer; a mapping of ranks does not name
            exactly the layers to replace; `rank="auto"` lacks its losses; or `allocate_ranks`
            raises.
    """
    shapes, skipped = layers_to_adapt(model, target_modules)
    _check_rank(rank, forget, retain, budget)
    settings = partial(
        adapter_settings,
        bound=bound,
        dropout=dropout,
        adapter_dtype=adapter_dtype,
        backend=backend,
        form=form,
        omega=omega,
    )
    allocation = None
    if isinstance(rank, str) and forget is not None and retain is not None:
        settings(1, alpha)  # raises for bad settings before the losses are computed
        allocation = allocate_ranks(model, shapes, forget, retain, budget=budget)
        rank = allocation.ranks
    if isinstance(rank, Mapping):
        check_same_names("rank by name must name the layers to be replaced", rank, shapes)
        alpha = even_rank(rank, shapes) if alpha is None and omega is None else alpha
    ranks: Mapping[str, Any] = rank if isinstance(rank, Mapping) else dict.fromkeys(shapes, rank)
    each = {name: settings(ranks[name], alpha) for name in shapes}
    check_ranks(ranks, shapes)
    convert(model, each)
    if fuse_mlp:
        fuse(model)
    return replace(injection_report(model, skipped), allocation=allocation)


def layers_to_adapt(
    model: nn.Module, target_modules: str | Collection[str], *, loaded: bool = True
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The layers that :func:`inject` replaces, first name -> [N, K], and name -> reason for others.

    Args:
        loaded: False asks of a model without weights which layers it would be with them.

    Raises TypeError and ValueError as :func:`inject` does for a model and its targets.
    """
    if isinstance(model, FusedBoundedLinear) or is_adaptable(model):
        raise TypeError(
            f"model is a single {type(model).__name__}, which cannot be replaced in place: "
            "use FusedBoundedLinear.from_linear(layer)"
        )
    held = adapted_layers(model)
    if len(held) > len(injected_layers(model)):
        came_with = came_with_adapter(model)
        remedy = "fastbound.merge(model)" if came_with else "merge_and_unload() or unload()"
        raise ValueError(
            f"the model holds bounded adapters of PEFT (first: {next(iter(held))!r}): "
            f"call {remedy} first"
        )
    if held:
        raise ValueError(
            f"the model already holds {len(held)} injected layers (first: {next(iter(held))!r}): "
            "call fastbound.merge(model) first, and target all layers in one call of inject"
        )
    first = {module: name for name, module in model.named_modules()}
    names = match(model, target_modules)
    matched = list(dict.fromkeys(first[model.get_submodule(name)] for name in names))
    reasons = {name: refusal(model, name, loaded=loaded) for name in matched}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    chosen = [name for name, reason in reasons.items() if reason is None]
    if not chosen:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise ValueError(
            f"target_modules={target_modules!r} matches {len(skipped)} modules, "
            f"none of which can be replaced ({listed})"
        )
    return {name: features(model.get_submodule(name)) for name in chosen}, skipped


def _check_rank(rank: object, forget: Loss | None, retain: Loss | None, budget: int | None) -> None:
    given = {"forget": forget, "retain": retain, "budget": budget}
    if rank != "auto":
        if isinstance(rank, str):
            raise ValueError(
                f'rank must be an integer, ranks by layer name, or "auto", got {rank!r}'
            )
        for name, value in given.items():
            if value is not None:
                raise ValueError(f'{name} can only be given with rank="auto", but rank is {rank!r}')
        return
    missing = [name for name in ("forget", "retain") if given[name] is None]
    if missing:
        raise ValueError(
            f'rank="auto" chooses ranks by gradients: give {" and ".join(missing)}, a function of '
            "the model that returns the loss of a sample"
        )


def merge(model: nn.Module) -> nn.Module:
    """Merge ΔW into the weights: W + ΔW, added in fp32 and rounded once.

    Every `FusedBoundedLinear` and `FusedBoundedMLP` becomes a module of its original class again.
    This is done in place, one layer at a time, and the merged layers stay frozen. A transformers
    model also forgets the name that it was loaded from, because it is a different model now and
    adapters saved later must not name the original as their base. An adapter that transformers
    found beside a model and loaded with it, through PEFT, is merged as well, with the modules and
    tokens that were trained beside it. Returns the model, or
    the plain layer or block if `model` is itself a `FusedBoundedLinear` or `FusedBoundedMLP`.

    Raises:
        ValueError: there is no such layer; A, B or W + ΔW is not finite; a weight is spread over
            processes; an adapter of another method was loaded beside it; or ΔW cannot be merged
            into the weight of a base layer, for example because it is quantised. Nothing is merged
            then.
    """
    layers: Mapping[str, Adapted] = injected_layers(model)
    came_with = not layers and came_with_adapter(model)
    if came_with:
        layers = adapted_layers(model)
        others = other_adapters(model)
        if layers and others:
            raise ValueError(
                f"{next(iter(others))!r} holds an adapter of another method, which would stay: "
                "load the model through PEFT (PeftModel.from_pretrained) and call "
                "merge_and_unload()"
            )
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no FusedBoundedLinear: nothing to merge")
    for name, layer in layers.items():
        spread = partition(layer.weight)
        if spread is not None:
            raise ValueError(
                f"the weight of {name or 'the layer'!r} {spread}: save the adapter, load it into "
                "an unsharded model and merge there"
            )
        stands = layer.merge_obstacle()
        if stands is not None:
            raise ValueError(f"{name or 'the layer'!r} cannot be merged: {stands}")
    if isinstance(model, FusedBoundedLinear):
        return model.to_linear(merge=True)
    for layer in layers.values():
        swap(model, {cast(nn.Module, layer): layer.to_linear(merge=True)})
    if came_with:
        _unwrap_trained_modules(model)
        _forget_adapter(model)
    config: Any = getattr(model, "config", None)
    if getattr(config, "name_or_path", None):
        config.name_or_path = ""
    if isinstance(model, FusedBoundedMLP):
        return model.to_mlp()
    swap(model, {m: m.to_mlp() for m in model.modules() if isinstance(m, FusedBoundedMLP)})
    return model


def _unwrap_trained_modules(model: nn.Module) -> None:
    """Put what was trained beside the adapter (a head, tokens) in place of PEFT's wrappers."""
    from peft.utils import AuxiliaryTrainingWrapper

    wrapped: list[Any] = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for module in wrapped:
        plain = module.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
        swap(model, {module: plain})


def _forget_adapter(model: Any) -> None:
    """Undo what transformers keeps of an adapter besides its layers."""
    model._hf_peft_config_loaded = False
    del model.peft_config
    # The names of the adapter's tensors have replaced those of the model's own: save_pretrained
    # would write the weights under names that from_pretrained does not find.
    vars(model).pop("_weight_conversions", None)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within this context an injected model computes what its base model computes.

    This gives the reference model of NPO, DPO or a KL term without a second copy of the weights. It
    applies to the thread or asyncio task that enters it; others keep their adapters, unless the
    model is compiled: a compiled forward meanwhile runs without adapters in all threads. For PEFT
    models use their method of the same name, which applies to all threads.

    Raises ValueError if `model` holds no `FusedBoundedLinear`.
    """
    layers = injected_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no FusedBoundedLinear: nothing to disable"
            + (", and PEFT's adapters are disabled by PEFT" if adapted_layers(model) else "")
        )
    with disabled(layers.values()):
        yield
