"""The adapters that the map compares: each a way to make ΔW of the same two factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbound import FusedBoundedLinear
from fastbound.errors import InputError, did_you_mean, positive
from fastbound.layers.bounds import bound_of_weight, weight_bound
from fastbound.layers.conversion import swap
from fastbound.models.targets import match

KINDS = ("lora", "lora-clamp", "lora-clip", "lora-decay", "sine", "tanh", "product")
_BOUNDED = ("sine", "tanh", "product")
_FORMS = {"sine": "factors", "product": "product"}  # those that are FusedBoundedLinear itself
_OMEGA = "omega="
ADAPTIVE = "+ranks"
CLAMP = 1.0  # of "lora-clamp": no entry of A and B beyond
CLIP = 1.0  # of "lora-clip": the norm of the whole gradient
DECAY = 0.1  # of "lora-decay": AdamW's weight decay of A and B


@dataclass(frozen=True)
class Adapter:
    """One adapter of the grid.

    Attributes:
        name: as it was asked for: `kind`, `kind@alpha`, `kind@BOUND` or `product@omega=X`, with
            `+ranks` or not.
        kind: one of `KINDS`.
        bound: in units of the layer's weight, as "0.5*spectral"; None means bound = alpha for a
            bounded kind, and no bound for the others.
        omega: of `product@omega=X`, which is sin(X·B A): bound 1, alpha X·rank.
        adaptive: the same parameters, with ranks as `fastbound.models.ranks` spreads them.
    """

    name: str
    kind: str
    bound: str | None = None
    omega: float | None = None
    adaptive: bool = False

    @property
    def bounded(self) -> bool:
        return self.kind in _BOUNDED

    def bound_in(self, weight: Tensor, alpha: float) -> float:
        """The bound in this layer; infinite where the kind has none."""
        if not self.bounded:
            return math.inf
        if self.omega is not None:
            return 1.0
        return alpha if self.bound is None else bound_of_weight(self.bound, weight)


def parse_adapter(text: str) -> Adapter:
    """`lora` and its kin, or `sine`, `tanh`, `product` with `@alpha`, `@BOUND` or `@omega=X`.

    BOUND is a multiple such as `0.5*spectral`; a number alone is a multiple of RMS(W). X is the
    paper's frequency of `product` under its bound of 1. With `+ranks` behind it the ranks are
    spread by gradients.

    Raises:
        InputError: an unknown kind, a bound where there is none, or none where there must be one.
    """
    adaptive = text.endswith(ADAPTIVE)
    kind, at, bound = text.removesuffix(ADAPTIVE).partition("@")
    if kind not in KINDS:
        raise InputError(
            f"unknown adapter {text!r}; choose from {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        )
    if kind not in _BOUNDED:
        if at:
            raise InputError(f"adapter {text!r}: {kind} has no bound, drop @{bound}")
        return Adapter(text, kind, adaptive=adaptive)
    if bound == "alpha":
        return Adapter(text, kind, adaptive=adaptive)
    if bound.startswith(_OMEGA) and kind == "product":
        return Adapter(text, kind, omega=_frequency(text, bound), adaptive=adaptive)
    bound = bound if "*" in bound else f"{bound}*rms"
    try:
        weight_bound(bound)
    except ValueError as error:
        raise InputError(
            f"adapter {text!r}: give {kind}@alpha, or {kind}@BOUND with a positive multiple "
            "such as 0.5*spectral, or a number for so many RMS(W)"
        ) from error
    return Adapter(text, kind, bound, adaptive=adaptive)


def _frequency(text: str, bound: str) -> float:
    try:
        return positive("omega", float(bound.removeprefix(_OMEGA)))
    except ValueError as error:
        raise InputError(
            f"adapter {text!r}: give product@omega=X with a positive X, such as product@omega=100"
        ) from error


class ComparedLinear(nn.Module):
    """A frozen linear layer plus ΔW of factors A and B, in plain PyTorch: `y = x Wᵀ + b + x ΔWᵀ`.

    Near zero every kind is LoRA with slope alpha / rank.

    Args:
        layer: the frozen layer.
        kind: see :func:`delta_of`; any but product.
        bound: of the kinds that have one.
    """

    def __init__(
        self, layer: nn.Linear, kind: str, rank: int, *, alpha: float, bound: float
    ) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.kind, self.rank, self.alpha, self.bound = kind, rank, alpha, bound
        self.A = nn.Parameter(torch.empty(rank, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        A, B = factors_of(self.kind, self.A, self.B, alpha=self.alpha, bound=self.bound)
        x = x.to(self.layer.weight)
        return self.layer(x) + F.linear(F.linear(x, A.to(x)), B.to(x))

    def delta_weight(self) -> Tensor:
        """ΔW, `[N, K]`."""
        return delta_of(self.kind, self.A, self.B, alpha=self.alpha, bound=self.bound)


def delta_of(kind: str, A: Tensor, B: Tensor, *, alpha: float, bound: float) -> Tensor:
    """ΔW by its formula; r is the number of rows of A.

    - lora and its kin: (alpha / r) B A
    - sine, tanh: (bound / r) f(ωB) f(ωA), ω = sqrt(alpha / bound)
    - product: bound · sin((alpha / (r · bound)) B A)
    """
    rank = A.shape[0]
    if kind == "product":
        return bound * torch.sin((alpha / (rank * bound)) * (B @ A))
    A, B = factors_of(kind, A, B, alpha=alpha, bound=bound)
    return B @ A


def factors_of(
    kind: str, A: Tensor, B: Tensor, *, alpha: float, bound: float
) -> tuple[Tensor, Tensor]:
    """The two factors whose product ΔW is, of every kind but product."""
    rank = A.shape[0]
    if kind not in _BOUNDED:
        return A, (alpha / rank) * B
    f: Callable[[Tensor], Tensor] = torch.sin if kind == "sine" else torch.tanh
    omega = math.sqrt(alpha / bound)
    return f(omega * A), (bound / rank) * f(omega * B)


Adapted = dict[str, ComparedLinear | FusedBoundedLinear]


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The MLP projections that are plain linear layers."""
    found = ((name, model.get_submodule(name)) for name in match(model, "mlp"))
    return {name: layer for name, layer in found if type(layer) is nn.Linear}


def adapt(
    model: nn.Module, adapter: Adapter, ranks: Mapping[str, int], *, alpha: float, seed: int
) -> Adapted:
    """Put `adapter` on the layers that `ranks` names, in place, and freeze all the rest.

    Sine and product are `FusedBoundedLinear` itself. The factors start alike whatever the kind.
    """
    model.requires_grad_(False)
    made: Adapted = {}
    new: dict[nn.Module, nn.Module] = {}
    torch.manual_seed(seed)
    for name, layer in targets(model).items():
        rank = ranks[name]
        bound = adapter.bound_in(layer.weight, alpha)
        if adapter.kind in _FORMS:
            made[name] = FusedBoundedLinear.from_linear(
                layer,
                rank,
                alpha=alpha if adapter.omega is None else None,
                omega=adapter.omega,
                bound=bound,
                form=_FORMS[adapter.kind],
            )
        else:
            made[name] = ComparedLinear(layer, adapter.kind, rank, alpha=alpha, bound=bound)
        new[layer] = made[name]
    swap(model, new)
    return made
