"""One call: an adapter's term, a block's projections, and the checks before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbound.dispatch.defaults import padded_rank
from fastbound.dispatch.plan import BACKENDS
from fastbound.operator.partition import GATHER, partition
from fastbound.truth.formula import ADAPTER_FORMS, Projection

# A Term and a BlockCall as arguments of the registered operators.
TERM_SCHEMA = (
    "Tensor A, Tensor B, float scaling, float omega, str backend,"
    ' Tensor? seed=None, float dropout=0.0, str form="factors"'
)
BLOCK_SCHEMA = (
    ", ".join(
        f"Tensor? {name}_weight, Tensor? {name}_bias, Tensor? {name}_A, Tensor? {name}_B"
        for name in ("gate", "up", "down")
    )
    + ", float[] scalings, float[] omegas, str activation, str backend, str form"
)
SETTINGS = 5  # the arguments of a block that follow its tensors


class Term(NamedTuple):
    """The adapter's term ``x ΔWᵀ`` of one call; A [r, K], B [N, r].

        factors    scaling · (drop(x) sin(omega·A)ᵀ) sin(omega·B)ᵀ
        product    scaling · x sin(omega·B A)ᵀ

    ``dropout`` is p, and ``seed`` is None if nothing is dropped.
    """

    A: Tensor
    B: Tensor
    scaling: float
    omega: float
    backend: str = "auto"
    seed: Tensor | None = None
    dropout: float = 0.0
    form: str = "factors"

    @property
    def R(self) -> int:
        """The width of SA, SB and S; 0 in the product form, which has no thin product."""
        return 0 if self.form == "product" else padded_rank(self.A.shape[0])


class BlockCall(NamedTuple):
    """An MLP block's projections and settings, in the order in which the operators take them.

    In a plain block ``gate`` is the first projection and ``up`` is None.
    """

    gate: Projection
    up: Projection | None
    down: Projection
    activation: str
    backend: str = "auto"

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> BlockCall:
        """The call whose arguments :meth:`flat` returned."""
        *tensors, scalings, omegas, activation, backend, form = arguments
        gate, up, down = (
            None
            if tensors[4 * i] is None
            else Projection(*tensors[4 * i : 4 * i + 4])._replace(scaling=s, omega=omega, form=form)
            for i, (s, omega) in enumerate(zip(scalings, omegas, strict=True))
        )
        if gate is None or down is None:
            raise RuntimeError("fastbound::mlp: a block needs its first and its last projection")
        return cls(gate, up, down, activation, backend)

    def flat(self) -> tuple[Any, ...]:
        """Twelve tensors, scalings, omegas, activation, backend, form: arguments for autograd."""
        three = self.projections()
        tensors = [t for p in three for t in ((None,) * 4 if p is None else p[:4])]
        scalings = [1.0 if p is None else float(p.scaling) for p in three]
        omegas = [1.0 if p is None else float(p.omega) for p in three]
        return (*tensors, scalings, omegas, self.activation, self.backend, self.form)

    def projections(self) -> tuple[Projection, Projection | None, Projection]:
        """gate, up and down."""
        return self.gate, self.up, self.down

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the adapted projections."""
        return tuple(p.A.shape[0] for p in self.projections() if p is not None and p.A is not None)

    @property
    def form(self) -> str:
        """The form of the adapted projections; "factors" if there is none."""
        adapted = [p.form for p in self.projections() if p is not None and p.A is not None]
        return adapted[0] if adapted else "factors"

    @property
    def R(self) -> int:
        """The width that the thin products share: the largest padded rank."""
        return padded_rank(max(self.ranks, default=1))


