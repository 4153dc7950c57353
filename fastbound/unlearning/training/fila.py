"""FILA: LoRA starts with the part of W that matters most to the rows to forget.

Cha, Cho, Hwang and Lee 2025, "Towards robust and parameter-efficient knowledge unlearning for LLMs"
(LoKU, ICLR). The mean squared gradients F_f and F_r `[N, K]` of log p(answer | question) of rows to
forget and to keep, with respect to a weight W, give each row n of W the importance

    I_n = sqrt(Σ_k F_f,nk / F_r,nk)

and the factors start as the best approximation of W of rank r under those weights,

    B₀, A₀ = argmin ‖diag(I) (W − s B A)‖_F        s = alpha / r

while W − s B₀ A₀ is frozen. Here W itself stays, and the same is computed as W + s (B A − B₀ A₀):
a LoRA of rank 2r, `[B, −B₀] [A; A₀]`, whose second half is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastbound.errors import InputError
from fastbound.models.gradients import Loss, pass_gradients
from fastbound.truth.formula import wide_dtype
from fastbound.truth.linear_algebra import largest_singular, without_autocast
from fastbound.unlearning.config import SAMPLE_ROWS
from fastbound.unlearning.data.encoding import Encoded, answer_length
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.training.sides import mean_loss

# F_r is raised by this share of its mean over the layer, so that no entry is divided by 0. The
# authors' code adds 1e-5 itself, by which the start depends on the unit of the loss.
FLOOR = 1e-5
_OVERSAMPLING = 16
_ITERATIONS = 16


class _Squares:
    """F_r `[N, K]`: the sum of squared gradients over backward passes of one row each."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.total = torch.zeros(shape, device=device)

    def add(self, x: Tensor, dy: Tensor) -> None:
        self.total += _squared(x, dy)


class _Importance:
    """I² `[N]`: of F_f only the sums over each row of W are needed, weighted by 1 / F_r."""

    def __init__(self, kept: Tensor) -> None:
        self.inverse = kept.add_(FLOOR * kept.mean()).reciprocal_()
        self.total = kept.new_zeros(len(kept))

    def add(self, x: Tensor, dy: Tensor) -> None:
        self.total += (_squared(x, dy) * self.inverse).sum(1)


def _squared(x: Tensor, dy: Tensor) -> Tensor:
    X, DY = (t.reshape(-1, t.shape[-1]).float() for t in (x, dy))
    return (DY.t() @ X).square_()


def importance(
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    forget: Loss,
    retain: Loss,
) -> dict[str, Tensor]:
    """I `[N]` in fp32 for every layer, where F is the sum of the squared gradients of all losses.

    First the rows to keep, which leave F_r of every layer in memory: an fp32 copy of the adapted
    weights. Then the rows to forget, which need no more than a vector per layer.

    Args:
        model: with layers that are not adapted yet; it is left unchanged.
        layers: name -> [N, K].
        forget, retain: yield a loss for each row.

    Raises:
        ValueError: a layer receives no gradient, or one that is not finite; it is named.
    """
    device = next(model.parameters()).device
    squares = {name: _Squares(shape, device) for name, shape in layers.items()}
    pass_gradients(model, squares, retain)
    sums = {name: _Importance(squares.pop(name).total) for name in layers}
    pass_gradients(model, sums, forget)
    found = {}
    for name, each in sums.items():
        found[name] = each.total.sqrt()
        if not (found[name].isfinite().all() and found[name].any()):
            raise ValueError(
                f"{name}: the gradients of the sample are zero or not finite, so that FILA finds "
                "no start; give other rows, dtype float32 or another start"
            )
    return found


@torch.no_grad()
def fila_factors(
    weight: Tensor, importance: Tensor, rank: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """A₀ `[r, K]` and B₀ `[N, r]`, in W's dtype or fp32, whichever is wider.

    With `diag(I) W ≈ U S Vᵀ` of rank r, A₀ = sqrt(S / s) Vᵀ and B₀ = diag(I)⁻¹ U sqrt(S / s). The
    latter equals W V / sqrt(S s), which holds for a row of no importance too.

    Args:
        weight: W [N, K].
        importance: I [N], not negative.
        scaling: s, alpha / rank.

    The singular vectors are exact for small layers, and deterministic.
    """
    W = weight.detach().to(wide_dtype(weight))
    weighted = importance.to(W)[:, None] * W
    directions = min(rank + _OVERSAMPLING, *W.shape)
    _, S, V = largest_singular(weighted, directions, iterations=_ITERATIONS)
    S, V = S[:rank], V[:, :rank]
    S = S.clamp_min(torch.finfo(S.dtype).eps * S[0])  # W may be of a lower rank
    root = (S / scaling).sqrt()
    with without_autocast(W.device):
        return (V * root).t().contiguous(), (W @ V) / (scaling * root)


def fila_importance(
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    pad: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """I `[N]` of every layer by a sample of rows: F is a mean over rows of the squared gradient of
    −log p(answer | question).

    Raises InputError where `importance` raises ValueError.
    """
    samples = [evenly(rows, SAMPLE_ROWS) for rows in (forget, retain)]
    losses = [mean_loss(rows, pad, batch_size=1, device=device, dtype=dtype) for rows in samples]
    try:
        found = importance(model.to(device), layers, *losses)
    except ValueError as error:
        raise InputError(f'lora_start "fila": {error}') from error
    # The gradients above are those of a row divided by the tokens of all rows of its side.
    scale = [sum(map(answer_length, side)) / math.sqrt(len(side)) for side in samples]
    return {name: scale[0] / scale[1] * each for name, each in found.items()}
