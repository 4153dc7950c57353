"""The thin product P = T F of a tall matrix T [M, K] with F [K, R], which reads T once.

It computes S = x SAᵀ in the forward pass, and dS = dy SB if dB is not wanted. With dropout's bits,
mask ⊙ T takes T's place. If M is above `FEW_ROWS` but too small to fill the GPU, K is cut as well,
and a second launch adds the parts in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastbound.kernels.dropout import kept
from fastbound.kernels.launch import Launch, cdiv
from fastbound.kernels.reduce import launch_finish
from fastbound.kernels.tiles import FEW_ROWS, Tile
from torch import Tensor

LEAST_STEPS = 4  # along K per program; fewer do not fill its pipeline


@triton.jit(do_not_specialize=["M", "steps"])
def _thin_kernel(
    T, F, P, KEEP, M, K, steps,
    stride_tm, stride_tk, stride_fk, stride_fr, stride_ps, stride_pm, stride_pr, stride_keep,
    HAS_KEEP: tl.constexpr, EVEN_K: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, R)
    # Rows past the end read the first rows again and are not stored: the loop needs no row mask.
    t_rows = T + (offs_m % M)[:, None] * stride_tm
    acc = tl.zeros([BLOCK_M, R], dtype=tl.float32)
    pid_k = tl.program_id(1).to(tl.int64)
    start = pid_k * steps * BLOCK_K  # the compiler sees a multiple of BLOCK_K, hence wide loads
    for k in range(start, tl.minimum(start + steps * BLOCK_K, K), BLOCK_K):
        t_ptrs = t_rows + (k + offs_k)[None, :] * stride_tk
        f_ptrs = F + (k + offs_k)[:, None] * stride_fk + offs_r[None, :] * stride_fr
        if EVEN_K:
            t = tl.load(t_ptrs)  # [BLOCK_M, BLOCK_K]
            f = tl.load(f_ptrs)  # [BLOCK_K, R]
        else:
            t = tl.load(t_ptrs, mask=(k + offs_k)[None, :] < K, other=0.0)
            f = tl.load(f_ptrs, mask=(k + offs_k)[:, None] < K, other=0.0)
        if HAS_KEEP:
            mask = kept(KEEP, offs_m, offs_m < M, k, K, stride_keep, BLOCK_M, BLOCK_K)
            t = tl.where(mask, t, 0.0)
        acc = tl.dot(t, f, acc, input_precision="ieee")
    p_ptrs = P + pid_k * stride_ps + offs_m[:, None] * stride_pm + offs_r[None, :] * stride_pr
    tl.store(p_ptrs, acc.to(P.dtype.element_ty), mask=offs_m[:, None] < M)


def step_chunks(M: int, K: int, tile: Tile, multiprocessors: int) -> tuple[int, int]:
    """(chunks, columns per chunk): several if blocks of rows alone leave a quarter of the GPU idle.

    With at most `FEW_ROWS` rows there is one chunk: a cut would gain less than the launch that adds
    the parts costs.
    """
    wanted = 1
    if M > FEW_ROWS:
        wanted = max(1, cdiv(3 * multiprocessors, 4 * cdiv(M, tile.block_m)))
    steps = max(LEAST_STEPS, cdiv(K, tile.block_n) // wanted)
    chunks = cdiv(K, steps * tile.block_n)
    return chunks, steps * tile.block_n


def launch_thin(
    T: Tensor, F: Tensor, P: Tensor, chunk: int, tile: Tile, keep: Tensor | None = None
) -> Launch:
    """T [M, K], F [K, R], keep [M, ceil(K/32)] or None -> P [M, R], or its parts [chunks, M, R]."""
    M, K = T.shape
    chunks = 1 if P.dim() == 2 else P.shape[0]
    return Launch(
        _thin_kernel,
        (cdiv(M, tile.block_m), chunks),
        (
            T, F, P, T if keep is None else keep, M, K, chunk // tile.block_n,
            *T.stride(), *F.stride(), *part_strides(P), 0 if keep is None else keep.stride(0),
        ),
        dict(
            HAS_KEEP=keep is not None, EVEN_K=K % tile.block_n == 0, R=F.shape[1],
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_n,
        ),
        tile.warps,
        tile.stages,
    )


def thin(
    T: Tensor, F: Tensor, tile: Tile, multiprocessors: int, keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``T F`` [M, R] in ``dtype`` or T's dtype, accumulated in fp32; ``keep`` masks T."""
    (M, K), R = T.shape, F.shape[1]
    P = T.new_empty(M, R, dtype=dtype)
    chunks, chunk = step_chunks(M, K, tile, multiprocessors)
    parts = thin_parts(P, chunks)
    launch_thin(T, F, parts, chunk, tile, keep).run()
    if chunks > 1:
        launch_finish(parts, P).run()
    return P


def part_strides(P: Tensor) -> tuple[int, ...]:
    """P's three strides (part, row, column); a two-dimensional P is a single part."""
    return (0, *P.stride()) if P.dim() == 2 else P.stride()


def thin_parts(P: Tensor, chunks: int) -> Tensor:
    """The launch's output for P [M, R]: fp32 parts [chunks, M, R], or P itself for one chunk."""
    if chunks == 1:
        return P
    return P.new_empty(chunks, *P.shape, dtype=torch.float32)
