"""Choosing each layer's rank by how far its forget gradient exceeds its retain gradient.

For each layer, G_f and G_r `[N, K]` are the gradients of the two losses with respect to its weight.
They are never formed: the backward pass sees x `[M, K]` and dy `[M, N]` of each layer, and only

    Y = G Ω = dyᵀ (x Ω)        Z = Ψ G = (Ψ dyᵀ) x        Ω [K, p], Ψ [q, N] Gaussian

are kept. Then `G ≈ Q (Ψ Q)⁺ Z`, with Q an orthonormal basis of Y: Tropp, Yurtsever, Udell and
Cevher 2017, "Practical sketching algorithms for low-rank matrix approximation", algorithm 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbound.layers.settings import check_rank
from fastbound.models.gradients import Loss, pass_gradients

MOST = 32  # the default limit of a layer's rank
EVEN = 8  # the default budget is that of this rank in every layer
_OVERSAMPLING = 8


class LowRank(NamedTuple):
    """`Q X`, an approximation of a gradient `[N, K]`: Q `[N, p]` orthonormal, X `[p, K]`."""

    Q: Tensor
    X: Tensor

    @property
    def energy(self) -> float:
        """Its squared Frobenius norm."""
        return float(self.X.double().square().sum())


@dataclass(frozen=True)
class RankAllocation:
    """The rank that each layer gets out of a budget of parameters.

    Attributes:
        ranks: rank by layer name.
        excess: by layer name, its share of the total excess of forget over retain gradients.
        parameters: elements of all A and B at these ranks, at most `budget`.
        budget: the number of parameters that could be spent.
    """

    ranks: Mapping[str, int]
    excess: Mapping[str, float]
    parameters: int
    budget: int

    def __str__(self) -> str:
        head = (
            f"ranks by excess of forget over retain gradients, "
            f"{self.parameters:,} of {self.budget:,} parameters used"
        )
        lines = [
            f"  {rank:3d} {self.excess[name]:6.1%}  {name}" for name, rank in self.ranks.items()
        ]
        return "\n".join([head, *lines])


class _Sketch:
    """Y and Z of one layer's gradient, summed over backward passes."""

    def __init__(self, Omega: Tensor, Psi: Tensor) -> None:
        self.Omega, self.Psi = Omega, Psi
        self.Y = Omega.new_zeros(Psi.shape[1], Omega.shape[1])
        self.Z = Omega.new_zeros(Psi.shape[0], Omega.shape[0])

    def add(self, x: Tensor, dy: Tensor) -> None:
        X, DY = (t.reshape(-1, t.shape[-1]).to(self.Y.dtype) for t in (x, dy))
        self.Y += DY.t() @ (X @ self.Omega)
        self.Z += (self.Psi @ DY.t()) @ X

    def low_rank(self) -> LowRank:
        Y, Z, Psi = (t.cpu().double() for t in (self.Y, self.Z, self.Psi))
        if not (Y.isfinite().all() and Z.isfinite().all()):
            raise ValueError(
                "a gradient of the sample is not finite, so ranks cannot be chosen: give other "
                "rows, or ranks as numbers"
            )
        Q, _ = torch.linalg.qr(Y)
        return LowRank(Q, torch.linalg.lstsq(Psi @ Q, Z).solution)


def allocate_ranks(
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    forget: Loss,
    retain: Loss,
    *,
    budget: int | None = None,
    most: int = MOST,
    seed: int = 0,
) -> RankAllocation:
    """Spend `budget` parameters on ranks, where one rank of a layer [N, K] costs N + K.

    Component i of a layer's forget gradient, `σ_i u_i v_iᵀ`, is worth

        max(0, σ_i² / Σ‖G_f‖² − (u_iᵀ G_r v_i)² / Σ‖G_r‖²)        Σ over all layers

    and the components with the highest worth per parameter are taken. Every layer gets at least
    rank 1. The forward and backward passes run in evaluation mode and additionally keep x of every
    layer in memory.

    Args:
        model: holds the layers, none of them adapted yet; it is left unchanged.
        layers: name -> [N, K] of the linear layers to be adapted.
        forget, retain: called once with `model`; return a loss, or yield several, whose gradients
            are added.
        budget: the largest number of parameters; None means that of rank `EVEN` everywhere.
        most: the largest rank of a layer; by default the largest that a block's kernels take.
        seed: of the random sketches Ω and Ψ.

    Raises:
        ValueError: the budget is too small for rank 1 in every layer, a gradient is not finite, or
            a layer receives no gradient.
    """
    budget = check_budget(budget, layers)
    costs = {name: N + K for name, (N, K) in layers.items()}
    forgotten, kept = (
        gradients(model, layers, loss, most + _OVERSAMPLING, seed) for loss in (forget, retain)
    )
    worth = components(forgotten, kept, most)
    ranks = spend(worth, costs, budget)
    total = sum(float(each.sum()) for each in worth.values()) or 1.0
    return RankAllocation(
        ranks,
        {name: float(each.sum()) / total for name, each in worth.items()},
        sum(ranks[name] * costs[name] for name in ranks),
        budget,
    )


