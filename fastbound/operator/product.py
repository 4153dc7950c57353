"""The product form: W + ΔW with ΔW = s·sin(ω·B A), made a few rows at a time, used and dropped.

    y  = x (W + ΔW)ᵀ + b        dx = dy (W + ΔW)
    dZ = (dyᵀ x) ⊙ s·ω·cos(ω·B A)        dB = dZ Aᵀ        dA = Bᵀ dZ

A GEMM takes as many rows of W + ΔW as fit in `WORKSPACE`, and they are dropped after it. The
weight's gradient is likewise computed a few rows at a time and contracted at once, so nothing of
the weight's size N·K outlives a product. dx is y's GEMM with everything transposed. Each element of
y and of dx is one sum, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastbound.operator.engine import Engine

WORKSPACE = 64 * 2**20  # bytes of W + ΔW, or of the weight's gradient, that exist at a time
_ROWS = 128  # a GEMM takes a multiple of this many rows of a weight


class Delta(NamedTuple):
    """``ΔW = scaling · sin(omega·B A)`` [N, K] as its factors A [r, K] and B [N, r]."""

    A: Tensor
    B: Tensor
    scaling: float
    omega: float

    def t(self) -> Delta:
        """ΔWᵀ, whose factors are Bᵀ and Aᵀ."""
        return self._replace(A=self.B.t(), B=self.A.t())

    def rows(self, part: slice) -> Delta:
        """Some rows of ΔW."""
        return self._replace(B=self.B[part])


def row_parts(N: int, row_bytes: int) -> Iterator[slice]:
    """N rows in parts of about equal size, none larger than `WORKSPACE` (but at least 128 rows)."""
    most = max(_ROWS, WORKSPACE // max(1, row_bytes) // _ROWS * _ROWS)
    parts = max(1, -(-N // most))
    rows = max(1, -(-N // parts // _ROWS) * _ROWS)
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))


def adapted_gemm(
    engine: Engine,
    X: Tensor,
    W: Tensor | None,
    delta: Delta,
    bias: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """``X (W + ΔW)ᵀ + bias`` [M, N]; with ``start``, ``start + X (W + ΔW)ᵀ`` in start's memory.

    X [M, K]; W [N, K] with any strides, or None for ΔW alone; bias [N]; start [M, N].
    """
    N, K = delta.B.shape[0], delta.A.shape[1]
    b = None if bias is None else bias.to(X.dtype)
    Y = start
    for part in row_parts(N, K * X.itemsize):
        w = engine.adapted_weight(None if W is None else W[part], *delta.rows(part), X.dtype)
        if start is not None:
            _add_product(start[:, part], X, w)
        elif part == slice(0, N):
            return linear(X, w, b)
        else:
            Y = X.new_empty(X.shape[0], N) if Y is None else Y
            if b is None:
                torch.mm(X, w.t(), out=Y[:, part])
            else:
                torch.addmm(b[part], X, w.t(), out=Y[:, part])
    return X.new_empty(X.shape[0], N) if Y is None else Y


def factor_gradients(
    engine: Engine, DY: Tensor, X: Tensor, delta: Delta, need_dA: bool = True, need_dB: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dA [r, K] and dB [N, r] for DY [M, N] and X [M, K], in the dtypes of A and B."""
    if not (need_dA or need_dB):
        return None, None
    A, B, _, _ = delta
    N, K = B.shape[0], A.shape[1]
    wide = torch.promote_types(torch.float32, A.dtype)
    dA = torch.zeros_like(A, dtype=wide)
    dB = torch.empty_like(B)
    for part in row_parts(N, K * DY.itemsize):
        G = engine.weight_gradient(DY[:, part], X)
        dA_part, dB[part] = engine.contract(G, *delta.rows(part))
        dA += dA_part
    return dA.to(A.dtype) if need_dA else None, dB if need_dB else None


def _add_product(Y: Tensor, X: Tensor, w: Tensor) -> None:
    if Y.dtype is X.dtype:
        Y.addmm_(X, w.t())
    else:
        Y.add_(torch.mm(X, w.t()))
