"""Into a model and out of it: its linear layers become `FusedBoundedLinear` in place, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from fastbound.layers.base import features, is_adaptable
from fastbound.layers.conversion import convert, refusal, swap
from fastbound.layers.disabling import disabled
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.layers.mlp import FusedBoundedMLP
from fastbound.layers.settings import adapter_settings
from fastbound.models.adapted import adapted_layers, fuse, injected_layers
from fastbound.models.names import check_same_names
from fastbound.models.ranks import Loss, allocate_ranks, check_ranks, even_rank
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
    """Replace linear layers of `model` by `FusedBoundedLinear`, in place, and freeze all the rest.

    Right after it the model computes what it did before: B is zero. Weights are shared with the
    replaced layers, not copied. Everything is checked before the first layer is replaced: when this
    raises, the model is as it was.

    Args:
        model: any module that holds `nn.Linear` or transformers' `Conv1D` layers.
        rank: of each new layer; or the rank of each by name; or `"auto"`, which spreads `budget`
            by the gradients of two losses (`fastbound.allocate_ranks`). docs/ranks.md
            says where that helps.
        alpha, bound, dropout, adapter_dtype, backend, form, omega: of each new layer, see
            `FusedBoundedLinear`.
            Where ranks differ alpha does not: the slope alpha / rank is less where the rank is
            more. None is then the rank that the same parameters buy everywhere.
            A bound of `"auto"`, `"0.5*spectral"` or `"2*rms"` is worked out for each layer from its
            own weight.
        target_modules: `"mlp"`, the MLP projections of a model whose `config.model_type` is known
            (GPT-2, GPT-Neo, GPT-NeoX, Phi-1.5/2/3, OPT, Llama, Mistral, Qwen2/3, Gemma 1/2/3,
            ViT); or, with PEFT's meaning, a list of name suffixes (`["q_proj", "mlp.c_fc"]`, each
            a whole dotted end of a name) or a regular expression for the whole name.
        fuse_mlp: run each MLP block of a known form that holds replaced layers as one operator:
            it becomes a `FusedBoundedMLP`. Names, parameters and files are the same either way.
        forget, retain: for `rank="auto"`: functions of the model that give the loss of a sample of
            rows to forget and to retain, or several losses one after the other. Called once each.
        budget: for `rank="auto"`: most elements of all A and B; None: as many as rank 8 takes.

    Exact `nn.Linear` and `Conv1D` layers become `FusedBoundedLinear`. Quantised layers, other
    subclasses of `nn.Linear` and layers with forward or backward hooks, parametrizations or
    accelerate's offloading become `BoundedOverBase`, which calls the layer and adds to its result.
    Sharded layers, layers with forward pre-hooks of the user's, layers tied to another module and
    those whose owner reads their weight instead of calling them (`nn.MultiheadAttention`'s
    out_proj, Mamba's dt_proj) are left alone. The report has the reason for each.

    With gradient checkpointing: the non-reentrant form works as it is. The reentrant form finds no
    gradient to keep when the input of a block needs none, as behind a frozen embedding;
    transformers' `enable_input_require_grads()` mends that, and its own switch for checkpointing
    calls it for language models.

    Raises:
        TypeError: `model` is itself a linear layer, or `target_modules` is of another type.
        ValueError: the model already holds injected layers, `target_modules` matches nothing (near
            misses are named) or nothing that can be replaced, a layer refuses its arguments, a rank
            is out of proportion to its layer, ranks by name are not those of the layers,
            `rank="auto"` lacks its losses, or `allocate_ranks` raises.
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
    chosen, skipped = _chosen(model, target_modules)
    _check_rank(rank, forget, retain, budget)
    shapes = {name: features(model.get_submodule(name)) for name in chosen}
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
        settings(1, alpha)  # refused before the losses are asked
        allocation = allocate_ranks(model, shapes, forget, retain, budget=budget)
        rank = allocation.ranks
    if isinstance(rank, Mapping):
        check_same_names("rank by name must name the layers to be replaced", rank, shapes)
        alpha = even_rank(rank, shapes) if alpha is None and omega is None else alpha
    ranks: Mapping[str, Any] = rank if isinstance(rank, Mapping) else dict.fromkeys(shapes, rank)
    each = {name: settings(ranks[name], alpha) for name in chosen}
    check_ranks(ranks, shapes)
    convert(model, each)
    if fuse_mlp:
        fuse(model)
    return replace(injection_report(model, skipped), allocation=allocation)


def _chosen(
    model: nn.Module, target_modules: str | Collection[str]
) -> tuple[list[str], dict[str, str]]:
    """First names of the layers to replace; and name -> reason of those that cannot be.

    Raises ValueError where nothing can be replaced.
    """
    first = {module: name for name, module in model.named_modules()}
    names = match(model, target_modules)
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
    return chosen, skipped


def _check_rank(rank: object, forget: Loss | None, retain: Loss | None, budget: int | None) -> None:
    given = {"forget": forget, "retain": retain, "budget": budget}
    if rank != "auto":
        if isinstance(rank, str):
            raise ValueError(f'rank is a number, numbers by name, or "auto"; got {rank!r}')
        for name, value in given.items():
            if value is not None:
                raise ValueError(f'{name} is for rank="auto", and rank is {rank!r}')
        return
    missing = [name for name in ("forget", "retain") if given[name] is None]
    if missing:
        raise ValueError(
            f'rank="auto" spreads ranks by gradients: give {" and ".join(missing)}, a function of '
            "the model that returns the loss of a sample"
        )


def merge(model: nn.Module) -> nn.Module:
    """Turn every `FusedBoundedLinear` back into its original class, with ΔW in the weight.

    So does every `FusedBoundedMLP`. ΔW is added in fp32 and rounded once. The work is done in
    place, one layer at a time, and the merged layers stay frozen. A transformers model is no longer
    the one that it was loaded from, and forgets that name, which an adapter put on it later would
    give as its base. Returns the model, or the plain layer or block when `model` is itself a
    `FusedBoundedLinear` or `FusedBoundedMLP`.

    Raises:
        ValueError: there is no such layer, an A or B holds a NaN or an infinity, W + ΔW would hold
            one, a weight is spread over processes, or a layer is over a base whose weight cannot
            take ΔW, such as a quantised one. Nothing is merged then.
    """
    layers = injected_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no FusedBoundedLinear: nothing to merge")
    for name, layer in layers.items():
        spread = partition(layer.weight)
        if spread is not None:
            raise ValueError(
                f"the weight of {name or 'the layer'!r} {spread}: save the adapter, load it into a "
                "whole model and merge it there"
            )
        stands = layer.merge_obstacle()
        if stands is not None:
            raise ValueError(f"{name or 'the layer'!r} cannot be merged: {stands}")
    if isinstance(model, FusedBoundedLinear):
        return model.to_linear(merge=True)
    for layer in layers.values():
        swap(model, {layer: layer.to_linear(merge=True)})
    config: Any = getattr(model, "config", None)
    if getattr(config, "name_or_path", None):
        config.name_or_path = ""
    if isinstance(model, FusedBoundedMLP):
        return model.to_mlp()
    swap(model, {m: m.to_mlp() for m in model.modules() if isinstance(m, FusedBoundedMLP)})
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside it an injected model computes what its base does, from the same weights.

    The reference of NPO, DPO or a KL term without a second model. It holds for the thread or
    asyncio task that enters it; others go on with their adapters, unless the model is compiled: a
    compiled forward runs without them in all threads meanwhile. PEFT's models have a method of this
    name, for all threads.

    Raises ValueError when `model` holds no `FusedBoundedLinear`.
    """
    layers = injected_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no FusedBoundedLinear: nothing to disable")
    with disabled(layers.values()):
        yield