def components(
    forgotten: Mapping[str, LowRank], kept: Mapping[str, LowRank], most: int
) -> dict[str, Tensor]:
    """The worth of each of a layer's leading components, see :func:`allocate_ranks`."""
    all_forgotten = sum(each.energy for each in forgotten.values())
    all_kept = sum(each.energy for each in kept.values())
    worth = {}
    for name, G in forgotten.items():
        U, sigma, Vt = torch.linalg.svd(G.X, full_matrices=False)
        U, sigma, Vt = (G.Q @ U)[:, :most], sigma[:most], Vt[:most]
        R = kept[name]
        along = ((U.t() @ R.Q) * (Vt @ R.X.t())).sum(1)
        share = sigma.square() / (all_forgotten or 1.0)
        worth[name] = (share - along.square() / (all_kept or 1.0)).clamp_min(0)
    return worth


def spend(worth: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks: 1 for every layer, then the components of highest worth per parameter that fit."""
    ranks = dict.fromkeys(worth, 1)
    left = budget - sum(costs.values())
    offers = sorted(
        (-value / costs[name], order, name)
        for name, values in worth.items()
        for order, value in enumerate(values.sort(descending=True).values.tolist())
        if order  # every layer has its first component anyway
    )
    for _, _, name in offers:
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def check_ranks(ranks: Mapping[str, int], layers: Mapping[str, tuple[int, int]]) -> None:
    """Raise InputError, which names the layer, for a rank out of proportion to its [N, K]."""
    for name, (N, K) in layers.items():
        check_rank(ranks[name], N, K, name)


def check_budget(budget: int | None, layers: Mapping[str, tuple[int, int]]) -> int:
    """The budget, or that of rank `EVEN`. Raises ValueError if it is below rank 1 everywhere."""
    least = sum(N + K for N, K in layers.values())
    budget = EVEN * least if budget is None else budget
    if budget < least:
        raise ValueError(
            f"a budget of {budget:,} parameters is too small for rank 1 in {len(layers)} layers, "
            f"which takes {least:,}"
        )
    return budget


def even_rank(ranks: Mapping[str, int], layers: Mapping[str, tuple[int, int]]) -> float:
    """The uniform rank that has the same number of parameters."""
    costs = {name: N + K for name, (N, K) in layers.items()}
    return sum(ranks[name] * cost for name, cost in costs.items()) / sum(costs.values())


def gradients(
    model: nn.Module, layers: Mapping[str, tuple[int, int]], loss: Loss, width: int, seed: int
) -> dict[str, LowRank]:
    drawn: dict[tuple[Any, ...], Tensor] = {}

    def draw(rows: int, columns: int, like: Tensor) -> Tensor:
        """Layers of the same size get the same matrix; they need not be independent."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (rows, columns, like.device, dtype)
        if key not in drawn:
            generator = torch.Generator("cpu").manual_seed(seed)
            matrix = torch.randn(rows, columns, generator=generator, device="cpu")
            drawn[key] = matrix.to(like.device, dtype)
        return drawn[key]

    sketches: dict[str, _Sketch] = {}
    for name, (N, K) in layers.items():
        like = next(model.get_submodule(name).parameters())
        p = min(width, N, K)
        sketches[name] = _Sketch(draw(K, p, like), draw(min(2 * p + 1, N), N, like))
    pass_gradients(model, sketches, loss)
    return {name: sketch.low_rank() for name, sketch in sketches.items()}
