"""Everything that a device must compute correctly, case by case, compared with fp64.

A case is a plain value, so that another process can check it. Every call is made twice, and the
results must have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from fastbound.kernels.factors import factors
from fastbound.kernels.lowrank_gemm import lowrank_gemm
from fastbound.kernels.reduce import reduce, thin_and_reduce
from fastbound.kernels.thin import thin
from fastbound.kernels.tiles import GemmTile
from torch import Tensor

import fastbound
from benchmarks.gpu_check.tools import TOOL_CASES, Unavailable
from benchmarks.gpu_check.variants import DTYPES, variant_cases
from fastbound.dispatch.defaults import default_tiles, padded_rank
from fastbound.dispatch.device import describe, free_bytes
from fastbound.dispatch.plan import plan_for, plan_key
from fastbound.operator.block_function import bounded_mlp
from fastbound.performance.shapes import MODEL_SHAPES
from fastbound.truth.exactness import (
    assert_as_exact_as_the_formula,
    assert_block_as_exact,
    assert_same_bits,
    assert_same_results,
    assert_within_rounding,
    exact,
    require_truth,
)
from fastbound.truth.operands import block_operands, drawing, layer_operands, run

RANKS = (1, 3, 8, 16, 24, 64)
ALIGNED, ODD = ((2, 96, 256), 384), ((3, 15, 67), 129)  # x's shape, N
LARGE_TOLERANCE = 2**-6  # relative: rounding to bf16 gives errors of a few thousandths


class Check(Protocol):
    """A case, whose check raises AssertionError, or what a kernel raises, if it is not correct."""

    def check(self, device: torch.device) -> None: ...


@dataclass(frozen=True)
class OperatorCase:
    """A layer's forward and backward by autograd; ``layout`` names the operand that is strided."""

    shape: tuple[int, ...]
    N: int
    rank: int
    dtype: str
    backend: str = "fused"
    layout: str = "contiguous"
    bias: bool = True

    def __str__(self) -> str:
        x = "x".join(map(str, self.shape))
        bias = "" if self.bias else ", no bias"
        return f"{self.backend} {self.dtype} r={self.rank} x {x} N={self.N} {self.layout}{bias}"

    def check(self, device: torch.device) -> None:
        dtype = DTYPES[self.dtype]
        o = layer_operands(self.shape, self.N, self.rank, dtype, bias=self.bias, device=device)
        if self.layout == "expanded dy":
            o = replace(o, dy=torch.ones((), dtype=dtype, device=device).expand(o.dy.shape))
        o = o.changed(lambda name, t: _strided(t) if name == self.layout else t)
        call = partial(fastbound.bounded_linear, backend=self.backend)
        assert_as_exact_as_the_formula(o, call)
        assert_same_results(run(o, call), run(o, call))


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t] * 2, dim=-1).flatten(-2)[..., ::2]


@dataclass(frozen=True)
class BlockCase:
    """A whole MLP block, forward and backward, both saving g and u and recomputing them."""

    M: int
    K: int
    N: int
    rank: int
    dtype: str
    gated: bool
    activation: str = "silu"
    backend: str = "fused"

    def __str__(self) -> str:
        form = "gated" if self.gated else "plain"
        size = f"{self.M}x{self.K}x{self.N}"
        return f"MLP {form} {self.activation} {self.backend} {self.dtype} r={self.rank} {size}"

    def check(self, device: torch.device) -> None:
        o = block_operands(
            (self.M, self.K),
            self.N,
            (self.rank, self.rank, self.rank),
            DTYPES[self.dtype],
            gated=self.gated,
            activation=self.activation,
            device=device,
        )
        call = partial(bounded_mlp, backend=self.backend)
        assert_block_as_exact(o, call)
        assert_same_results(run(o, call), run(o, call), run(o, call, recompute="gate_up"))


