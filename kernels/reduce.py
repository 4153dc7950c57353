"""Reductions over the rows of a tall matrix T, which is read once, in a fixed order.

    Q = Tᵀ G   [N, R]      dB from (dy, S), dA from (x, dS)
    P = T F    [M, R]      dS from dy and SB, in the same read

Each program takes a column block and a chunk of rows. It accumulates its part of Q in registers and
writes its parts of P to a workspace. `finish` adds the parts in order and applies the cosine. There
are no atomics, so two runs give the same bits. With dropout's bits, mask ⊙ T takes T's place.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from fastbound.kernels.dropout import kept
from fastbound.kernels.launch import Launch, cdiv
from fastbound.kernels.sine import sine_cosine
from fastbound.kernels.tiles import Tile
from fastbound.kernels.waves import cut_of, resident
from torch import Tensor

FINISH_ELEMENTS = 2048  # per program
# Per thread of the reduction: the maximum, as ptxas would spill a few to fit another program.
REGISTERS = 255
# A is stored transposed relative to B. Factors are small, so one unspecialised kernel takes both.
FACTOR_STRIDES = ("stride_an", "stride_ar", "stride_on", "stride_or")


@triton.jit(do_not_specialize=["M", "steps"])
def _reduce_kernel(
    T, F, G, P, Q, KEEP, M, N, steps,
    stride_tm, stride_tn, stride_fn, stride_fr, stride_gm, stride_gr, stride_keep,
    WITH_P: tl.constexpr, HAS_KEEP: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    pid_m = tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, R)
    in_n = offs_n < N
    t_cols = T + offs_n[None, :] * stride_tn
    p_rows = P + pid_n * M * R + offs_r[None, :]
    if WITH_P:
        f_ptrs = F + offs_n[:, None] * stride_fn + offs_r[None, :] * stride_fr
        f = tl.load(f_ptrs, mask=in_n[:, None], other=0.0)  # [BLOCK_N, R]
    q = tl.zeros([BLOCK_N, R], dtype=tl.float32)
    start = pid_m * steps * BLOCK_M
    for m in range(start, tl.minimum(start + steps * BLOCK_M, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        in_m = offs_m < M
        t = tl.load(
            t_cols + offs_m[:, None] * stride_tm, mask=in_m[:, None] & in_n[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_N]
        if HAS_KEEP:
            mask = kept(KEEP, offs_m, in_m, pid_n * BLOCK_N, N, stride_keep, BLOCK_M, BLOCK_N)
            t = tl.where(mask, t, 0.0)
        g_ptrs = G + offs_m[:, None] * stride_gm + offs_r[None, :] * stride_gr
        g = tl.load(g_ptrs, mask=in_m[:, None], other=0.0)  # [BLOCK_M, R]
        q = tl.dot(tl.trans(t), g, q, input_precision="ieee")
        if WITH_P:
            p = tl.dot(t, f, input_precision="ieee")  # [BLOCK_M, R]
            tl.store(p_rows + offs_m[:, None] * R, p, mask=in_m[:, None])
    q_ptrs = Q + pid_m * N * R + offs_n[:, None] * R + offs_r[None, :]
    tl.store(q_ptrs, q, mask=in_n[:, None])


@triton.jit
def _finish_tile(
    PARTS, ANGLE, OUT, parts, rows, rank, omega, scaling,
    stride_pp, stride_pn, stride_an, stride_ar, stride_on, stride_or, block,
    HAS_COSINE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):
    offs_n = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_r = tl.arange(0, R)
    in_n = offs_n[:, None] < rows
    part_ptrs = PARTS + offs_n[:, None] * stride_pn + offs_r[None, :]
    step = tl.full([], 1, tl.int64) * stride_pp
    total = tl.zeros([BLOCK, R], dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(part_ptrs, mask=in_n, other=0.0)
        part_ptrs += step
    inside = in_n & (offs_r[None, :] < rank)
    if HAS_COSINE:
        a_ptrs = ANGLE + offs_n[:, None] * stride_an + offs_r[None, :] * stride_ar
        angle = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
        _, cosine = sine_cosine(angle * omega)
        total *= cosine.to(tl.float32) * (omega * scaling)
    o_ptrs = OUT + offs_n[:, None] * stride_on + offs_r[None, :] * stride_or
    tl.store(o_ptrs, total.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts", "rows", *FACTOR_STRIDES])
def _finish_kernel(
    PARTS, ANGLE, OUT, parts, rows, rank, omega, scaling,
    stride_pp, stride_pn, stride_an, stride_ar, stride_on, stride_or,
    HAS_COSINE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):
    _finish_tile(PARTS, ANGLE, OUT, parts, rows, rank, omega, scaling,
                 stride_pp, stride_pn, stride_an, stride_ar, stride_on, stride_or,
                 tl.program_id(0), HAS_COSINE, R, BLOCK)


@triton.jit(do_not_specialize=["columns", "M", "chunks"])
def _finish_both_kernel(
    P, THIN, Q, ANGLE, OUT, columns, M, chunks, N, rank, omega, scaling,
    stride_tm, stride_tr, stride_an, stride_ar, stride_on, stride_or,
    R: tl.constexpr, BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK)
    if block < blocks_m:
        _finish_tile(P, THIN, THIN, columns, M, R, 1.0, 1.0,
                     M * R, R, 0, 0, stride_tm, stride_tr, block, False, R, BLOCK)
    else:
        _finish_tile(Q, ANGLE, OUT, chunks, N, rank, omega, scaling,
                     N * R, R, stride_an, stride_ar, stride_on, stride_or,
                     block - blocks_m, True, R, BLOCK)


def row_chunks(M: int, N: int, tile: Tile, multiprocessors: int) -> tuple[int, int]:
    """(chunks, rows per chunk): whole blocks of rows, cut so that the GPU's last wave is full."""
    cut = cut_of(M, N, tile, resident(tile.warps) * multiprocessors)
    return cut.chunks, cut.chunk


