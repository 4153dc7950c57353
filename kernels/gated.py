"""An MLP block's activation and thin products: one pass forward and one pass backward.

    forward    H = f(G) ⊙ U                                     P = H F
    backward   DG = DH ⊙ U ⊙ f'(G)     DU = DH ⊙ f(G)           [DS_G | DS_U] = [DG SB_G | DU SB_U]
               H again, in registers     DGᵀ S_G,  DUᵀ S_U,  Hᵀ DS_D

A plain block has no U: the factor U is then one, and there is no DU. Each chunk of rows or columns
writes its partial sums to a workspace, and `reduce.launch_finish` adds them in a fixed order.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from fastbound.kernels.launch import Launch, cdiv
from fastbound.kernels.reduce import launch_finish
from fastbound.kernels.thin import part_strides, thin_parts
from fastbound.kernels.tiles import Tile
from fastbound.kernels.waves import Cut, cut_of, resident
from torch import Tensor

MOST = 16  # column blocks that one program of the backward may take, one after the other
REGISTERS = 255  # per thread of the backward: the maximum, since its tiles have at most 8 warps
FORWARD_REGISTERS = 128  # per thread of the forward, so that more of its programs run at once


def _once(x, _semantic=None):
    """x unchanged, but computed only once.

    Otherwise the compiler would compute x again in the layout of every product that takes it. The
    inline assembly is empty, and the compiler may not duplicate it. In the interpreter, and for
    fp32, for whose products converting the layout does not pay, this returns x itself.
    """
    if _semantic is None or x.dtype.primitive_bitwidth != 16:
        return x
    options = _semantic.builder.options
    amd = options.backend_name == "hip"
    # Triton 3.6 cannot pipeline a loop around impure assembly on AMD; pure assembly works there.
    return tl.inline_asm_elementwise(
        "",
        "=v,0" if amd else "=r,0",
        [x],
        x.dtype,
        is_pure=amd and options.num_stages > 1,
        pack=2,
        _semantic=_semantic,
    )


# Triton calls this while it compiles and passes the compilation's state, as for its own operations.
_once.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x) in fp32."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        # erf by Abramowitz and Stegun 7.1.26 (within 1.5e-7); f' needs the same exponential anyway.
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
        bell = tl.exp(-0.5 * x * x)
        tail = 0.5307027145 * t - 0.7265760135
        tail = tail * t + 0.7107068705
        tail = tail * t - 0.142248368
        tail = (tail * t + 0.127414796) * t * bell  # the normal distribution's tail beyond |x|
        half = tl.where(x < 0.0, tail, 1.0 - tail)
        value = x * half
        slope = half + x * bell * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        inner = 0.7978845608028654 * x * (1.0 + 0.044715 * square)
        half = 1.0 / (1.0 + tl.exp(-2.0 * inner))  # (1 + tanh(inner)) / 2
        value = x * half
        slope = half + 2.0 * x * half * (1.0 - half) * 0.7978845608028654 * (
            1.0 + 0.134145 * square
        )
    else:
        value = tl.where(x < 0.0, 0.0, x)  # a NaN stays one, which tl.maximum would make 0
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    return value, slope


@triton.jit(do_not_specialize=["M", "steps"])
def _activate_kernel(
    G, U, F, H, P, M, N, steps,
    stride_gm, stride_um, stride_fn, stride_fr, stride_hm, stride_ps, stride_pm, stride_pr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, WITH_P: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    pid_n = tl.program_id(1).to(tl.int64)
    offs_r = tl.arange(0, R)
    in_m = offs_m[:, None] < M
    p = tl.zeros([BLOCK_M, R], dtype=tl.float32)
    start = pid_n * steps * BLOCK_N  # the compiler sees a multiple of BLOCK_N, hence wide loads
    for n in range(start, tl.minimum(start + steps * BLOCK_N, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        inside = in_m & (offs_n[None, :] < N)
        g = tl.load(G + offs_m[:, None] * stride_gm + offs_n[None, :], mask=inside, other=0.0)
        h, _ = _activation(g.to(tl.float32), ACTIVATION)  # [BLOCK_M, BLOCK_N]
        if GATED:
            u = tl.load(U + offs_m[:, None] * stride_um + offs_n[None, :], mask=inside, other=0.0)
            h = h * u.to(tl.float32)
        h = _once(h.to(H.dtype.element_ty))
        tl.store(H + offs_m[:, None] * stride_hm + offs_n[None, :], h, mask=inside)
        if WITH_P:
            f_ptrs = F + offs_n[:, None].to(tl.int64) * stride_fn + offs_r[None, :] * stride_fr
            f = tl.load(f_ptrs, mask=offs_n[:, None] < N, other=0.0)  # [BLOCK_N, R]
            p = tl.dot(h, f, p, input_precision="ieee")
    if WITH_P:
        p_ptrs = P + pid_n * stride_ps + offs_m[:, None] * stride_pm + offs_r[None, :] * stride_pr
        tl.store(p_ptrs, p.to(P.dtype.element_ty), mask=in_m)


@triton.jit(do_not_specialize=["M", "chunk", "span"])
def _activate_backward_kernel(
    DH, G, U, S, DSD, SBG, SBU, DG, DU, P, QG, QU, QD, M, N, chunk, span,
    stride_sm, stride_sr, stride_dsm, stride_dsr, stride_fgn, stride_fgr, stride_fun, stride_fur,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    ADAPT_GATE: tl.constexpr, ADAPT_UP: tl.constexpr, ADAPT_DOWN: tl.constexpr,
    R: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    pid_m = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, R)
    dtype = DG.dtype.element_ty
    # DH, G, U, DG and DU are dense and have the same strides, so one offset within a tile serves
    # them all and the 64-bit part of the address is a scalar.
    tile = rows[:, None] * N + cols[None, :]
    for column in range(span):
        start_n = (pid_n * span + column) * BLOCK_N
        in_n = cols < N - start_n
        if ADAPT_GATE:
            f_ptrs = SBG + (start_n + cols)[:, None] * stride_fgn + offs_r[None, :] * stride_fgr
            sb_g = tl.load(f_ptrs, mask=in_n[:, None], other=0.0)  # [BLOCK_N, R]
            q_g = tl.zeros([BLOCK_N, R], dtype=tl.float32)
        if ADAPT_UP:
            f_ptrs = SBU + (start_n + cols)[:, None] * stride_fun + offs_r[None, :] * stride_fur
            sb_u = tl.load(f_ptrs, mask=in_n[:, None], other=0.0)
            q_u = tl.zeros([BLOCK_N, R], dtype=tl.float32)
        if ADAPT_DOWN:
            q_d = tl.zeros([BLOCK_N, R], dtype=tl.float32)
        for m in range(pid_m * chunk, tl.minimum(pid_m * chunk + chunk, M), BLOCK_M):
            base = m * N + start_n
            in_m = rows[:, None] < M - m
            inside = in_m & in_n[None, :]
            s_ptrs = S + m * stride_sm + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
            p_ptrs = P + (pid_n * M + m) * WIDTH + rows[:, None] * WIDTH + offs_r[None, :]
            # The sum over the earlier columns, which this program wrote: it is still in cache.
            before = in_m & (column > 0)
            g = tl.load(G + base + tile, mask=inside, other=0.0).to(tl.float32)
            dh = tl.load(DH + base + tile, mask=inside, other=0.0).to(tl.float32)
            h, slope = _activation(g, ACTIVATION)
            # Each value is rounded before the first product, so that few registers live at once.
            dg = dh * slope
            if GATED:
                u = tl.load(U + base + tile, mask=inside, other=0.0).to(tl.float32)
                du = _once((dh * h).to(dtype))
                dg *= u
                h *= u
                tl.store(DU + base + tile, du, mask=inside)
            dg = _once(dg.to(dtype))
            tl.store(DG + base + tile, dg, mask=inside)
            if ADAPT_DOWN:
                h = _once(h.to(dtype))
                ds_ptrs = DSD + m * stride_dsm + rows[:, None] * stride_dsm
                ds = tl.load(ds_ptrs + offs_r[None, :] * stride_dsr, mask=in_m, other=0.0)
                q_d = tl.dot(tl.trans(h), ds, q_d, input_precision="ieee")
            if GATED and ADAPT_UP:
                at = R if ADAPT_GATE else 0
                s = tl.load(s_ptrs + at * stride_sr, mask=in_m, other=0.0)  # [BLOCK_M, R]
                q_u = tl.dot(tl.trans(du), s, q_u, input_precision="ieee")
                part = tl.load(p_ptrs + at, mask=before, other=0.0)
                part = tl.dot(du, sb_u, part, input_precision="ieee")
                tl.store(p_ptrs + at, part, mask=in_m)
            if ADAPT_GATE:
                s = tl.load(s_ptrs, mask=in_m, other=0.0)
                q_g = tl.dot(tl.trans(dg), s, q_g, input_precision="ieee")
                part = tl.load(p_ptrs, mask=before, other=0.0)
                tl.store(p_ptrs, tl.dot(dg, sb_g, part, input_precision="ieee"), mask=in_m)
        q_offs = pid_m * N * R + (start_n + cols)[:, None] * R + offs_r[None, :]
        if ADAPT_GATE:
            tl.store(QG + q_offs, q_g, mask=in_n[:, None])
        if ADAPT_UP:
            tl.store(QU + q_offs, q_u, mask=in_n[:, None])
        if ADAPT_DOWN:
            tl.store(QD + q_offs, q_d, mask=in_n[:, None])
        # A thread may read parts that another thread wrote. A block-wide barrier also orders
        # accesses to global memory (PTX: bar.sync); see tests/kernels/test_block_order.py.
        tl.debug_barrier()


def activation_cut(M: int, N: int, tile: Tile, multiprocessors: int) -> Cut:
    """The forward's cut: each program takes a block of rows and a chunk of columns.

    This is :func:`backward_cut` with rows and columns exchanged, so that even a few rows fill the
    GPU. In the result, ``chunks`` and ``chunk`` count columns.
    """
    slots = resident(tile.warps, FORWARD_REGISTERS) * multiprocessors
    return cut_of(N, M, replace(tile, block_m=tile.block_n, block_n=tile.block_m), slots)


def backward_cut(M: int, N: int, width: int, tile: Tile, multiprocessors: int) -> Cut:
    """The backward's cut; ``width`` is the number of columns of DS."""
    slots = resident(tile.warps) * multiprocessors
    # P is fp32 and written and read: 4 16-bit elements per entry, against five tall tensors.
    return cut_of(M, N, tile, slots, MOST, 4 * width / 5)


