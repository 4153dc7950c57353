"""The adapter's term added to a result that another layer computed: the base stays a closed box.

S  = x sin(ωA)ᵀ                y  = result + S (s·sin ωB)ᵀ
dS = dy (s·sin ωB)             dx = dS sin(ωA)              dresult = dy
dA = ω cos(ωA) ⊙ (dSᵀ x)       dB = s ω cos(ωB) ⊙ (dyᵀ S)

Dropout is that of ``function.py``: x and dx under the mask of a seed, and s / (1 - p) for s.
One product with beta = 1 reads ``result`` once and writes y once. It writes into ``result`` itself
where nobody can notice, and into a new tensor elsewhere: see :func:`can_write_into`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastbound.dispatch.plan import BACKENDS, Plan, plan_for
from fastbound.operator.dropout import check_dropout, draw_seed, keep_bits, keep_mask, keep_rate
from fastbound.operator.eager import apply_of, direct, nothing_intercepts
from fastbound.operator.ops import (
    dS_and_dB,
    given,
    kept,
    rows,
    rows_as_of,
    scope,
    torch_only,
    with_empty,
)
from fastbound.operator.partition import GATHER, partition
from fastbound.operator.torch_engine import _MASKED_ROWS, TorchProducts, padded_rank
from fastbound.operator.transforms import differentiable_once
from fastbound.truth import formula as reference

if TYPE_CHECKING:
    from fastbound.operator.triton_engine import TritonProducts

_FACTORS = (
    "Tensor x, Tensor A, Tensor B, float scaling, float omega, str backend,"
    " Tensor? seed, float dropout"
)
# Kept for the life of the process: a collected Library leaves dangling operators behind.
_library = torch.library.Library("fastbound", "FRAGMENT")
_library.define(f"add_forward(Tensor result, {_FACTORS}) -> (Tensor y, Tensor S)")
_library.define(f"add_forward_(Tensor(a!) result, {_FACTORS}) -> Tensor S")
_library.define(
    "add_backward(Tensor dy, Tensor? x, Tensor? S, Tensor A, Tensor B, ScalarType dtype,"
    " float scaling, float omega, str backend, Tensor? seed, float dropout,"
    " bool need_dx, bool need_dA, bool need_dB)"
    " -> (Tensor dx, Tensor dA, Tensor dB)"
)

# Nodes of the autograd graph that keep no reference to what they returned.
_VIEWS = frozenset({"AsStridedBackward0", "UnsafeViewBackward0", "ViewBackward0"})
_KEEP_NO_RESULT = frozenset(
    {
        "AddBackward0",
        "AddmmBackward0",
        "LinearBackward0",
        "MatMul4BitBackward",
        "MatMul8bitFpBackward",
        "MatMul8bitLtBackward",
        "MmBackward0",
        "ToCopyBackward0",
    }
)


def addition_plan(
    device: torch.device,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Plan:
    """The plan where another layer computes x Wᵀ: never "fused", there is no GEMM to fuse with.

    Raises ValueError for backend="fused", besides what :func:`fastbound.dispatch.plan.plan` raises.
    """
    if backend == "fused":
        raise ValueError(
            'backend="fused" cannot run here: the base layer computes x Wᵀ itself; use "auto"'
        )
    if backend == "auto" and plan_for(device, M, N, K, rank, dtype).strategy != "torch":
        backend = "split"
    return plan_for(device, M, N, K, rank, dtype, backend)


def _products(
    X: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, backend: str
) -> TorchProducts | TritonProducts:
    plan = addition_plan(X.device, X.shape[0], B.shape[0], A.shape[1], A.shape[0], dtype, backend)
    if plan.strategy == "torch":
        return torch_only
    from fastbound.operator.triton_engine import TritonProducts

    return TritonProducts(plan)


def _thin(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    omega: float,
    backend: str,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """S in x's dtype and SB in result's."""
    X, R = rows(x), padded_rank(A.shape[0])
    products = _products(X, A, B, x.dtype, backend)
    keep, scaling = kept(products, seed, dropout, X.shape[0], X.shape[1], scaling)
    SA, SB = products.factors(A, B, scaling, omega, x.dtype, R)
    if result.dtype is not x.dtype:  # SB once more, from the masters: never rounded twice
        _, SB = products.factors(A, B, scaling, omega, result.dtype, R)
    return products.thin(X, SA.t(), keep), SB


def _add_forward(result: Tensor, x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    with scope(x):
        S, SB = _thin(result, x, *settings)
        Y = torch.addmm(rows(result), S.to(result.dtype), SB.t())
        return rows_as_of(result, Y), S


def _add_forward_(result: Tensor, x: Tensor, *settings: Any) -> Tensor:
    with scope(x):
        S, SB = _thin(result, x, *settings)
        result.view(-1, result.shape[-1]).addmm_(S.to(result.dtype), SB.t())
        return S


def _add_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    A: Tensor,
    B: Tensor,
    dtype: torch.dtype,
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
    with scope(dy):
        DY = rows(dy)
        products, R = _products(DY, A, B, DY.dtype, backend), padded_rank(A.shape[0])
        keep, scaling = kept(products, seed, dropout, DY.shape[0], A.shape[1], scaling)
        SA, SB = products.factors(A, B, scaling, omega, DY.dtype, R)
        S = None if S is None else S.to(DY.dtype)
        DS, dB = dS_and_dB(products, DY, SB, S, B, scaling, omega, need_dx or need_dA, need_dB)
        DS = None if DS is None else DS.to(dtype)
        if need_dx:
            if dtype is not DY.dtype:
                SA, _ = products.factors(A, B, scaling, omega, dtype, R)
            DX = torch.mm(given(DS), SA)
            if keep is not None:
                for part, bits in zip(
                    DX.split(_MASKED_ROWS), keep.split(_MASKED_ROWS), strict=True
                ):
                    part.mul_(keep_mask(bits, A.shape[1]))
            dx = rows_as_of(dy, DX)
        if need_dA:
            X = rows(given(x))
            dA = products.factor_gradient(X, given(DS), A.t(), omega, 1.0, keep).t()
    return dx, dA, dB


def _fake_add_forward(result: Tensor, x: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return result.new_empty(result.shape), _fake_add_forward_(result, x, A)


def _fake_add_forward_(result: Tensor, x: Tensor, A: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], padded_rank(A.shape[0]))


def _fake_add_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    A: Tensor,
    B: Tensor,
    dtype: torch.dtype,
    scaling: float,
    omega: float,
    backend: str,
    seed: Tensor | None,
    dropout: float,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*dy.shape[:-1], A.shape[1])
    dx = dy.new_empty(shape, dtype=dtype) if need_dx else dy.new_empty(0)
    dA = torch.empty_like(A) if need_dA else dy.new_empty(0)
    dB = torch.empty_like(B) if need_dB else dy.new_empty(0)
    return dx, dA, dB


for _device in ("CPU", "CUDA"):
    _library.impl("add_forward", _add_forward, _device)
    _library.impl("add_forward_", _add_forward_, _device)
    _library.impl("add_backward", with_empty(_add_backward), _device)
torch.library.register_fake("fastbound::add_forward", _fake_add_forward, lib=_library)
torch.library.register_fake("fastbound::add_forward_", _fake_add_forward_, lib=_library)
torch.library.register_fake("fastbound::add_backward", _fake_add_backward, lib=_library)

add_forward = direct(torch.ops.fastbound.add_forward.default, _add_forward)
add_forward_ = direct(torch.ops.fastbound.add_forward_.default, _add_forward_)
add_backward = direct(torch.ops.fastbound.add_backward.default, _add_backward)


class _BoundedAddition(torch.autograd.Function):
    """Saves x as it came, S [M, R] and references to A and B; nothing of size [M, N]."""

    @staticmethod
    def forward(
        result: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        omega: float,
        backend: str,
        seed: Tensor | None,
        dropout: float,
        in_place: bool,
    ) -> tuple[Tensor, Tensor]:
        if not in_place:
            y, S = add_forward(result, x, A, B, scaling, omega, backend, seed, dropout)
            return y, S
        S = add_forward_(result, x, A, B, scaling, omega, backend, seed, dropout)
        # The same memory as a tensor of this node's own. mark_dirty would make the graph copy dy
        # where result is a view, which a linear layer's is for any x of three dimensions.
        return result.detach(), S

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, x, A, B, ctx.scaling, ctx.omega, ctx.backend, seed, ctx.dropout, _ = inputs
        _, S = output
        ctx.mark_non_differentiable(S)
        ctx.set_materialize_grads(False)
        ctx.dtype = x.dtype
        _, _, need_dA, need_dB, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_dA else None, S if need_dB else None, A, B, seed)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        x, S, A, B, seed = ctx.saved_tensors
        need_dresult, *needs = ctx.needs_input_grad[:4]
        gradients = [None] * 3
        if any(needs):
            settings = (ctx.dtype, ctx.scaling, ctx.omega, ctx.backend, seed, ctx.dropout)
            made = add_backward(dy, x, S, A, B, *settings, *needs)
            gradients = [g if need else None for g, need in zip(made, needs, strict=True)]
        return (dy if need_dresult else None, *gradients, *(None,) * 6)


_apply = apply_of(_BoundedAddition)


def bounded_addition(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float = 1.0,
    omega: float = 1.0,
    backend: str = "auto",
    dropout: float = 0.0,
    give_up: bool = False,
) -> Tensor:
    """``y = result + scaling · (x sin(omega·A)ᵀ) sin(omega·B)ᵀ``, result being a base's output.

    Args:
        result: [..., N], what the base layer made of x; any floating dtype.
        x: [..., K], what went into the base layer; its dtype need not be result's.
        A, B: [r, K] and [N, r], trained; any floating dtype, fp32 advised.
        scaling, omega: as for :func:`fastbound.bounded_linear`.
        backend: as there, but not "fused".
        dropout: as there.
        give_up: the caller has no further use for ``result``: y may take its memory, where
            :func:`can_write_into` finds that safe.

    Returns:
        y [..., N] in result's dtype. S = x sin(omega·A)ᵀ is computed in x's compute dtype
        (autocast's where autocast is on, else x's own), S (s·sin omega·B)ᵀ in result's; both
        accumulate in fp32 (fp64 for fp64). The gradient is differentiable once.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: shapes that do not match, tensors on different devices, a DTensor, a scaling or
            omega that is not finite, a dropout outside 0 <= p < 1, a backend that is unknown or
            "fused".
    """
    _check(result, x, A, B, scaling, omega, backend)
    seed = draw_seed(x.device) if check_dropout(dropout) else None
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    if backend == "reference":
        with torch.autocast(device_type, enabled=False):
            if seed is not None:
                M, K = x.numel() // x.shape[-1], x.shape[-1]
                x = x * keep_mask(keep_bits(seed, M, K, dropout), K).view(x.shape)
                scaling = scaling / keep_rate(dropout)
            SA = torch.sin(omega * A.to(reference.wide_dtype(A))).to(x.dtype)
            SB = torch.sin(omega * B.to(reference.wide_dtype(B))).to(result.dtype)
            return result + scaling * linear(linear(x, SA).to(result.dtype), SB)
    in_place = give_up and can_write_into(result, x)
    y, _ = _apply(
        result, x, A, B, float(scaling), float(omega), backend, seed, float(dropout), in_place
    )
    return y


def can_write_into(result: Tensor, x: Tensor) -> bool:
    """Whether y may take result's memory, as far as the tensors themselves can tell.

    No: under torch.compile, functorch or a dispatch mode (selective checkpointing keeps outputs);
    for a subclass, a parameter or a leaf that is trained; for a part of a larger tensor, an
    expanded one or x itself; and where the node that made it may keep it for its backward.
    """
    if not nothing_intercepts() or type(result) is not Tensor:
        return False
    storage = result.untyped_storage()
    if not result.is_contiguous() or storage.nbytes() != result.numel() * result.itemsize:
        return False
    if storage.data_ptr() == x.untyped_storage().data_ptr():
        return False
    node: Any = result.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is None:
        return not result.requires_grad
    return node.name() in _KEEP_NO_RESULT


def _check(
    result: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, omega: float, backend: str
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    # Not math.isfinite: torch.compile traces this with symbolic floats. inf - inf is a NaN.
    if scaling - scaling != 0 or omega - omega != 0:
        raise ValueError(f"scaling and omega must be finite, got {scaling} and {omega}")
    shapes = f"result {list(result.shape)}, x {list(x.shape)}, A {list(A.shape)}, B {list(B.shape)}"
    if x.dim() < 1 or result.dim() < 1 or A.dim() != 2 or B.dim() != 2 or A.shape[0] < 1:
        raise ValueError(f"expected result [..., N], x [..., K], A [r, K], B [N, r]; got {shapes}")
    if x.shape[:-1] != result.shape[:-1]:
        raise ValueError(f"result and x differ in their rows: {shapes}")
    if (B.shape[0], A.shape[1], B.shape[1]) != (result.shape[-1], x.shape[-1], A.shape[0]):
        raise ValueError(f"A [r, K] and B [N, r] do not match result [..., N] and x: {shapes}")
    for name, tensor in (("result", result), ("x", x), ("A", A), ("B", B)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: expected a floating dtype")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move one of them")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no storage: load it first")
        spread = partition(tensor)
        if spread is not None:
            raise ValueError(f"{name} {spread}: {GATHER}")