def launch_reduce(
    T: Tensor, F: Tensor | None, G: Tensor, P: Tensor | None, Q: Tensor, chunk: int, tile: Tile,
    keep: Tensor | None = None,
) -> Launch:
    """T [M, N], F [N, R], G [M, R] -> P [column blocks, M, R] and Q [chunks, N, R], fp32 parts.

    F and P are None if T F is not wanted. ``keep`` [M, ceil(N/32)] masks T.
    """
    M, N = T.shape
    f, p = G if F is None else F, G if P is None else P
    return Launch(
        _reduce_kernel,
        (cdiv(N, tile.block_n), Q.shape[0]),
        (
            T, f, G, p, Q, T if keep is None else keep, M, N, chunk // tile.block_m,
            *T.stride(), *f.stride(), *G.stride(), 0 if keep is None else keep.stride(0),
        ),
        dict(
            WITH_P=F is not None, HAS_KEEP=keep is not None, R=G.shape[1],
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        ),
        tile.warps,
        tile.stages,
        REGISTERS,
    )


def launch_finish(
    parts: Tensor,
    out: Tensor,
    angle: Tensor | None = None,
    omega: float = 0.0,
    scaling: float = 0.0,
) -> Launch:
    """out = Σ parts, or scaling·omega·cos(omega·angle) ⊙ Σ parts.

    parts [P, N, R] has a unit last stride; angle and out are [N, r] with r <= R. Without an angle,
    out is the sums alone, [N, R].
    """
    if angle is None and parts.is_contiguous() and out.is_contiguous():
        # Without an angle the width does not matter, so one kernel adds the parts of every rank.
        parts, out = parts.view(parts.shape[0], -1, 16), out.view(-1, 16)
    count, rows, R = parts.shape
    a = out if angle is None else angle
    block = FINISH_ELEMENTS // R
    return Launch(
        _finish_kernel,
        (cdiv(rows, block),),
        (
            parts, a, out, count, rows, out.shape[1], omega, scaling,
            parts.stride(0), parts.stride(1), *a.stride(), *out.stride(),
        ),
        dict(HAS_COSINE=angle is not None, R=R, BLOCK=block),
        warps=4,
        stages=1,
    )