class Factors(NamedTuple):
    """One projection prepared for the engine: weight [N, K] cast, SA [R, K] and SB [N, R]."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    SA: Tensor | None
    SB: Tensor | None
    scaling: float
    omega: float


def check_form(form: str, backend: str, dropout: float) -> None:
    """Raise ValueError for an unknown form, or if the form does not support the other two."""
    if form not in ADAPTER_FORMS:
        raise ValueError(f"unknown form {form!r}: choose one of {', '.join(ADAPTER_FORMS)}")
    if form == "product" and backend == "fused":
        raise ValueError(
            'backend="fused" does not exist for form="product", whose GEMMs take W + ΔW as one '
            'weight: use "auto"'
        )
    if form == "product" and dropout:
        raise ValueError(
            f'form="product" does not support adapter dropout, got {dropout:g}: x is multiplied by '
            "W + ΔW as one weight, so masking x for ΔW alone would cost a second GEMM; use "
            'form="factors"'
        )


def autocast_to(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts `dtype`, or None if it is off or does not apply."""
    kind = device.type
    if dtype is torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def check_operands(
    x: Tensor,
    term: Term,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    result: Tensor | None = None,
) -> None:
    """Check a call with a weight, or with a base layer's result.

    Raises the TypeError and ValueError that ``function.bounded_linear`` and
    ``function.bounded_addition`` document.
    """
    A, B, scaling, omega, backend, _, dropout, form = term
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    check_form(form, backend, dropout)
    # Not math.isfinite: torch.compile traces this with symbolic floats. inf - inf is a NaN.
    if scaling - scaling != 0 or omega - omega != 0:
        raise ValueError(f"scaling and omega must be finite, got {scaling} and {omega}")
    device = x.device
    for name, tensor in zip(_NAMES, (x, weight, A, B, bias, result), strict=True):
        if tensor is None:
            continue
        spread = partition(tensor)
        if spread is not None:
            raise ValueError(f"{name} {spread}: {GATHER}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: expected a floating dtype")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and x on {device}: move one of them")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no storage: load it first")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}: call {name}.to_dense() first")
    base = result if weight is None else weight
    if base is None:
        raise ValueError("a call needs a weight, or a base layer's result to add to")
    base_dims = 2 if weight is not None else max(1, base.dim())
    if A.dim() != 2 or B.dim() != 2 or x.dim() < 1 or base.dim() != base_dims:
        kind, name = (
            ("result [..., N]", "result") if weight is None else ("weight [N, K]", "weight")
        )
        raise ValueError(
            f"expected x [..., K], {kind}, A [r, K], B [N, r]; got x {list(x.shape)}, "
            f"{name} {list(base.shape)}, A {list(A.shape)}, B {list(B.shape)}"
        )
    K, (rank, K_of_A), (N_of_B, rank_of_B) = x.shape[-1], A.shape, B.shape
    N = base.shape[-1] if weight is None else base.shape[0]

    if weight is not None and weight.shape[1] != K:
        raise _mismatch("x", x, weight, base, "K differs")
    if result is not None and result.shape[:-1] != x.shape[:-1]:
        raise _mismatch("x", x, weight, base, "their rows differ")
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got A {list(A.shape)}")
    if K_of_A != K and weight is None:
        raise ValueError(f"A {list(A.shape)} does not match x {list(x.shape)}: K differs")
    if K_of_A != K:
        raise _mismatch("A", A, weight, base, "K differs")
    if N_of_B != N:
        raise _mismatch("B", B, weight, base, "N differs")
    if rank_of_B != rank:
        raise ValueError(f"B {list(B.shape)} does not match A {list(A.shape)}: rank differs")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise _mismatch("bias", bias, weight, base, f"expected [{N}]")
    trained = None if weight is None else trained_weight(weight)
    if trained is not None:
        raise ValueError(trained)


def trained_weight(weight: Tensor) -> str | None:
    """Why a call refuses a weight that requires grad, with the remedy; None if it does not."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return None
    remedy = "call weight.requires_grad_(False), or train it through a plain layer"
    transposed = weight._base is not None and weight._base.dim() == 2  # that of a Conv1D
    if not weight.is_leaf and not transposed:  # FSDP1 flattens all parameters into one
        remedy = (
            "it is part of a tensor that is trained; under FSDP, wrap the adapters in units "
            "of their own with "
            "auto_wrap_policy=peft.utils.other.fsdp_auto_wrap_policy(model)"
        )
    return f"weight requires grad, but the operator returns no gradient for it: {remedy}"


def _mismatch(
    name: str, tensor: Tensor, weight: Tensor | None, base: Tensor, what: str
) -> ValueError:
    kind = "result" if weight is None else "weight"
    shapes = f"{name} {list(tensor.shape)} does not match {kind} {list(base.shape)}"
    return ValueError(f"{shapes}: {what}")


_NAMES = ("x", "weight", "A", "B", "bias", "result")
