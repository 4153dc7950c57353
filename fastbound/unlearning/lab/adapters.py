"""The adapters that the map compares: each a way to make ΔW of the same two factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbound import FusedBoundedLinear
from fastbound.errors import InputError
from fastbound.layers.bounds import bound_of_weight, weight_bound
from fastbound.layers.conversion import swap

KINDS = ("lora", "lora-clamp", "lora-clip", "sine", "tanh", "product")
_BOUNDED = ("sine", "tanh", "product")
ADAPTIVE = "+ranks"
CLAMP = 1.0  # of "lora-clamp": no entry of A and B beyond
CLIP = 1.0  # of "lora-clip": the norm of the whole gradient


@dataclass(frozen=True)
class Adapter:
    """One adapter of the grid.

    Attributes:
        name: as it was asked for: `kind`, `kind@alpha` or `kind@BOUND`, with `+ranks` or not.
        kind: `lora`, `lora-clamp`, `lora-clip`, `sine`, `tanh` or `product`.
        bound: in units of the layer's weight, as "0.5*spectral"; None means bound = alpha for a
            bounded kind, and no bound for the others.
        adaptive: the same parameters, with ranks as `fastbound.models.ranks` spreads them.
    """

    name: str
    kind: str
    bound: str | None = None
    adaptive: bool = False

    @property
    def bounded(self) -> bool:
        return self.kind in _BOUNDED

    def bound_in(self, weight: Tensor, alpha: float) -> float:
        """The bound in this layer; infinite where the kind has none."""
        if not self.bounded:
            return math.inf
        return alpha if self.bound is None else bound_of_weight(self.bound, weight)


def parse_adapter(text: str) -> Adapter:
    """`lora`, `lora-clamp`, `lora-clip`, or `sine`, `tanh`, `product` with `@alpha` or `@BOUND`.

    BOUND is a multiple such as `0.5*spectral`; a number alone is a multiple of RMS(W). With
    `+ranks` behind it the ranks are spread by gradients.

    Raises:
        InputError: an unknown kind, a bound where there is none, or none where there must be one.
    """
    adaptive = text.endswith(ADAPTIVE)
    kind, at, bound = text.removesuffix(ADAPTIVE).partition("@")
    if kind not in KINDS:
        raise InputError(f"unknown adapter {text!r}: choose of {', '.join(KINDS)}")
    if kind not in _BOUNDED:
        if at:
            raise InputError(f"adapter {text!r}: {kind} has no bound, drop @{bound}")
        return Adapter(text, kind, None, adaptive)
    if bound == "alpha":
        return Adapter(text, kind, None, adaptive)
    bound = bound if "*" in bound else f"{bound}*rms"
    try:
        weight_bound(bound)
    except ValueError as error:
        raise InputError(
            f"adapter {text!r}: give {kind}@alpha, or {kind}@BOUND with a positive multiple "
            "such as 0.5*spectral, or a number for so many RMS(W)"
        ) from error
    return Adapter(text, kind, bound, adaptive)


class ComparedLinear(nn.Module):
    """A frozen linear layer plus ΔW of factors A and B, in plain PyTorch: `y = x (W + ΔW)ᵀ + b`.

    Near zero every kind is LoRA with slope alpha / rank.

    Args:
        layer: the frozen layer.
        kind: see :func:`delta_of`.
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
        return F.linear(x, self.layer.weight + self.delta_weight(), self.layer.bias)

    def delta_weight(self) -> Tensor:
        """ΔW, `[N, K]`."""
        return delta_of(self.kind, self.A, self.B, alpha=self.alpha, bound=self.bound)


def delta_of(kind: str, A: Tensor, B: Tensor, *, alpha: float, bound: float) -> Tensor:
    """ΔW by its formula; r is the number of rows of A.

    - lora, lora-clamp, lora-clip: (alpha / r) B A
    - sine, tanh: (bound / r) f(ωB) f(ωA), ω = sqrt(alpha / bound)
    - product: bound · sin((alpha / (r · bound)) B A)
    """
    rank = A.shape[0]
    if kind == "product":
        return bound * torch.sin((alpha / (rank * bound)) * (B @ A))
    if kind not in _BOUNDED:
        return (alpha / rank) * (B @ A)
    f: Callable[[Tensor], Tensor] = torch.sin if kind == "sine" else torch.tanh
    omega = math.sqrt(alpha / bound)
    return (bound / rank) * (f(omega * B) @ f(omega * A))


Adapted = dict[str, ComparedLinear | FusedBoundedLinear]


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The MLP projections of a Llama."""
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and ".mlp." in n}


def adapt(
    model: nn.Module, adapter: Adapter, ranks: Mapping[str, int], *, alpha: float, seed: int
) -> Adapted:
    """Put `adapter` on the layers that `ranks` names, in place, and freeze all the rest.

    The sine factors are `FusedBoundedLinear` itself. The factors start alike whatever the kind.
    """
    model.requires_grad_(False)
    made: Adapted = {}
    new: dict[nn.Module, nn.Module] = {}
    torch.manual_seed(seed)
    for name, layer in targets(model).items():
        rank = ranks[name]
        bound = adapter.bound_in(layer.weight, alpha)
        if adapter.kind == "sine":
            made[name] = FusedBoundedLinear.from_linear(layer, rank, alpha=alpha, bound=bound)
        else:
            made[name] = ComparedLinear(layer, adapter.kind, rank, alpha=alpha, bound=bound)
        new[layer] = made[name]
    swap(model, new)
    return made