def launch_finish_both(
    P: Tensor, thin: Tensor, Q: Tensor, out: Tensor, angle: Tensor, omega: float, scaling: float
) -> Launch:
    """thin = Σ P and out = scaling·omega·cos(omega·angle) ⊙ Σ Q in one launch.

    P [columns, M, R], thin [M, R], Q [chunks, N, R], angle and out [N, r]; P and Q are contiguous.
    """
    columns, M, R = P.shape
    chunks, N, _ = Q.shape
    block = FINISH_ELEMENTS // R
    return Launch(
        _finish_both_kernel,
        (cdiv(M, block) + cdiv(N, block),),
        (
            P, thin, Q, angle, out, columns, M, chunks, N, out.shape[1], omega, scaling,
            *thin.stride(), *angle.stride(), *out.stride(),
        ),
        dict(R=R, BLOCK=block),
        warps=4,
        stages=1,
    )


def reduce(
    T: Tensor,
    G: Tensor,
    angle: Tensor,
    omega: float,
    scaling: float,
    tile: Tile,
    multiprocessors: int,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """scaling·omega·cos(omega·angle) ⊙ (Tᵀ G): T [M, N], G [M, R], angle [N, r] -> [N, r].

    The result has angle's strides, and its dtype unless ``dtype`` is given.
    """
    Q = reduced_parts(T, None, G, None, tile, multiprocessors, keep)
    return factor_gradient(Q, angle, omega, scaling, dtype)


def thin_and_reduce(
    T: Tensor,
    F: Tensor,
    G: Tensor,
    angle: Tensor,
    omega: float,
    scaling: float,
    tile: Tile,
    multiprocessors: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """T F [M, R] in T's dtype, for F [N, R], and the result of :func:`reduce`; T is read once.

    ``dtype``, if given, is the dtype of both results.
    """
    P = T.new_empty(cdiv(T.shape[1], tile.block_n), *G.shape, dtype=torch.float32)
    Q = reduced_parts(T, F, G, P, tile, multiprocessors)
    thin = T.new_empty(G.shape, dtype=dtype)
    gradient = torch.empty_like(angle, dtype=dtype)
    launch_finish_both(P, thin, Q, gradient, angle, omega, scaling).run()
    return thin, gradient


def reduced_parts(
    T: Tensor,
    F: Tensor | None,
    G: Tensor,
    P: Tensor | None,
    tile: Tile,
    multiprocessors: int,
    keep: Tensor | None = None,
) -> Tensor:
    """The parts of Tᵀ G, [chunks, N, R]; P, if given, receives those of T F, [blocks, M, R]."""
    M, N = T.shape
    if keep is not None:  # the mask takes registers beside the block
        tile = replace(tile, block_m=min(32, tile.block_m))
    chunks, chunk = row_chunks(M, N, tile, multiprocessors)
    Q = T.new_empty(chunks, N, G.shape[1], dtype=torch.float32)
    launch_reduce(T, F, G, P, Q, chunk, tile, keep).run()
    return Q


def factor_gradient(
    Q: Tensor, angle: Tensor, omega: float, scaling: float, dtype: torch.dtype | None = None
) -> Tensor:
    """scaling·omega·cos(omega·angle) ⊙ Σ Q, in ``dtype`` or angle's dtype, with angle's strides."""
    gradient = torch.empty_like(angle, dtype=dtype)
    launch_finish(Q, gradient, angle, omega, scaling).run()
    return gradient