def _assert_kernels(
    launch: Callable[[], tuple[Tensor, ...]], truths: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Compare each result with its truth, by the sum of magnitudes, and with a second launch."""
    for (expected, terms), got, again in zip(truths, launch(), launch(), strict=True):
        assert_within_rounding(got, expected, terms)
        assert_same_bits(got, again)


@dataclass(frozen=True)
class GemmCase:
    """X Wᵀ + S Fᵀ + bias with a given tile; ``transposed`` stands for the gradient of x."""

    M: int
    N: int
    K: int
    R: int
    dtype: str
    tile: GemmTile
    transposed: bool

    def __str__(self) -> str:
        which = "gemm dx" if self.transposed else "gemm forward"
        return f"{which} {self.dtype} {self.M}x{self.N}x{self.K} R={self.R} {self.tile}"

    def check(self, device: torch.device) -> None:
        draw = drawing(DTYPES[self.dtype], device=device)
        M, N, K, R = self.M, self.N, self.K, self.R
        X, S = draw(M, K), draw(M, R)
        W = draw(K, N).t() if self.transposed else draw(N, K)
        F = draw(R, N).t() if self.transposed else draw(N, R)
        bias = None if self.transposed else draw(N)
        x, w, s, f = (t.double() for t in (X, W, S, F))
        expected, terms = x @ w.T + s @ f.T, x.abs() @ w.abs().T + s.abs() @ f.abs().T
        if bias is not None:
            expected, terms = expected + bias.double(), terms + bias.double().abs()
        programs = describe(device).multiprocessors
        _assert_kernels(
            lambda: (lowrank_gemm(X, W, S, F, bias, self.tile, programs),), [(expected, terms)]
        )


@dataclass(frozen=True)
class FactorsCase:
    """SA and SB for factors with entries of about ``magnitude``."""

    rank: int
    dtype: str
    magnitude: float

    def __str__(self) -> str:
        return f"factors {self.dtype} r={self.rank} magnitude {self.magnitude:g}"

    def check(self, device: torch.device) -> None:
        draw = drawing(torch.float32, device=device)
        A, B = draw(self.rank, 1037) * self.magnitude, draw(2051, self.rank) * self.magnitude
        first, second = (
            factors(A, B, padded_rank(self.rank), 0.7, 1.3, DTYPES[self.dtype]) for _ in range(2)
        )
        SA, SB = first
        one = torch.ones((), dtype=torch.float64, device=device)
        assert_within_rounding(SA[: self.rank], (A * 1.3).double().sin(), one)
        assert_within_rounding(SB[:, : self.rank], 0.7 * (B * 1.3).double().sin(), one)
        if SA[self.rank :].any() or SB[:, self.rank :].any():
            raise AssertionError("the padding of the rank is not zero")
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)


@dataclass(frozen=True)
class TallCase:
    """The thin product and both reductions of a tall matrix T [M, N]."""

    M: int
    N: int
    rank: int
    dtype: str

    def __str__(self) -> str:
        return f"thin, reduce, finish {self.dtype} r={self.rank} {self.M}x{self.N}"

    def check(self, device: torch.device) -> None:
        dtype, M, N, R = DTYPES[self.dtype], self.M, self.N, padded_rank(self.rank)
        chosen = plan_for(plan_key(device, M, N, N, self.rank, dtype, "fused"))
        tiles = chosen.tiles
        if tiles is None:
            raise Unavailable(chosen.reason)
        draw = drawing(dtype, device=device)
        T, F, G = draw(M, N), draw(N, R), draw(M, R)
        angle = draw(N, self.rank).float()
        arguments = (angle, 1.3, 0.7, tiles.reduce, chosen.multiprocessors)
        t, f, g = T.double(), F.double(), G[:, : self.rank].double()
        cosine = 0.7 * 1.3 * torch.cos((angle * 1.3).double())
        product, products = t @ f, t.abs() @ f.abs()
        gradient, gradients = cosine * (t.T @ g), cosine.abs() * (t.abs().T @ g.abs())
        _assert_kernels(
            lambda: (
                thin(T, F, tiles.thin, chosen.multiprocessors),
                *thin_and_reduce(T, F, G, *arguments),
                reduce(T, G, *arguments),
            ),
            [(product, products)] * 2 + [(gradient, gradients)] * 2,
        )


@dataclass(frozen=True)
class LargeCase:
    """Forward and backward beyond 2^31 elements; y and dx by sampled rows, dA and dB whole."""

    M: int
    N: int
    K: int
    backend: str
    rank: int = 16

    def __str__(self) -> str:
        elements = self.M * max(self.N, self.K) / 2**31
        return f"{self.backend} bf16 {self.M}x{self.N}x{self.K}, {elements:.2f} x 2^31 elements"

    def check(self, device: torch.device) -> None:
        M, N, K = self.M, self.N, self.K
        needed = 5 * M * max(N, K) * 2  # y and dy, or x and dx, with room to spare
        if device.type == "cuda":
            free = free_bytes(device)
            if free < needed:
                raise Unavailable(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
        o = layer_operands(
            (M, K), N, self.rank, torch.bfloat16, bias=False, device=device, on_device=True
        )
        got = run(o, fastbound.bounded_linear, backend=self.backend)
        ends = torch.arange(64, device=device)
        boundary = 2**31 // max(N, K) - 32
        rows = torch.cat([ends, M // 2 + ends, boundary + ends, M - 64 + ends]).clamp(0, M - 1)
        for name, truth in exact(o, rows).items():
            value = got[name][rows] if name in ("y", "dx") else got[name]
            require_truth(name, value, truth, LARGE_TOLERANCE)


@dataclass(frozen=True)
class DispatchedCase(LargeCase):
    """A shape of a model, by a strategy that "auto" may choose for it."""

    def __str__(self) -> str:
        return f"{self.backend} bf16 r={self.rank} of a model's layer, {self.M}x{self.N}x{self.K}"


def cases(device: torch.device, *, tiny: bool = False) -> list[Check]:
    """Every case for the device, the most important first; with ``tiny``, one of each kind."""
    if tiny:
        small = [*_tiny_cases(), *variant_cases(tiny=True)]
        return [*small, *TOOL_CASES[:2]]  # the third starts two processes, which is slow
    return [
        *_dispatched_cases(),
        *TOOL_CASES,
        *_operator_cases(),
        *_block_cases(),
        *variant_cases(),
        *_gemm_cases(device),
        *_other_kernels(),
        *_large_cases(),
    ]


def _tiny_cases() -> Iterator[Check]:
    for dtype in DTYPES:
        yield OperatorCase((2, 9, 32), 48, 3, dtype)
    yield OperatorCase((5, 33), 17, 8, "bf16", backend="split", layout="x")
    for descriptors in (True, False):
        tile = GemmTile(32, 32, 32, 4, 2, descriptors=descriptors)
        yield GemmCase(40, 48, 64, 16, "bf16", tile, transposed=descriptors)
    yield BlockCase(20, 32, 48, 4, "bf16", gated=True)
    yield FactorsCase(3, "bf16", 10.0)
    yield TallCase(70, 40, 8, "bf16")
    yield LargeCase(130, 96, 32, "fused")
    yield DispatchedCase(66, 32, 48, "split", 4)


def _dispatched_cases() -> Iterator[Check]:
    for M in (8192, 1024):
        for shape in MODEL_SHAPES:
            if shape.model in ("llama-3-8b", "gpt-neo-125m"):
                for strategy in ("split", "torch", "fused"):
                    yield DispatchedCase(M, shape.N, shape.K, strategy)


def _operator_cases() -> Iterator[Check]:
    for dtype in ("bf16", "fp16", "fp32"):
        for rank in RANKS:
            for shape, N in (ALIGNED, ODD):
                yield OperatorCase(shape, N, rank, dtype)
        for shape, N in (ALIGNED, ODD):
            yield OperatorCase(shape, N, 16, dtype, backend="split")
            yield OperatorCase(shape, N, 16, dtype, bias=False)
        for layout in ("x", "weight", "dy", "expanded dy"):
            yield OperatorCase(*ALIGNED, 8, dtype, layout=layout)
        yield OperatorCase((1, 64), 64, 8, dtype)  # one token
    yield OperatorCase((4096, 1024), 2048, 16, "bf16")
    yield OperatorCase((2048, 2048), 1024, 64, "fp16")


def _block_cases() -> Iterator[Check]:
    for dtype in ("bf16", "fp16", "fp32"):
        for gated, activation in ((True, "silu"), (False, "gelu_tanh")):
            yield BlockCase(200, 256, 384, 16, dtype, gated, activation)
            yield BlockCase(45, 67, 129, 3, dtype, gated, activation)
            yield BlockCase(200, 256, 384, 8, dtype, gated, activation, backend="split")
        yield BlockCase(200, 256, 384, 16, dtype, gated=True, activation="gelu")
    yield BlockCase(200, 256, 384, 32, "bf16", gated=True)
    yield BlockCase(2048, 1024, 2816, 16, "bf16", gated=True)


def _gemm_cases(device: torch.device) -> Iterator[Check]:
    described = describe(device)
    small = GemmTile(64, 64, 32, 4, 3)
    for dtype in ("bf16", "fp16", "fp32"):
        tiles = default_tiles(described, 4096, 16, DTYPES[dtype])
        for transposed in (False, True):
            default = tiles.gemm_t if transposed else tiles.gemm
            for tile in dict.fromkeys((default, small)):
                for descriptors, stores in ((True, 1), (True, 4), (False, 1)):
                    form = replace(tile, descriptors=descriptors, stores=stores)
                    K = 1024 if tile is default else 1032  # whole steps of K, or a partial last one
                    yield GemmCase(520, 776, K, 16, dtype, form, transposed)
            yield GemmCase(129, 257, 65, 16, dtype, small, transposed)
    for R in (32, 64):
        tile = default_tiles(described, 4096, R, torch.bfloat16).gemm
        yield GemmCase(1000, 512, 2048, R, "bf16", tile, transposed=False)


def _other_kernels() -> Iterator[Check]:
    for dtype in ("bf16", "fp16", "fp32"):
        for rank in (3, 16, 64):
            yield TallCase(1000, 1536, rank, dtype)
            yield TallCase(333, 257, rank, dtype)
        for magnitude in (1.0, 1e4):
            yield FactorsCase(24, dtype, magnitude)
    yield TallCase(20_000, 4096, 16, "bf16")


def _large_cases() -> Iterator[Check]:
    for N, K in ((8256, 64), (64, 8256)):
        yield LargeCase(2**18 + 192, N, K, "fused")
    yield LargeCase(2**18 + 192, 8256, 64, "split")
