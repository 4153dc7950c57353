"""SA = sin(ωA) and SB = s·sin(ωB) in one launch, with the rank zero-padded to R.

This keeps the sine out of every GEMM loop. ``s`` is folded into SB before its only rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastbound.kernels.launch import Launch, cdiv
from fastbound.kernels.sine import sine_cosine
from torch import Tensor

ELEMENTS = 2048  # per program


@triton.jit
def _sine_tile(P, OUT, rows, rank, stride_pn, stride_pr, stride_on, stride_or,
               omega, scaling, block, R: tl.constexpr, BLOCK: tl.constexpr):
    offs_n = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_r = tl.arange(0, R)
    inside = offs_n[:, None] < rows
    p = tl.load(
        P + offs_n[:, None] * stride_pn + offs_r[None, :] * stride_pr,
        mask=inside & (offs_r[None, :] < rank),
        other=0.0,
    ).to(tl.float32)  # [BLOCK, R]
    sine, _ = sine_cosine(p * omega)
    value = sine.to(tl.float32) * scaling  # sin(0) = 0 fills the padding
    tl.store(
        OUT + offs_n[:, None] * stride_on + offs_r[None, :] * stride_or,
        value.to(OUT.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _factors_kernel(
    A, B, SA, SB, K, N, rank,
    stride_ar, stride_ak, stride_bn, stride_br,
    stride_sar, stride_sak, stride_sbn, stride_sbr,
    omega, scaling,
    R: tl.constexpr, BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    blocks_a = tl.cdiv(K, BLOCK)
    if block < blocks_a:
        _sine_tile(A, SA, K, rank, stride_ak, stride_ar, stride_sak, stride_sar,
                   omega, 1.0, block, R, BLOCK)
    else:
        _sine_tile(B, SB, N, rank, stride_bn, stride_br, stride_sbn, stride_sbr,
                   omega, scaling, block - blocks_a, R, BLOCK)


def launch_factors(
    A: Tensor, B: Tensor, SA: Tensor, SB: Tensor, scaling: float, omega: float
) -> Launch:
    """A [r, K], B [N, r] -> SA [R, K], SB [N, R]."""
    rank, K = A.shape
    N, R = SB.shape
    block = ELEMENTS // R
    return Launch(
        _factors_kernel,
        (cdiv(K, block) + cdiv(N, block),),
        (
            A, B, SA, SB, K, N, rank,
            *A.stride(), *B.stride(), *SA.stride(), *SB.stride(),
            omega, scaling,
        ),
        dict(R=R, BLOCK=block),
        warps=4,
        stages=1,
    )


def factors(
    A: Tensor, B: Tensor, R: int, scaling: float, omega: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """SA [R, K] and SB [N, R] in ``dtype``, zero beyond the rank."""
    SA = A.new_empty(R, A.shape[1], dtype=dtype)
    SB = B.new_empty(B.shape[0], R, dtype=dtype)
    launch_factors(A, B, SA, SB, scaling, omega).run()
    return SA, SB
