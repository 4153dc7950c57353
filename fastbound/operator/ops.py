"""Registered operators ``fastbound::forward`` and ``fastbound::backward``: one composition.

The products (factors, thin, low-rank GEMM, gradient reductions) come from Triton or from PyTorch as
the plan says. The operators are functional and opaque: ``torch.compile(fullgraph=True)``, export
and fake tensors see their shapes only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastbound.dispatch.plan import plan_for
from fastbound.dispatch.tables import row_bucket
from fastbound.operator.dropout import keep_rate
from fastbound.operator.eager import direct
from fastbound.operator.torch_engine import TorchProducts, padded_rank

if TYPE_CHECKING:
    from fastbound.operator.triton_engine import TritonProducts

# Kept for the life of the process: a collected Library leaves dangling operators behind.
_library = torch.library.Library("fastbound", "DEF")
_library.define(
    "forward(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B,"
    " float scaling, float omega, str backend,"
    " Tensor? seed=None, float dropout=0.0) -> (Tensor y, Tensor S)"
)
_library.define(
    "backward(Tensor dy, Tensor? x, Tensor? S, Tensor weight, Tensor A, Tensor B,"
    " float scaling, float omega, str backend, Tensor? seed, float dropout,"
    " bool need_dx, bool need_dA, bool need_dB)"
    " -> (Tensor dx, Tensor dA, Tensor dB)"
)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    omega: float,
    backend: str,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check_storage(x, weight, bias, A, B)
    with scope(x):
        X = rows(x)
        products, R = _products(X, weight, A, backend), padded_rank(A.shape[0])
        keep, scaling = kept(products, seed, dropout, X.shape[0], X.shape[1], scaling)
        SA, SB = products.factors(A, B, scaling, omega, X.dtype, R)
        S = products.thin(X, SA.t(), keep)
        return rows_as_of(x, products.lowrank_gemm(X, _cast(weight, X.dtype), S, SB, bias)), S


def _backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    omega: float,
    backend: str,
    seed: Tensor | None,
    dropout: float,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = dA = dB = None
    check_storage(dy, x, S, weight, A, B)
    with scope(dy):
        DY = rows(dy)
        products, R = _products(DY, weight, A, backend), padded_rank(A.shape[0])
        M, K = DY.shape[0], weight.shape[1]
        keep, scaling = kept(products, seed, dropout, M, K, scaling)
        SA, SB = products.factors(A, B, scaling, omega, DY.dtype, R)
        DS, dB = dS_and_dB(products, DY, SB, S, B, scaling, omega, need_dx or need_dA, need_dB)
        if need_dx:
            W = _cast(weight, DY.dtype)
            DX = products.lowrank_gemm(DY, W.t(), given(DS), SA.t(), None, keep)
            dx = rows_as_of(dy, DX)
        if need_dA:
            X = rows(given(x))
            dA = products.factor_gradient(X, given(DS), A.t(), omega, 1.0, keep).t()
    return dx, dA, dB


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    omega: float,
    backend: str,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    M = x.numel() // x.shape[-1]
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(M, padded_rank(A.shape[0]))


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    omega: float,
    backend: str,
    seed: Tensor | None,
    dropout: float,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1]) if need_dx else dy.new_empty(0)
    dA = torch.empty_like(A) if need_dA else dy.new_empty(0)
    dB = torch.empty_like(B) if need_dB else dy.new_empty(0)
    return dx, dA, dB


def with_empty(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """For an operator, which returns tensors: an empty one for what is not wanted."""

    def implementation(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(dy.new_empty(0) if g is None else g for g in backward(dy, *arguments))

    return implementation


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", with_empty(_backward), _device)
torch.library.register_fake("fastbound::forward", _fake_forward, lib=_library)
torch.library.register_fake("fastbound::backward", _fake_backward, lib=_library)

torch_only = TorchProducts()

forward = direct(torch.ops.fastbound.forward.default, _forward)
backward = direct(torch.ops.fastbound.backward.default, _backward)


def _products(X: Tensor, weight: Tensor, A: Tensor, backend: str) -> TorchProducts | TritonProducts:
    N, K = weight.shape
    return _planned(X.device, row_bucket(X.shape[0]), N, K, A.shape[0], X.dtype, backend)


@lru_cache(maxsize=4096)
def _planned(
    device: torch.device, M: int, N: int, K: int, rank: int, dtype: torch.dtype, backend: str
) -> TorchProducts | TritonProducts:
    plan = plan_for(device, M, N, K, rank, dtype, backend)
    if plan.strategy == "torch":
        return torch_only
    from fastbound.operator.triton_engine import TritonProducts

    return TritonProducts(plan)


def dS_and_dB(
    products: TorchProducts | TritonProducts,
    DY: Tensor,
    SB: Tensor,
    S: Tensor | None,
    B: Tensor,
    scaling: float,
    omega: float,
    need_dS: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Those that are needed; for both dy is read once."""
    if not need_dB:
        return (products.thin(DY, SB) if need_dS else None), None
    if not need_dS:
        return None, products.factor_gradient(DY, given(S), B, omega, scaling)
    return products.thin_and_factor_gradient(DY, SB, given(S), B, omega, scaling)


def rows(x: Tensor) -> Tensor:
    """x [..., K] as a matrix; making a view takes a microsecond, so a matrix is taken as it is."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def rows_as_of(x: Tensor, Y: Tensor) -> Tensor:
    """Y [M, N], whose rows are those of :func:`rows`, as [..., N].

    No view: a Function's output that is one refuses all work in place.
    """
    return Y if x.dim() == 2 else Y.view(*x.shape[:-1], Y.shape[1]).detach()


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype is dtype else weight.to(dtype)


def kept(
    products: TorchProducts | TritonProducts,
    seed: Tensor | None,
    dropout: float,
    M: int,
    K: int,
    scaling: float,
) -> tuple[Tensor | None, float]:
    """Dropout's mask as bits, and scaling / (1 - p): S then is that of mask ⊙ x, not divided."""
    if seed is None:
        return None, scaling
    return products.keep_bits(seed, M, K, dropout), scaling / keep_rate(dropout)


def scope(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off (operands are in the compute dtype already) and x's device the current one."""
    autocast = torch.is_autocast_enabled(x.device.type)
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    if not autocast and not elsewhere:
        return nullcontext()
    entered = ExitStack()
    if autocast:
        entered.enter_context(torch.autocast(x.device.type, enabled=False))
    if elsewhere:
        entered.enter_context(torch.cuda.device(x.device))
    return entered


def check_storage(*tensors: Tensor | None) -> None:
    """Raise for a tensor whose memory was given back, before a kernel is handed its address, 0."""
    for tensor in tensors:
        if tensor is not None and not tensor.data_ptr() and tensor.numel():
            raise RuntimeError(
                f"a tensor {list(tensor.shape)} has no memory: the wrapper that shards or offloads "
                "it has not gathered it for this module. Make the module that owns it, or one "
                "around it, the unit that is gathered"
            )


def given(saved: Tensor | None) -> Tensor:
    if saved is None:
        raise RuntimeError(
            "fastbound::backward: a tensor that the requested gradient needs is missing"
        )
    return saved
