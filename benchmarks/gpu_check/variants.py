"""Cases of what a layer's call can also be: dropout, a term over a base, a transposed weight, the
product form, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastbound.kernels.dropout import keep_bits as kernel_bits
from torch import Tensor
from torch.nn.functional import linear

from fastbound import bounded_linear
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.dropout import (
    ROUNDS,
    draw_seed,
    keep_bits,
    keep_mask,
    keep_rate,
    threshold,
)
from fastbound.operator.function import bounded_addition
from fastbound.truth import formula
from fastbound.truth.exactness import (
    assert_as_exact_as_the_formula,
    assert_block_as_exact,
    assert_same_bits,
    assert_same_results,
)
from fastbound.truth.operands import LayerOperands, block_operands, layer_operands, run

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RATE, SEED = 0.1, 5  # of dropout, and of the generator that draws its seed


@dataclass(frozen=True)
class VariantCase:
    """A layer's forward and backward as one of `VARIANTS`, twice with the same bits."""

    variant: str
    shape: tuple[int, ...]
    N: int
    rank: int
    dtype: str
    backend: str = "split"

    def __str__(self) -> str:
        x = "x".join(map(str, self.shape))
        return f"{self.variant}, {self.backend} {self.dtype} r={self.rank} x {x} N={self.N}"

    def check(self, device: torch.device) -> None:
        how: dict[str, Any] = {"bias": self.variant != "autocast"}  # which casts it or does not
        if self.variant == "product":
            how |= {"form": "product", "scaling": 0.1}
        dtype = DTYPES[self.dtype]
        o = layer_operands(self.shape, self.N, self.rank, dtype, device=device, **how)
        call = VARIANTS[self.variant](o, self.backend)
        assert_same_results(run(o, call), run(o, call))


@dataclass(frozen=True)
class ProductBlockCase:
    """A gated block in the product form."""

    dtype: str

    def __str__(self) -> str:
        return f"MLP gated silu, product form, split {self.dtype} r=3, 40, 5 60x64x96"

    def check(self, device: torch.device) -> None:
        dtype = DTYPES[self.dtype]
        o = block_operands((60, 64), 96, (3, 40, 5), dtype, form="product", device=device)
        assert_block_as_exact(o, partial(bounded_mlp, backend="split"))


@dataclass(frozen=True)
class MaskCase:
    """The kernel's bits of a dropout mask are those of Philox in PyTorch."""

    M: int
    K: int

    def __str__(self) -> str:
        return f"dropout's mask {self.M}x{self.K}"

    def check(self, device: torch.device) -> None:
        seed = torch.randint(2**62, (1,), device=device)
        made = kernel_bits(seed, self.M, self.K, threshold(RATE), ROUNDS)
        expected = keep_bits(seed, self.M, self.K, RATE)
        assert_same_bits(keep_mask(made, self.K), keep_mask(expected, self.K))


def _dropout(o: LayerOperands, backend: str) -> Callable[..., Tensor]:
    def seeded(x: Tensor, weight: Tensor, **given: Any) -> Tensor:
        torch.manual_seed(SEED)
        return bounded_linear(x, weight, backend=backend, dropout=RATE, **given)

    torch.manual_seed(SEED)
    M, K = o.x.reshape(-1, o.x.shape[-1]).shape
    keep = keep_mask(keep_bits(draw_seed(o.x.device), M, K, RATE), K).view(o.x.shape)

    def masked(x: Tensor, *, scaling: float, **given: Any) -> Tensor:
        return formula.bounded_linear(x, scaling=scaling / keep_rate(RATE), keep=keep, **given)

    assert_as_exact_as_the_formula(o, seeded, masked)
    return seeded


def _over_base(o: LayerOperands, backend: str, *, give_up: bool) -> Callable[..., Tensor]:
    def over(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, **given: Any) -> Tensor:
        base = linear(x, weight, given.pop("bias", None))
        return bounded_addition(base, x, A, B, backend=backend, give_up=give_up, **given)

    assert_as_exact_as_the_formula(o, over)
    return over


def _columns(o: LayerOperands, backend: str) -> Callable[..., Tensor]:
    def transposed(x: Tensor, weight: Tensor, **given: Any) -> Tensor:
        return bounded_linear(x, weight.t().contiguous().t(), backend=backend, **given)

    assert_as_exact_as_the_formula(o, transposed)
    return transposed


def _product(o: LayerOperands, backend: str) -> Callable[..., Tensor]:
    call = partial(bounded_linear, backend=backend)
    assert_as_exact_as_the_formula(o, call)
    return call


def _autocast(o: LayerOperands, backend: str) -> Callable[..., Tensor]:
    """fp32 operands under autocast give the bits of operands in bf16."""
    call = partial(bounded_linear, backend=backend)

    def cast(name: str, tensor: Tensor) -> Tensor:
        return tensor if name in ("A", "B") else tensor.bfloat16()

    with torch.autocast(o.x.device.type, dtype=torch.bfloat16):
        got = run(o, call)
    assert_same_bits(got["y"], run(o.changed(cast), call)["y"], "y")
    return call


VARIANTS: dict[str, Callable[[LayerOperands, str], Callable[..., Tensor]]] = {
    "dropout": _dropout,
    "over a base": partial(_over_base, give_up=False),
    "over a base given up": partial(_over_base, give_up=True),
    "transposed weight": _columns,
    "product": _product,
    "autocast": _autocast,
}


def variant_cases(*, tiny: bool = False) -> Iterator[VariantCase | ProductBlockCase | MaskCase]:
    """All of them over odd and aligned sizes; with `tiny`, one of each kind."""
    if tiny:
        yield MaskCase(37, 67)
        yield from (VariantCase(name, (3, 5, 24), 40, 8, "fp32") for name in VARIANTS)
        return
    yield from (MaskCase(M, K) for M, K in ((1, 1), (37, 67), (1024, 4096), (8192, 14336)))
    sizes = (((3, 15, 67), 129), ((2, 96, 256), 384), ((4096, 1024), 2048))
    for dtype in ("bf16", "fp16", "fp32"):
        for shape, N in sizes:
            for backend in ("fused", "split", "torch"):
                yield VariantCase("dropout", shape, N, 8, dtype, backend)
            for backend in ("fused", "split"):
                yield VariantCase("transposed weight", shape, N, 16, dtype, backend)
            for name in ("over a base", "over a base given up", "product"):
                yield VariantCase(name, shape, N, 16, dtype)
        yield ProductBlockCase(dtype)
    for backend in ("fused", "split"):
        yield VariantCase("autocast", (2, 40, 64), 96, 8, "fp32", backend)
