"""The product form's kernels against their products in fp64, outputs poisoned with NaN."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "triton", reason="the kernels need Triton, which has no build for this platform"
)

from fastbound.kernels import product
from fastbound.kernels import sine as sine_kernel

from fastbound import bounded_linear
from fastbound.operator.block_function import bounded_mlp
from fastbound.truth.exactness import assert_as_exact_as_the_formula, assert_block_as_exact
from fastbound.truth.operands import block_operands, layer_operands, run

pytestmark = pytest.mark.usefixtures("poisoned_empty", "interpreted_bf16")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e5])
@pytest.mark.parametrize("cosine", [False, True])
def test_fp32_sine_and_cosine_within_two_units_of_one(scale: float, cosine: bool) -> None:
    x = torch.linspace(-scale, scale, 4096)
    got = sines(x, cosine)
    expected = x.double().cos() if cosine else x.double().sin()
    assert (got - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("cosine", [False, True])
def test_no_argument_leaves_the_bound_and_a_nan_stays_one(cosine: bool) -> None:
    x = torch.tensor([1e6, -1e7, 3e9, 1e20, -3e38]).repeat(8)[:32]
    assert (sines(x, cosine).abs() <= 1).all()
    assert sines(torch.full((32,), float("nan")), cosine).isnan().all()


def sines(x: torch.Tensor, cosine: bool) -> torch.Tensor:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(X, OUT, COSINE: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(OUT + offs, sine_kernel.sine_fp32(tl.load(X + offs), COSINE))

    x = x.to(DEVICE)
    out = torch.empty_like(x)
    kernel[(1,)](x, out, cosine, BLOCK=x.numel())
    return out.cpu()


@pytest.mark.parametrize("rank", [1, 3, 16, 24, 64, 100, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_at_every_rank(rank: int, dtype: torch.dtype) -> None:
    M, N, K = (37, 129, 67) if rank < 100 else (9, 33, 40)
    o = layer_operands((M, K), N, rank, dtype, form="product", scaling=0.1, device=DEVICE)
    assert_as_exact_as_the_formula(o, bounded_linear, backend="split")


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 17), (70, 31, 300), (129, 260, 96)])
@pytest.mark.parametrize("argument", [1e-3, 1.0, 1e5])
def test_matches_fp64_on_odd_shapes_for_any_argument(shape, argument: float) -> None:
    M, N, K = shape
    o = layer_operands((M, K), N, 5, torch.float32, form="product", scaling=0.1, device=DEVICE)
    o = o.changed(lambda name, t: t, omega=argument / (o.B @ o.A).abs().max().item())
    assert_as_exact_as_the_formula(o, bounded_linear, backend="split")


@pytest.mark.parametrize("operand", ["x", "weight", "A", "B", "dy"])
def test_strided_operands_are_read_as_they_lie(operand: str) -> None:
    o = layer_operands((33, 40), 56, 8, torch.float16, form="product", scaling=0.1, device=DEVICE)
    strided = o.changed(lambda name, t: t.mT.contiguous().mT if name == operand else t)
    assert not getattr(strided, operand).is_contiguous()
    assert_as_exact_as_the_formula(strided, bounded_linear, backend="split")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_matches_fp64(dtype: torch.dtype) -> None:
    block = block_operands((2, 9, 24), 40, (3, 40, 5), dtype, form="product", device=DEVICE)
    assert_block_as_exact(block, bounded_mlp, backend="split")


def test_two_runs_give_the_same_bits() -> None:
    o = layer_operands((64, 96), 160, 8, torch.bfloat16, form="product", device=DEVICE)
    first, second = (run(o, bounded_linear, backend="split") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("N", [1, 31, 4096, 14336])
def test_chunks_of_the_contraction_cover_every_row_once(N: int) -> None:
    chunks, chunk = product.contract_chunks(N, 4096, 132)
    assert chunk % product.CONTRACT.block_m == 0 and (chunks - 1) * chunk < N <= chunks * chunk
