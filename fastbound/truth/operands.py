"""The operands of one call of a layer or an MLP block, made from a seed, and a run over them.

`tests/`, `benchmarks/` and the tuner share them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fastbound.truth import formula
from fastbound.truth.formula import Projection

_O = TypeVar("_O", bound="Operands")


class Operands(ABC):
    """The operands of a layer or a block: x, dy and projections."""

    x: Tensor
    dy: Tensor
    formula: ClassVar[Callable[..., Tensor]]
    leaf_names: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def projections(self) -> dict[str, Projection]:
        """The projections by name, in the order in which a block computes them."""

    @property
    @abstractmethod
    def trained(self) -> dict[str, Tensor]:
        """The tensors that get a gradient, except x, by the name of the gradient."""

    @abstractmethod
    def changed(self: _O, change: Callable[[str, Tensor], Tensor], **settings: Any) -> _O:
        """A copy with every tensor replaced by ``change(name, tensor)``.

        ``settings`` are replaced in every projection.
        """

    @property
    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The arguments of the formula except x, by name."""

    @abstractmethod
    def around(
        self, layers: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        """The layer or block as a function of x, with these callables as its projections."""

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The weights and biases of all projections."""
        pairs = ((p.weight, p.bias) for p in self.projections.values())
        return tuple(t for pair in pairs for t in pair if t is not None)

    def to(self: _O, dtype: torch.dtype) -> _O:
        """A copy with all tensors, factors included, in ``dtype``."""
        return self.changed(lambda name, t: t.detach().to(dtype))

    def leaves(self: _O) -> _O:
        """A copy that shares storage, with autograd leaves for all tensors that get a gradient."""
        return self.changed(
            lambda name, t: t.detach().requires_grad_() if name in self.leaf_names else t
        )

    def rows(self: _O, chosen: slice | Tensor) -> _O:
        """A copy with some rows of x [M, K] and of dy."""
        return self.changed(lambda name, t: t[chosen] if name in ("x", "dy") else t)


@dataclass(frozen=True)
class LayerOperands(Operands):
    """The operands of one call of a layer, and the gradient dy of its result."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float
    omega: float
    form: str = "factors"

    formula = staticmethod(formula.bounded_linear)
    leaf_names = ("x", "A", "B", "bias")

    @property
    def projections(self) -> dict[str, Projection]:
        return {"layer": Projection(**self.arguments)}

    @property
    def arguments(self) -> dict[str, Any]:
        names = ("weight", "bias", "A", "B", "scaling", "omega", "form")
        return {name: getattr(self, name) for name in names}

    @property
    def trained(self) -> dict[str, Tensor]:
        factors = {"dA": self.A, "dB": self.B}
        return factors if self.bias is None else {**factors, "db": self.bias}

    def changed(self, change: Callable[[str, Tensor], Tensor], **settings: Any) -> LayerOperands:
        held = {name: getattr(self, name) for name in ("x", "weight", "A", "B", "bias", "dy")}
        made: dict[str, Any] = {n: change(n, t) for n, t in held.items() if t is not None}
        return replace(self, **made, **settings)

    def around(
        self, layers: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        return layers["layer"]


@dataclass(frozen=True)
class BlockOperands(Operands):
    """The operands of one call of an MLP block, and the gradient dy of its result."""

    x: Tensor
    up: Projection
    down: Projection
    gate: Projection | None
    dy: Tensor
    activation: str = "silu"

    formula = staticmethod(formula.bounded_mlp)
    leaf_names = ("x", "A", "B")  # a block's biases are frozen

    @property
    def projections(self) -> dict[str, Projection]:
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: p for name, p in named.items() if p is not None}

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.projections, "activation": self.activation}

    @property
    def trained(self) -> dict[str, Tensor]:
        return {
            f"d{letter} {name}": factor
            for name, p in self.projections.items()
            for letter, factor in (("A", p.A), ("B", p.B))
            if factor is not None
        }

    def changed(self, change: Callable[[str, Tensor], Tensor], **settings: Any) -> BlockOperands:
        projections: dict[str, Any] = {}
        for name, p in self.projections.items():
            held = {"weight": p.weight, "bias": p.bias, "A": p.A, "B": p.B}
            made: dict[str, Any] = {n: change(n, t) for n, t in held.items() if t is not None}
            projections[name] = p._replace(**made, **settings)
        return replace(self, x=change("x", self.x), dy=change("dy", self.dy), **projections)

    def around(
        self, layers: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        settings: dict[str, Any] = {**layers, "activation": self.activation}
        return partial(formula.mlp, **settings)


Draw = Callable[..., Tensor]


def drawing(
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    on_device: bool = False,
) -> Draw:
    """A function ``draw(*size, dtype=..., scale=...)`` for normal numbers, in ``dtype`` by default.

    Numbers drawn on the CPU are the same on every machine; ``on_device`` is faster for large
    tensors. On the device "meta" the tensors are empty.
    """
    device = torch.device(device)
    where = device if on_device else torch.device("cpu")
    generator = None if device.type == "meta" else torch.Generator(where).manual_seed(seed)

    def draw(*size: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        if generator is None:
            return torch.empty(*size, dtype=dtype, device=device)
        wide = dtype if on_device else torch.float32
        drawn = torch.randn(*size, generator=generator, device=where, dtype=wide)
        return drawn.mul_(scale).to(device, dtype)

    return draw


def layer_operands(
    shape: tuple[int, ...],
    N: int,
    rank: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    adapter_dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
    scaling: float = 0.7,
    omega: float = 1.3,
    form: str = "factors",
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_device: bool = False,
) -> LayerOperands:
    """A layer's operands for x of ``shape`` [..., K], with weight [N, K] and factors of ``rank``.

    ``magnitude`` scales the factors. Near 0, a kernel that forgot the sine would pass.
    """
    draw, K = drawing(dtype, device=device, seed=seed, on_device=on_device), shape[-1]
    return LayerOperands(
        draw(*shape),
        draw(N, K, scale=K**-0.5),
        draw(rank, K, dtype=adapter_dtype, scale=magnitude),
        draw(N, rank, dtype=adapter_dtype, scale=magnitude),
        draw(N) if bias else None,
        draw(*shape[:-1], N),
        scaling,
        omega,
        form,
    )


def block_operands(
    shape: tuple[int, ...],
    N: int,
    ranks: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    gated: bool = True,
    bias: bool = True,
    activation: str = "silu",
    magnitude: float = 1.0,
    scaling: Sequence[float] = (0.1, 0.2, 0.05),
    omega: float = 1.3,
    form: str = "factors",
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_device: bool = False,
) -> BlockOperands:
    """A block's operands for x of ``shape`` [..., K] and hidden width N.

    ``ranks`` and ``scaling`` are those of gate, up and down. Rank 0 leaves a projection without an
    adapter.
    """
    draw, K = drawing(dtype, device=device, seed=seed, on_device=on_device), shape[-1]

    def projection(N: int, K: int, rank: int, scaling: float) -> Projection:
        A: Tensor | None = None
        B: Tensor | None = None
        if rank:
            A = draw(rank, K, dtype=torch.float32, scale=magnitude)
            B = draw(N, rank, dtype=torch.float32, scale=magnitude)
        b = draw(N) if bias else None
        return Projection(draw(N, K, scale=K**-0.5), b, A, B, scaling, omega, form)

    x = draw(*shape)
    gate = projection(N, K, ranks[0], scaling[0]) if gated else None
    up = projection(N, K, ranks[1], scaling[1])
    down = projection(K, N, ranks[2], scaling[2])
    return BlockOperands(x, up, down, gate, draw(*shape), activation)


def run(o: Operands, function: Callable[..., Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """y and all gradients of ``function`` at the operands, by name."""
    o = o.leaves()
    y = function(o.x, **o.arguments, **kwargs)
    dx, *gradients = torch.autograd.grad(y, (o.x, *o.trained.values()), o.dy)
    return {"y": y.detach(), "dx": dx, **dict(zip(o.trained, gradients, strict=True))}