def launch_activation(
    G: Tensor, U: Tensor | None, F: Tensor | None, H: Tensor, P: Tensor | None,
    activation: str, R: int, chunk: int, chunks: int, tile: Tile,
) -> Launch:
    """G, U [M, N], F [N, R] -> H [M, N] and P [M, R], or P's parts [chunks, M, R] in fp32.

    G, U and H have a unit last stride. U is None for a plain block; F and P are None if no thin
    product is wanted.
    """
    M, N = G.shape
    f = H if F is None else F
    p = H if P is None else P
    u = G if U is None else U
    return Launch(
        _activate_kernel,
        (cdiv(M, tile.block_m), chunks),
        (
            G, u, f, H, p, M, N, chunk // tile.block_n,
            G.stride(0), u.stride(0), *f.stride(), H.stride(0), *part_strides(p),
        ),
        dict(
            ACTIVATION=activation, GATED=U is not None, WITH_P=F is not None, R=R,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        ),
        tile.warps,
        tile.stages,
        FORWARD_REGISTERS,
    )


def activation_forward(
    G: Tensor, U: Tensor | None, F: Tensor | None, H: Tensor, P: Tensor | None,
    activation: str, tile: Tile, multiprocessors: int,
) -> None:
    """H = f(G) ⊙ U [M, N], and P = H F [M, R] for F [N, R] as parts added in a fixed order."""
    cut = activation_cut(G.shape[0], G.shape[1], tile, multiprocessors)
    parts = None if P is None else thin_parts(P, cut.chunks)
    R = 16 if P is None else P.shape[1]
    shape = (activation, R, cut.chunk, cut.chunks, tile)
    launch_activation(G, U, F, H, parts, *shape).run()
    if P is not None and parts is not None and parts is not P:
        launch_finish(parts, P).run()


