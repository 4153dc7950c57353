"""The product form's two passes over matrices of the weight's size, n rows of it at a time.

    W + ΔW,  ΔW = s·sin(ω·B A)                                        [n, K]
    dZ = G ⊙ s·ω·cos(ω·B A)      dB = dZ Aᵀ   [n, r]      dA = Bᵀ dZ   [r, K]

G = dyᵀ x is the gradient of those rows. Each tile computes ω·B A again, in fp32 by rank-one
updates: neither it nor its sine, its cosine or dZ is ever stored. The contraction adds its partial
sums in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastbound.kernels.launch import Launch, cdiv
from fastbound.kernels.reduce import launch_finish
from fastbound.kernels.sine import sine_fp32
from fastbound.kernels.tiles import Tile
from torch import Tensor

ADAPT = Tile(32, 128, 4, 1)  # rows x columns of the weight
CONTRACT = Tile(32, 64, 4, 1)  # the same of its gradient; 128 columns spill on some cards
RANK_BLOCK = 32  # columns of dB, and rows of dA, that a program keeps


@triton.jit
def _angle(A, B, offs_n, offs_k, in_n, in_k, rank, omega,
           stride_ar, stride_ak, stride_bn, stride_br,
           BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """ω·B A for one tile, [BLOCK_N, BLOCK_K]; zero outside the matrix."""
    z = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    b_ptrs, a_ptrs = B + offs_n * stride_bn, A + offs_k * stride_ak
    for _ in range(rank):
        b = tl.load(b_ptrs, mask=in_n, other=0.0).to(tl.float32)
        a = tl.load(a_ptrs, mask=in_k, other=0.0).to(tl.float32)
        z += b[:, None] * a[None, :]
        b_ptrs += stride_br
        a_ptrs += stride_ar
    return z * omega


@triton.jit(do_not_specialize=["N", "rank"])
def _adapt_kernel(
    W, A, B, OUT, N, K, rank,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_on, stride_ok,
    omega, scaling,
    HAS_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n, in_k = offs_n < N, offs_k < K
    inside = in_n[:, None] & in_k[None, :]
    z = _angle(A, B, offs_n, offs_k, in_n, in_k, rank, omega,
               stride_ar, stride_ak, stride_bn, stride_br, BLOCK_N, BLOCK_K)
    sum_ = scaling * sine_fp32(z, False)
    if HAS_W:
        w_ptrs = W + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
        sum_ += tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
    o_ptrs = OUT + offs_n[:, None] * stride_on + offs_k[None, :] * stride_ok
    tl.store(o_ptrs, sum_.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "rank", "chunk"])
def _contract_kernel(
    G, A, B, P, Q, N, K, rank, chunk,
    stride_gn, stride_gk, stride_ar, stride_ak, stride_bn, stride_br, omega, slope,
    PRECISION: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    pid_k = tl.program_id(0).to(tl.int64)
    pid_n = tl.program_id(1).to(tl.int64)
    width = tl.num_programs(2) * R
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * R + tl.arange(0, R)
    in_k, in_r = offs_k < K, offs_r < rank
    at_ptrs = A + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    at = tl.load(at_ptrs, mask=in_k[:, None] & in_r[None, :], other=0.0).to(tl.float32)
    q = tl.zeros([R, BLOCK_K], dtype=tl.float32)
    for n in range(pid_n * chunk, tl.minimum(pid_n * chunk + chunk, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        in_n = offs_n < N
        g_ptrs = G + offs_n[:, None] * stride_gn + offs_k[None, :] * stride_gk
        g = tl.load(g_ptrs, mask=in_n[:, None] & in_k[None, :], other=0.0).to(tl.float32)
        z = _angle(A, B, offs_n, offs_k, in_n, in_k, rank, omega,
                   stride_ar, stride_ak, stride_bn, stride_br, BLOCK_N, BLOCK_K)
        dz = slope * sine_fp32(z, True) * g  # [BLOCK_N, BLOCK_K]
        p = tl.dot(dz, at, input_precision=PRECISION)  # [BLOCK_N, R]
        p_ptrs = P + (pid_k * N + offs_n)[:, None] * width + offs_r[None, :]
        tl.store(p_ptrs, p, mask=in_n[:, None])
        bt_ptrs = B + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br
        bt = tl.load(bt_ptrs, mask=in_n[None, :] & in_r[:, None], other=0.0).to(tl.float32)
        q = tl.dot(bt, dz, q, input_precision=PRECISION)  # [R, BLOCK_K]
    q_ptrs = Q + (pid_n * K + offs_k)[None, :] * width + offs_r[:, None]
    tl.store(q_ptrs, q, mask=in_k[None, :])


def launch_adapt(
    W: Tensor | None, A: Tensor, B: Tensor, OUT: Tensor, scaling: float, omega: float
) -> Launch:
    """W [n, K] or None, A [r, K], B [n, r] -> OUT [n, K] = W + scaling·sin(omega·B A).

    OUT is ΔW alone if W is None.
    """
    if OUT.stride(1) != 1 and OUT.stride(0) == 1:  # transpose, so that a tile's rows are contiguous
        return launch_adapt(None if W is None else W.t(), B.t(), A.t(), OUT.t(), scaling, omega)
    (n, K), w = OUT.shape, OUT if W is None else W
    return Launch(
        _adapt_kernel,
        (cdiv(K, ADAPT.block_n), cdiv(n, ADAPT.block_m)),
        (
            w, A, B, OUT, n, K, A.shape[0],
            *w.stride(), *A.stride(), *B.stride(), *OUT.stride(), omega, scaling,
        ),
        dict(HAS_W=W is not None, BLOCK_N=ADAPT.block_m, BLOCK_K=ADAPT.block_n),
        ADAPT.warps,
        ADAPT.stages,
    )  # fmt: skip


def contract_chunks(N: int, K: int, multiprocessors: int) -> tuple[int, int]:
    """(chunks, rows per chunk) of the contraction, for about four programs per multiprocessor."""
    wanted = max(1, 4 * multiprocessors // cdiv(K, CONTRACT.block_n))
    chunk = cdiv(cdiv(N, wanted), CONTRACT.block_m) * CONTRACT.block_m
    return cdiv(N, chunk), chunk


def launch_contract(
    G: Tensor, A: Tensor, B: Tensor, P: Tensor, Q: Tensor, chunk: int,
    scaling: float, omega: float, precision: str,
) -> Launch:  # fmt: skip
    """G [n, K], A [r, K], B [n, r] -> parts P [column blocks, n, R] of dB, Q [chunks, K, R] of dA.

    ``precision`` is that of the two products' operands: "tf32", "tf32x3" or "ieee".
    """
    N, K = G.shape
    R = min(RANK_BLOCK, P.shape[2])
    return Launch(
        _contract_kernel,
        (cdiv(K, CONTRACT.block_n), Q.shape[0], P.shape[2] // R),
        (
            G, A, B, P, Q, N, K, A.shape[0], chunk,
            *G.stride(), *A.stride(), *B.stride(), omega, scaling * omega,
        ),
        dict(PRECISION=precision, R=R, BLOCK_N=CONTRACT.block_m, BLOCK_K=CONTRACT.block_n),
        CONTRACT.warps,
        CONTRACT.stages,
        registers=255,  # otherwise the compiler spills a few so that more programs fit
    )  # fmt: skip


def adapted_weight(
    W: Tensor | None, A: Tensor, B: Tensor, scaling: float, omega: float, dtype: torch.dtype
) -> Tensor:
    """``W + scaling·sin(omega·B A)`` [n, K] in ``dtype``, added in fp32 and rounded once.

    The result has W's layout. If W is None it is ΔW alone.
    """
    (n, _), (_, K) = B.shape, A.shape
    if W is not None and W.stride(0) == 1:
        OUT = A.new_empty(K, n, dtype=dtype).t()
    else:
        OUT = A.new_empty(n, K, dtype=dtype)
    launch_adapt(W, A, B, OUT, scaling, omega).run()
    return OUT


def contract(
    G: Tensor, A: Tensor, B: Tensor, R: int, scaling: float, omega: float, multiprocessors: int,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dA [r, K] and dB [n, r] in fp32 for the rows whose gradient is G [n, K].

    R is the padded rank. For ``precision`` see :func:`launch_contract`.
    """
    (N, K), rank = G.shape, A.shape[0]
    chunks, chunk = contract_chunks(N, K, multiprocessors)
    P = G.new_empty(cdiv(K, CONTRACT.block_n), N, R, dtype=torch.float32)
    Q = G.new_empty(chunks, K, R, dtype=torch.float32)
    launch_contract(G, A, B, P, Q, chunk, scaling, omega, precision).run()
    dA = G.new_empty(K, R, dtype=torch.float32)
    dB = G.new_empty(N, R, dtype=torch.float32)
    launch_finish(Q, dA).run()
    launch_finish(P, dB).run()
    return dA[:, :rank].t(), dB[:, :rank]
