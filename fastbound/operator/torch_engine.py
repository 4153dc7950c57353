"""The operator's products in PyTorch operations: for CPUs, and for what Triton does not support.

The contract is that of ``triton_engine``. Operands are in the compute dtype, but SA, SB and the
thin products are in fp32 if that is fp16 (``formula.thin_dtype``). The rank is zero-padded, scaling
is folded into SB, and the result is the only [M, N] tensor. ``keep`` is dropout's mask of the tall
matrix as bits (``operator/dropout.py``): elements that it drops are zero in the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastbound.dispatch.plan import Plan
from fastbound.operator.call import Factors
from fastbound.operator.dropout import keep_bits, keep_mask
from fastbound.truth.formula import apply_activation, thin_dtype, wide_dtype

_ROWS = 512  # rows masked or widened at a time, so that their copy stays in cache
_ANGLES = 2**20  # angles of the product form at a time: 4 MiB in fp32; smaller was no faster


class TorchEngine:
    """Every product by ``torch.mm`` and its relatives; each product reads its tall operand once."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan or Plan("torch", "PyTorch's products were asked for")

    def keep_bits(self, seed: Tensor, M: int, K: int, p: float) -> Tensor:
        """Dropout's mask of x [M, K] as bits."""
        return keep_bits(seed, M, K, p)

    def factors(
        self, A: Tensor, B: Tensor, scaling: float, omega: float, dtype: torch.dtype, R: int
    ) -> tuple[Tensor, Tensor]:
        """SA = sin(omega·A) [R, K] and SB = scaling·sin(omega·B) [N, R], zero beyond the rank.

        Both are in the ``thin_dtype`` of the compute ``dtype``.
        """
        rank, dtype = A.shape[0], thin_dtype(dtype)
        SA = A.new_zeros(R, A.shape[1], dtype=dtype)
        SB = B.new_zeros(B.shape[0], R, dtype=dtype)
        SA[:rank].copy_(torch.sin(A.to(wide_dtype(A)) * omega))
        SB[:, :rank].copy_(torch.sin(B.to(wide_dtype(B)) * omega).mul_(scaling))
        return SA, SB

    def thin(self, T: Tensor, F: Tensor, keep: Tensor | None = None) -> Tensor:
        """``T F``: T [M, K], F [K, R] -> [M, R], in F's dtype."""
        if keep is None and T.dtype is F.dtype:
            return torch.mm(T, F)
        P = F.new_empty(T.shape[0], F.shape[1])
        for p, t in _copied(T, keep, P):
            torch.mm(t, F, out=p)
        return P

    def factor_gradient(
        self,
        T: Tensor,
        G: Tensor,
        P: Tensor,
        omega: float,
        scaling: float,
        keep: Tensor | None = None,
    ) -> Tensor:
        """``scaling·omega·cos(omega·P) ⊙ (Tᵀ G)``: T [M, N], G [M, R], P [N, r] -> [N, r].

        The result has P's dtype.
        """
        if keep is None and T.dtype is G.dtype:
            raw = _transposed_product(T, G)
        else:
            raw = G.new_zeros(T.shape[1], G.shape[1], dtype=wide_dtype(G))
            for g, t in _copied(T, keep, G):
                raw += _transposed_product(t, g)
        return _times_cosine(raw[:, : P.shape[1]], P, omega, scaling)

    def thin_and_factor_gradient(
        self, T: Tensor, F: Tensor, G: Tensor, P: Tensor, omega: float, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """``thin(T, F)`` and ``factor_gradient(T, G, P)``."""
        return self.thin(T, F), self.factor_gradient(T, G, P, omega, scaling)

    def lowrank_product(
        self, S: Tensor, F: Tensor, dtype: torch.dtype, keep: Tensor | None = None
    ) -> Tensor:
        """``S Fᵀ``: S [M, R], F [N, R] -> [M, N] in the compute ``dtype``; ``keep`` masks it."""
        if keep is None and dtype is S.dtype:
            return torch.mm(S, F.t())
        Y = S.new_empty(S.shape[0], F.shape[0], dtype=dtype)
        for y, term in _terms(Y, S, F, keep):
            y.copy_(term)
        return Y

    def add_lowrank(self, Y: Tensor, S: Tensor, F: Tensor, in_place: bool = False) -> Tensor:
        """``Y + S Fᵀ``: Y [M, N], S [M, R], F [N, R]; a new tensor, or Y's memory if in_place."""
        if Y.dtype is S.dtype:
            return Y.addmm_(S, F.t()) if in_place else torch.addmm(Y, S, F.t())
        sum_ = Y if in_place else Y.clone(memory_format=torch.contiguous_format)
        for y, term in _terms(sum_, S, F):
            y.add_(term)
        return sum_

    def lowrank_gemm(
        self,
        X: Tensor,
        W: Tensor,
        S: Tensor,
        F: Tensor,
        bias: Tensor | None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """``X Wᵀ + S Fᵀ + bias``: X [M, K], W [N, K], S [M, R], F [N, R], bias [N] -> [M, N].

        Both products go into one tensor, the second with beta = 1. On a GPU the low-rank product
        comes first, so that the large GEMM's arithmetic hides the read of it. On a CPU the large
        GEMM comes first, at its bare speed, and its output is then still in cache
        (benchmarks/NOTES.md). ``keep`` masks S Fᵀ.
        """
        b = None if bias is None else bias.to(X.dtype)
        if keep is not None or S.dtype is not X.dtype:
            Y = linear(X, W, b)
            for y, term in _terms(Y, S, F, keep):
                y.add_(term)
            return Y
        if X.device.type == "cpu":
            return linear(X, W, b).addmm_(S, F.t())
        Y = torch.mm(S, F.t()) if b is None else torch.addmm(b, S, F.t())
        return Y.addmm_(X, W.t())

    # For the product form.

    def adapted_weight(
        self,
        W: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        omega: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """``W + scaling·sin(omega·B A)``: A [r, K], B [n, r] -> [n, K] in ``dtype``, in W's layout.

        Added in fp32 (fp64 for fp64 factors) and rounded once. If W is None, it is ΔW alone.
        """
        if W is not None and W.stride(0) == 1 and W.stride(1) != 1:
            return self.adapted_weight(W.t(), B.t(), A.t(), scaling, omega, dtype).t()
        made = A.new_empty(B.shape[0], A.shape[1], dtype=dtype)
        for out, angle, *w in _angles(A, B, omega, made, *(() if W is None else (W,))):
            sine = angle.sin_()
            if w:
                torch.add(w[0], sine, alpha=scaling, out=out)
            else:
                torch.mul(sine, scaling, out=out)
        return made

    def weight_gradient(self, DY: Tensor, X: Tensor) -> Tensor:
        """``DYᵀ X``: DY [M, n], X [M, K] -> [n, K] in their dtype, or fp32 if fp16 or mixed."""
        if DY.dtype is X.dtype and DY.dtype is not torch.float16:
            return torch.mm(DY.t(), X)
        wide = torch.promote_types(DY.dtype, torch.float32)
        G = DY.new_zeros(DY.shape[1], X.shape[1], dtype=wide)
        for dy, x in _rows_at_a_time(DY, X):
            G.addmm_(dy.t().to(wide), x.to(wide))
        return G

    def contract(
        self, G: Tensor, A: Tensor, B: Tensor, scaling: float, omega: float
    ) -> tuple[Tensor, Tensor]:
        """dA = Bᵀ dZ and dB = dZ Aᵀ, ``dZ = G ⊙ scaling·omega·cos(omega·B A)``, for G [n, K].

        dA [r, K] and dB [n, r] in fp32, or fp64 for fp64 factors.
        """
        wide = wide_dtype(A)
        A, B = A.to(wide), B.to(wide)
        dA, dB = A.new_zeros(A.shape), torch.empty_like(B)
        for g, angle, b, db in _angles(A, B, omega, G, B, dB):
            dZ = angle.cos_().mul_(g)
            dA.addmm_(b.t(), dZ)
            torch.mm(dZ, A.t(), out=db)
        slope = scaling * omega
        return dA.mul_(slope), dB.mul_(slope)

    # For the parts of an MLP block that are not layers.

    def activate(
        self, G: Tensor, U: Tensor | None, SA: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor | None]:
        """H = f(G) ⊙ U [M, N], or f(G) without U, and H SAᵀ [M, R], or None without SA."""
        H = apply_activation(G, activation)
        if U is not None:
            H.mul_(U)
        return H, None if SA is None else self.thin(H, SA.t())

    def activate_backward(
        self,
        DH: Tensor,
        G: Tensor,
        U: Tensor | None,
        S: Tensor,
        DS_down: Tensor | None,
        gate: Factors,
        up: Factors | None,
        down: Factors,
        activation: str,
        R: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """DG, DU, [DS_G | DS_U], dB of gate, dB of up and dA of down; None for what is absent.

        May overwrite DH, which nothing else uses.
        """
        H = apply_activation(G, activation)
        DU = None
        if U is not None:
            DU = DH * H
            H.mul_(U)
            DH.mul_(U)
        dA_down = None
        if down.A is not None and DS_down is not None:
            dA_down = self.factor_gradient(H, DS_down, down.A.t(), down.omega, 1.0).t()
        del H
        DG = activation_backward(DH, G, activation)
        parts: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for p, D in ((gate, DG), (up, DU)):
            if p is None or D is None or p.B is None or p.SB is None:
                gradients.append(None)
                continue
            column = R * len(parts)
            part, gradient = self.thin_and_factor_gradient(
                D, p.SB, S[:, column : column + R], p.B, p.omega, p.scaling
            )
            parts.append(part)
            gradients.append(gradient)
        DS = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] if parts else None
        return DG, DU, DS, gradients[0], gradients[1], dA_down

    def stacked_factor_gradients(
        self, X: Tensor, DS: Tensor | None, gate: Factors, up: Factors | None, R: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """dA of gate and of up, from [DS_G | DS_U]; None for one that is not adapted."""
        gradients: list[Tensor | None] = []
        column = 0
        for p in (gate, up):
            if p is None or p.A is None or DS is None:
                gradients.append(None)
                continue
            part = DS[:, column : column + R]
            gradients.append(self.factor_gradient(X, part, p.A.t(), p.omega, 1.0).t())
            column += R
        return gradients[0], gradients[1]


def activation_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """``dy ⊙ f'(x)``."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dy, x, approximate=approximate)


def _copied(T: Tensor, keep: Tensor | None, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of ``other`` with those of mask ⊙ T in ``other``'s dtype, a few at a time."""
    for rows, t, *bits in _rows_at_a_time(other, T, *(() if keep is None else (keep,))):
        t = t.to(other.dtype)
        yield rows, t * keep_mask(bits[0], T.shape[1]) if bits else t


def _terms(
    Y: Tensor, S: Tensor, F: Tensor, keep: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of ``Y`` with those of mask ⊙ (S Fᵀ), a few at a time."""
    for y, s, *bits in _rows_at_a_time(Y, S, *(() if keep is None else (keep,))):
        term = torch.mm(s, F.t())
        yield y, term.mul_(keep_mask(bits[0], F.shape[0])) if bits else term


def _rows_at_a_time(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(_ROWS) for t in tensors), strict=True)


def _angles(A: Tensor, B: Tensor, omega: float, T: Tensor, *others: Tensor) -> Iterator[Any]:
    """Rows of T [n, K] with those of omega·B A in fp32 and of ``others``, a few at a time."""
    wide = wide_dtype(A)
    A, rows = A.to(wide), max(1, _ANGLES // max(1, A.shape[1]))
    for t, b, *rest in zip(*(t.split(rows) for t in (T, B, *others)), strict=True):
        yield t, torch.mm(b.to(wide) * omega, A), *rest


def _transposed_product(T: Tensor, G: Tensor) -> Tensor:
    """``Tᵀ G``; the order of the operands decides the CPU's inner loop."""
    halves = T.dtype in (torch.bfloat16, torch.float16)
    return linear(G.t(), T.t()).t() if halves else torch.mm(T.t(), G)


def _times_cosine(raw: Tensor, P: Tensor, omega: float, scaling: float) -> Tensor:
    wide = wide_dtype(P)
    return torch.cos(P.to(wide) * omega).mul_(scaling * omega).mul_(raw).to(P.dtype)