def launch_activation_backward(
    DH: Tensor, G: Tensor, U: Tensor | None, S: Tensor | None, DSD: Tensor | None,
    SBG: Tensor | None, SBU: Tensor | None, DG: Tensor, DU: Tensor | None, P: Tensor,
    QG: Tensor, QU: Tensor, QD: Tensor, activation: str, R: int, cut: Cut, tile: Tile,
) -> Launch:
    """DH, G, U [M, N], S [M, WIDTH], DSD [M, R], SBG, SBU [N, R] -> DG, DU and the partial sums.

    DH, G, U, DG and DU are contiguous. P [columns, M, WIDTH] holds the parts of DS for gate and up
    side by side, in the order of S, for those that are adapted. QG, QU and QD are [chunks, N, R];
    ``cut`` gives columns and chunks. U and DU are None for a plain block; SBG, SBU or DSD is None
    if gate, up or down has no adapter.
    """
    M, N = G.shape
    u, du = (G, DG) if U is None or DU is None else (U, DU)
    s, dsd = (DG if t is None else t for t in (S, DSD))
    fg, fu = (DG if t is None else t for t in (SBG, SBU))
    return Launch(
        _activate_backward_kernel,
        (cut.columns, cut.chunks),
        (
            DH, G, u, s, dsd, fg, fu, DG, du, P, QG, QU, QD, M, N, cut.chunk, cut.span,
            *s.stride(), *dsd.stride(), *fg.stride(), *fu.stride(),
        ),
        dict(
            ACTIVATION=activation, GATED=U is not None, ADAPT_GATE=SBG is not None,
            ADAPT_UP=SBU is not None, ADAPT_DOWN=DSD is not None, R=R, WIDTH=P.shape[2],
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        ),
        tile.warps,
        tile.stages,
        REGISTERS,
    )
