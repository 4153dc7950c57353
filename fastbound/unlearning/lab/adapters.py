"""The adapters that the map compares: each a way to make ΔW of the same two factors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbound import FusedBoundedLinear
from fastbound.errors import InputError
from fastbound.layers.conversion import swap
from fastbound.models.targets import match
from fastbound.unlearning.lab.names import BOUNDED, MODULES, Adapter
from fastbound.unlearning.training.fila import fila_factors

_FORMS = {"sine": "factors", "product": "product"}  # those that are FusedBoundedLinear itself
_BLOCK = re.compile(r"(.*\.)?\d+\.")  # of a layer's name, up to the innermost numbered part


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
        self.start: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Begin at these factors with ΔW = 0: what they make is subtracted from then on."""
        self.A.copy_(A)
        self.B.copy_(B)
        self.start = (self.A.detach().clone(), self.B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        A, B = self._factors(self.A, self.B)
        if self.start is not None:
            A0, B0 = self._factors(*self.start)
            A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
        x = x.to(self.layer.weight)
        return self.layer(x) + F.linear(F.linear(x, A.to(x)), B.to(x))

    def delta_weight(self) -> Tensor:
        """ΔW, `[N, K]`."""
        settings: Any = {"alpha": self.alpha, "bound": self.bound}
        delta = delta_of(self.kind, self.A, self.B, **settings)
        return delta if self.start is None else delta - delta_of(self.kind, *self.start, **settings)

    def _factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return factors_of(self.kind, A, B, alpha=self.alpha, bound=self.bound)


def delta_of(kind: str, A: Tensor, B: Tensor, *, alpha: float, bound: float) -> Tensor:
    """ΔW by its formula, where r is the number of rows of A.

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
    """The two factors whose product is ΔW, for every kind except product."""
    rank = A.shape[0]
    if kind not in BOUNDED:
        return A, (alpha / rank) * B
    f: Callable[[Tensor], Tensor] = torch.sin if kind == "sine" else torch.tanh
    omega = math.sqrt(alpha / bound)
    return f(omega * A), (bound / rank) * f(omega * B)


Adapted = dict[str, ComparedLinear | FusedBoundedLinear]


def targets(model: nn.Module, modules: Sequence[str] = MODULES[:1]) -> dict[str, nn.Linear]:
    """The projections that are plain linear layers, in the model's order.

    Args:
        modules: "mlp" for the MLP projections of a known model, "attention" for all other linear
            layers of the blocks that hold them.

    Raises:
        InputError: they cannot be told in this model, or none is a plain linear layer.
    """
    try:
        mlp = match(model, "mlp")
    except ValueError as error:
        raise InputError(
            f"the lab finds its layers by the MLPs of a known model: {error}"
        ) from error
    blocks = set(filter(None, map(_block_of, mlp)))
    beside = [n for n in match(model, "all-linear") if n not in mlp and _block_of(n) in blocks]
    if "attention" in modules and not beside:
        raise InputError(
            f"{type(model).__name__} has no attention projections that can be told by their place: "
            "linear layers beside the MLP in a numbered block; map its MLPs alone"
        )
    names = [*(mlp if "mlp" in modules else ()), *(beside if "attention" in modules else ())]
    layers = {n: m for n, m in model.named_modules() if n in names and type(m) is nn.Linear}
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no plain linear layer among its projections "
            f"({' and '.join(modules)}), which alone the lab can adapt"
        )
    return layers


def _block_of(name: str) -> str | None:
    found = _BLOCK.match(name)
    return found.group() if found else None


def adapt(
    model: nn.Module,
    adapter: Adapter,
    ranks: Mapping[str, int],
    *,
    alpha: float,
    seed: int,
    importance: Mapping[str, Tensor] | None = None,
) -> Adapted:
    """Put `adapter` on the layers that `ranks` names, in place, and freeze all the rest.

    Sine and product are `FusedBoundedLinear` itself. The factors start alike whatever the kind,
    except with `importance`, from which FILA makes those of LoRA.
    """
    model.requires_grad_(False)
    made: Adapted = {}
    new: dict[nn.Module, nn.Module] = {}
    torch.manual_seed(seed)
    for name, layer in targets(model, adapter.modules).items():
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
            compared = ComparedLinear(layer, adapter.kind, rank, alpha=alpha, bound=bound)
            if importance is not None:
                compared.start_at(*fila_factors(layer.weight, importance[name], rank, alpha / rank))
            made[name] = compared
        new[layer] = made[name]
    swap(model, new)
    return made
