"""Each kernel against its product in fp64, through Triton's interpreter where there is no GPU.

Outputs and workspaces are poisoned with NaN before every launch, so an element that a kernel does
not write fails the comparison. The interpreter's dot multiplies bf16 bit patterns as integers; the
fixture `interpreted_bf16` gives it the values instead.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbound.truth.exactness import assert_as_exact_as_the_formula
from fastbound.truth.operands import layer_operands, run

pytest.importorskip(
    "triton", reason="the kernels need Triton, which has no build for this platform"
)

from fastbound.kernels import factors as factors_kernel
from fastbound.kernels import lowrank_gemm as gemm_kernel
from fastbound.kernels import narrow as narrow_kernel
from fastbound.kernels import reduce as reduce_kernel
from fastbound.kernels import sine as sine_kernel
from fastbound.kernels import thin as thin_kernel
from fastbound.kernels.tiles import GemmTile, Tile

from fastbound import bounded_linear
from fastbound.dispatch.defaults import padded_rank
from fastbound.truth.exactness import assert_within_rounding

pytestmark = pytest.mark.usefixtures("poisoned_empty", "interpreted_bf16")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANKS = [1, 3, 4, 8, 16, 24, 64]
ODD = [(1, 1, 1), (33, 65, 17), (70, 31, 100), (129, 64, 96), (64, 130, 257)]


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=generator).to(DEVICE, dtype)


class TestSine:
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e8])
    def test_fp32_sine_and_cosine_to_the_last_bit(self, scale: float) -> None:
        """Correctly rounded from fp64: at most one unit in the last place off the nearest fp32."""
        import triton
        import triton.language as tl

        @triton.jit
        def kernel(X, S, C, BLOCK: tl.constexpr):
            offs = tl.arange(0, BLOCK)
            sine, cosine = sine_kernel.sine_cosine(tl.load(X + offs))
            tl.store(S + offs, sine.to(tl.float32))
            tl.store(C + offs, cosine.to(tl.float32))

        x = normal(1024) * scale
        x[:4] = torch.tensor([0.0, -0.0, torch.pi / 4 * scale, -torch.pi / 2])
        S, C = torch.empty(1024, device=DEVICE), torch.empty(1024, device=DEVICE)
        kernel[(1,)](x, S, C, BLOCK=1024)
        for got, expected in ((S, x.double().sin()), (C, x.double().cos())):
            nearest = expected.float()
            step = (torch.nextafter(nearest, torch.full_like(nearest, 2.0)) - nearest).abs()
            assert ((got - nearest).abs() <= step).all()

    @pytest.mark.parametrize("magnitude", [1e16, 1e18, 1e24, 1e38])
    def test_the_bound_holds_for_arguments_of_any_size(self, magnitude: float) -> None:
        A, B = magnitude * normal(4, 32), normal(48, 4)
        x, W = torch.eye(32, device=DEVICE), torch.zeros(48, 32, device=DEVICE)
        change = bounded_linear(x, W, A, B, scaling=0.25, backend="split")
        assert change.abs().max() <= 1


class TestNarrow:
    """fp32 matrices in fp16, whose columns are times powers of two."""

    def matrix(self, M: int, R: int) -> torch.Tensor:
        """Columns from 1e-20 to 1e20, one of zeros, and a NaN and an infinity in a row each."""
        P = normal(M, R) * torch.logspace(-20, 20, R, device=DEVICE)
        P[:, 3] = 0.0
        P[2, 1], P[4, 2] = float("nan"), float("inf")
        return P

    @pytest.mark.parametrize("M", [7, 1500])
    def test_alone_it_is_the_matrix_to_a_rounding(self, M: int) -> None:
        P = self.matrix(M, 16)
        narrow, scale = narrow_kernel.narrowed(P)
        assert narrow.dtype is torch.float16 and bool((torch.frexp(scale)[0] == 0.5).all())
        finite = P.isfinite()
        assert torch.equal(narrow.isfinite(), finite)
        got, expected = (narrow.double() * scale.double())[finite], P.double()[finite]
        size = P.abs().where(finite, 0.0).amax(0).double().expand_as(P)[finite]
        assert bool(((got - expected).abs() <= 2**-11 * expected.abs() + 2**-37 * size).all())

    def test_as_a_pair_the_product_is_the_same_and_within_range(self) -> None:
        P, F = normal(40, 16), normal(16, 9).t()
        size = torch.logspace(-12, 12, 16, device=DEVICE)
        narrow, narrow_F = narrow_kernel.narrowed_pair(P * size, F / size)
        assert narrow_F.stride() == F.stride() and narrow.abs().max() < 2
        expected, terms = P.double() @ F.double().t(), P.double().abs() @ F.double().abs().t()
        got = narrow.double() @ narrow_F.double().t()
        assert bool(((got - expected).abs() <= 2**-9 * terms).all())


class TestFactors:
    @pytest.mark.parametrize("rank", RANKS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sine_scaled_and_zero_padded(self, rank: int, dtype: torch.dtype) -> None:
        A, B, R = normal(rank, 97) * 10, normal(203, rank) * 10, padded_rank(rank)
        SA, SB = factors_kernel.factors(A, B, R, 0.7, 1.3, dtype)
        angle_A, angle_B = (A * 1.3).double(), (B * 1.3).double()
        one = torch.ones((), dtype=torch.float64, device=DEVICE)
        assert_within_rounding(SA[:rank], angle_A.sin(), one)
        assert_within_rounding(SB[:, :rank], 0.7 * angle_B.sin(), one)
        assert not SA[rank:].any() and not SB[:, rank:].any()

    def test_reads_bf16_masters_and_strided_ones(self) -> None:
        A, B = normal(64, 8).t().bfloat16(), normal(8, 96).t()
        SA, SB = factors_kernel.factors(A, B, 16, 1.0, 1.0, torch.float32)
        one = torch.ones((), dtype=torch.float64, device=DEVICE)
        assert_within_rounding(SA[:8], A.double().sin(), one)
        assert_within_rounding(SB[:, :8], B.double().sin(), one)


class TestThin:
    @pytest.mark.parametrize("shape", ODD)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tile", [Tile(32, 32, 4, 2), Tile(64, 128, 4, 4)], ids=str)
    def test_product(self, shape: tuple[int, int, int], dtype: torch.dtype, tile: Tile) -> None:
        M, _, K = shape
        T, F = normal(M, K, dtype=dtype), normal(16, K, dtype=dtype).t()
        got = thin_kernel.thin(T, F, tile, 4)
        assert_within_rounding(got, T.double() @ F.double(), T.double().abs() @ F.double().abs())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("K", [256, 331])
    def test_product_in_parts(self, K: int, dtype: torch.dtype) -> None:
        T, F, tile = normal(300, K, dtype=dtype), normal(K, 16, dtype=dtype), Tile(64, 16, 4, 2)
        assert thin_kernel.step_chunks(300, K, tile, 16)[0] > 1
        got = thin_kernel.thin(T, F, tile, 16)
        assert_within_rounding(got, T.double() @ F.double(), T.double().abs() @ F.double().abs())

    @given(M=st.integers(1, 10_000), K=st.integers(1, 100_000), sms=st.integers(1, 304))
    def test_step_chunks_cover_every_column_once(self, M: int, K: int, sms: int) -> None:
        chunks, chunk = thin_kernel.step_chunks(M, K, Tile(16, 128, 4, 4), sms)
        assert chunk % 128 == 0
        assert (chunks - 1) * chunk < K <= chunks * chunk


class TestReduce:
    @pytest.mark.parametrize("shape", ODD)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("multiprocessors", [1, 4])
    def test_both_products_from_one_read(
        self, shape: tuple[int, int, int], dtype: torch.dtype, multiprocessors: int
    ) -> None:
        M, N, _ = shape
        T, F, G = (normal(*s, dtype=dtype) for s in ((M, N), (N, 16), (M, 16)))
        angle = normal(N, 5)
        tile = Tile(16, 32, 4, 2)
        arguments = (angle, 1.3, 0.7, tile, multiprocessors)
        thin, gradient = reduce_kernel.thin_and_reduce(T, F, G, *arguments)
        t, f, g = T.double(), F.double(), G[:, :5].double()
        cosine = 0.7 * 1.3 * torch.cos((angle * 1.3).double())
        assert_within_rounding(thin, t @ f, t.abs() @ f.abs())
        assert_within_rounding(gradient, cosine * (t.T @ g), cosine.abs() * (t.abs().T @ g.abs()))
        assert torch.equal(gradient, reduce_kernel.reduce(T, G, *arguments))

    def test_writes_the_gradient_in_the_strides_and_dtype_of_the_factor(self) -> None:
        A = normal(5, 40, dtype=torch.float16)
        gradient = reduce_kernel.reduce(
            normal(30, 40), normal(30, 16), A.t(), 1.0, 1.0, Tile(16, 32, 4, 2), 4
        ).t()
        assert gradient.shape == A.shape and gradient.dtype == A.dtype
        assert gradient.is_contiguous()

    @given(M=st.integers(1, 100_000), N=st.integers(1, 100_000), sms=st.integers(1, 304))
    def test_row_chunks_cover_every_row_once(self, M: int, N: int, sms: int) -> None:
        tile = Tile(64, 512, 8, 3)
        chunks, chunk = reduce_kernel.row_chunks(M, N, tile, sms)
        assert chunk % tile.block_m == 0
        assert (chunks - 1) * chunk < M <= chunks * chunk


GEMM_TILES = [
    GemmTile(32, 32, 32, 4, 2),
    GemmTile(128, 256, 64, 8, 3),
    GemmTile(32, 64, 32, 4, 2, descriptors=True),
    GemmTile(128, 256, 64, 8, 3, descriptors=True),
    GemmTile(32, 64, 32, 4, 2, descriptors=True, stores=2),
    GemmTile(64, 128, 32, 4, 2, descriptors=True, stores=4),
]


class TestLowrankGemm:
    def check(self, X, W, S, F, bias, tile: GemmTile) -> None:
        got = gemm_kernel.lowrank_gemm(X, W, S, F, bias, tile, 3)
        x, w, s, f = (t.double() for t in (X, W, S, F))
        expected = x @ w.T + s @ f.T
        terms = x.abs() @ w.abs().T + s.abs() @ f.abs().T
        if bias is not None:
            expected, terms = expected + bias.double(), terms + bias.double().abs()
        assert_within_rounding(got, expected, terms)

    @pytest.mark.parametrize("tile", GEMM_TILES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(64, 96, 64), (72, 200, 136), (129, 257, 65), (1, 1, 1)])
    @pytest.mark.parametrize("transposed", [False, True], ids=["W", "W transposed"])
    def test_forward_and_dx_are_one_kernel(
        self, tile: GemmTile, dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
    ) -> None:
        if dtype is torch.float32 and tile.block_n == 256:
            # An H200 has too little shared memory for 128x256x64 of fp32 by descriptors.
            tile = replace(tile, block_m=64, block_n=128, block_k=32)
        M, N, K = shape
        W = normal(K, N, dtype=dtype).t() if transposed else normal(N, K, dtype=dtype)
        F = normal(32, N, dtype=dtype).t() if transposed else normal(N, 32, dtype=dtype)
        bias = None if transposed else normal(N, dtype=dtype)
        self.check(normal(M, K, dtype=dtype), W, normal(M, 32, dtype=dtype), F, bias, tile)

    def test_descriptors_are_used_exactly_where_alignment_allows(self) -> None:
        tile = GemmTile(32, 32, 32, 4, 2, descriptors=True)
        S, F = normal(40, 16), normal(48, 16)

        def form(X: torch.Tensor, W: torch.Tensor) -> str:
            Y = torch.empty(40, 48, device=DEVICE)
            launch = gemm_kernel.launch_lowrank_gemm(X, W, S, F, None, Y, tile, 4)
            return launch.kernel.__name__

        x, w = normal(40, 64), normal(48, 64)
        assert form(x, w) == "_descriptor_kernel"
        assert form(x, normal(64, 48).t()) == "_descriptor_kernel"
        assert form(normal(40, 128)[:, ::2], w) == "_pointer_kernel"
        assert form(normal(40, 65)[:, :64], w) == "_pointer_kernel"
        assert form(normal(40 * 64 + 1)[1:].view(40, 64), w) == "_pointer_kernel"

    @pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
    def test_operands_that_are_loaded_element_by_element_take_a_tile_without_spills(
        self, descriptors: bool
    ) -> None:
        wide, small = (
            GemmTile(128, 256, 64, 8, 3, descriptors=descriptors),
            GemmTile(64, 64, 64, 4, 2),
        )
        x, w, S, F = normal(40, 65), normal(48, 64), normal(40, 16), normal(48, 16)

        def block(X: torch.Tensor, tile: GemmTile) -> tuple[int, ...]:
            Y = torch.empty(40, 48, device=DEVICE)
            launch = gemm_kernel.launch_lowrank_gemm(X, w, S, F, None, Y, tile, 4)
            return tuple(launch.constants[f"BLOCK_{name}"] for name in "MNK")

        assert block(x[:, :64], wide) == (128, 128, 32)
        assert block(x[:, :64].contiguous(), wide) == (128, 256, 64)
        assert block(x[:, :64], small) == (64, 64, 64)

    @pytest.mark.parametrize(
        "tile", [GEMM_TILES[0], GEMM_TILES[2]], ids=["pointers", "descriptors"]
    )
    @pytest.mark.parametrize("rank", [*RANKS, 128])  # two projections of a block side by side
    def test_every_rank(self, rank: int, tile: GemmTile) -> None:
        R = padded_rank(rank)
        self.check(normal(50, 40), normal(60, 40), normal(50, R), normal(60, R), None, tile)


class TestThroughAutograd:
    @pytest.mark.parametrize("rank", RANKS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("backend", ["fused", "split"])
    def test_matches_fp64_at_every_rank(self, rank: int, dtype: torch.dtype, backend: str) -> None:
        o = layer_operands((3, 15, 67), 129, rank, dtype, device=DEVICE)
        assert_as_exact_as_the_formula(o, bounded_linear, backend=backend)

    @pytest.mark.slow
    @settings(deadline=None, max_examples=40)
    @given(data=st.data())
    def test_matches_fp64_on_any_shape(self, data: st.DataObject) -> None:
        o = layer_operands(
            (data.draw(st.integers(1, 300), "M"), data.draw(st.integers(1, 300), "K")),
            data.draw(st.integers(1, 300), "N"),
            data.draw(st.sampled_from(RANKS), "rank"),
            data.draw(st.sampled_from(DTYPES), "dtype"),
            bias=data.draw(st.booleans(), "bias"),
            magnitude=data.draw(st.sampled_from([0.02, 1.0, 10.0]), "magnitude"),
            scaling=data.draw(st.sampled_from([0.05, 1.0, 2.0]), "scaling"),
            omega=data.draw(st.sampled_from([0.5, 1.0, 3.0]), "omega"),
            seed=data.draw(st.integers(0, 2**31), "seed"),
            device=DEVICE,
        )
        assert_as_exact_as_the_formula(o, bounded_linear, backend="fused")

    @pytest.mark.parametrize("layout", ["x", "weight", "dy", "expanded dy"])
    def test_strided_operands(self, layout: str) -> None:
        from dataclasses import replace

        o = layer_operands((45, 64), 96, 8, torch.float32, device=DEVICE)
        if layout == "expanded dy":
            o = replace(o, dy=torch.ones(1, 1, device=DEVICE).expand(45, 96))
        else:
            wide = torch.stack([getattr(o, layout)] * 2, dim=-1).flatten(-2)
            o = replace(o, **{layout: wide[..., ::2]})
        assert_as_exact_as_the_formula(o, bounded_linear, backend="fused")

    @pytest.mark.parametrize("kind", ["every second", "a column", "one number"])
    def test_a_bias_of_any_stride(self, kind: str) -> None:
        o = layer_operands((33, 32), 48, 4, torch.float32, device=DEVICE)
        long = normal(96)
        bias = {
            "every second": long[::2],
            "a column": long.view(48, 2)[:, 1],
            "one number": long[:1].expand(48),
        }[kind]
        settings = {"scaling": o.scaling, "omega": o.omega, "backend": "fused"}
        y = bounded_linear(o.x, o.weight, o.A, o.B, bias, **settings)
        assert torch.equal(y, bounded_linear(o.x, o.weight, o.A, o.B, bias.clone(), **settings))

    def test_two_runs_give_the_same_bits(self) -> None:
        o = layer_operands((100, 96), 160, 8, torch.float16, device=DEVICE)
        first, second = (run(o, bounded_linear, backend="fused") for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name

    @pytest.mark.parametrize(("backend", "count"), [("fused", 9), ("split", 7)])
    def test_launches_of_forward_and_backward(
        self, backend: str, count: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Seven beside the two GEMMs, which the split path leaves to cuBLAS."""
        from fastbound.kernels.launch import Launch

        launched: list[str] = []
        launch = Launch.run

        def counted(self: Launch) -> None:
            launched.append(self.kernel.__name__)
            launch(self)

        monkeypatch.setattr(Launch, "run", counted)
        run(
            layer_operands((40, 48), 64, 8, torch.float32, device=DEVICE),
            bounded_linear,
            backend=backend,
        )
        assert len(launched) == count, launched

    def test_empty_x(self) -> None:
        o = layer_operands((0, 12), 20, 4, torch.float32, device=DEVICE)
        results = run(o, bounded_linear, backend="fused")
        assert results["y"].shape == (0, 20)
        assert not results["dA"].any() and not results["dB"].any()
