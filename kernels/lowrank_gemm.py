"""Y = X Wᵀ + S Fᵀ + bias: the accumulator starts at S Fᵀ + bias, so Y is the only [M, N] tensor.

The forward pass takes (x, W, S, SB, b). The gradient of x takes (dy, Wᵀ, dS, SAᵀ), where W is
transposed by its strides rather than copied and dropout masks S Fᵀ. With K = 0 only S Fᵀ + bias
remains: "split" starts cuBLAS's GEMM from it.

There are two kernels: one with pointers, for any strides, and a persistent loop over tensor
descriptors (TMA), for operands that meet their alignment. In the latter S Fᵀ is one or more extra
first steps of the loop and the bias is added at the end, so that nothing separates the loads from
the products. With a mask, or an F whose layout differs from W's, it starts the accumulator by
pointers as well.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastbound.kernels.dropout import kept
from fastbound.kernels.launch import Launch, cdiv
from fastbound.kernels.tiles import DESCRIPTOR_ALIGNMENT, ELEMENTWISE, GemmTile
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# S and F loaded by pointers use shared memory too, which leaves no room for a fourth stage.
START_STAGES = 3
# Per thread of the pointer kernel: the maximum, as ptxas would spill a few to fit another program.
REGISTERS = 255

_describe = TensorDescriptor.from_tensor


@triton.jit
def _output_block(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Blocks in groups of GROUP_M block rows, so that neighbours share operands in L2."""
    per_group = GROUP_M * num_n
    first_m = (tile // per_group) * GROUP_M
    group_m = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (tile % per_group) % group_m, (tile % per_group) // group_m


def _start_columns(R, _semantic=None):
    """How many of R columns one product of the start takes: 16, or on sm_100 all of them.

    With 16, shared memory and registers do not grow with R. On sm_100 Triton 3.6 makes an empty
    kernel of two such products and a loop of others that add to the same accumulator.
    """
    arch = "" if _semantic is None else getattr(_semantic.builder.options, "arch", "")
    return tl.constexpr(R if str(arch).startswith("sm10") else 16)


# Triton calls this while it compiles and passes the compilation's state, as for its own operations.
_start_columns.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def _lowrank_start(
    S, F, BIAS, KEEP, offs_m, offs_n, start_n, M, N,
    stride_sm, stride_sr, stride_fn, stride_fr, stride_keep,
    HAS_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The accumulator before the loop over K: S Fᵀ + bias, [BLOCK_M, BLOCK_N] in fp32.

    It takes a few columns of S and F at a time, see :func:`_start_columns`.
    """
    STEP: tl.constexpr = _start_columns(R)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        acc += bias[None, :]
    for r in tl.static_range(0, R, STEP):
        offs_r = r + tl.arange(0, STEP)
        s_ptrs = S + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
        f_ptrs = F + offs_n[None, :] * stride_fn + offs_r[:, None] * stride_fr
        s = tl.load(s_ptrs, mask=offs_m[:, None] < M, other=0.0)  # [BLOCK_M, STEP]
        f = tl.load(f_ptrs, mask=offs_n[None, :] < N, other=0.0)  # [STEP, BLOCK_N]
        acc = tl.dot(s, f, acc, input_precision="ieee")
    if HAS_KEEP:
        tl.static_assert(not HAS_BIAS, "the mask would drop the bias too")
        mask = kept(KEEP, offs_m, offs_m < M, start_n, N, stride_keep, BLOCK_M, BLOCK_N)
        acc = tl.where(mask, acc, 0.0)
    return acc


@triton.jit
def _store(
    Y, acc, start_m, start_n, STORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store Y's block as STORES groups of columns, one after the other."""
    if STORES == 1:
        Y.store([start_m, start_n], acc.to(Y.dtype))
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _store(Y, left, start_m, start_n, STORES // 2, BLOCK_M, HALF)
        _store(Y, right, start_m, start_n + HALF, STORES // 2, BLOCK_M, HALF)


@triton.jit(do_not_specialize=["M"])
def _pointer_kernel(
    X, W, S, F, BIAS, KEEP, Y, M, N, K,
    stride_sm, stride_sr, stride_fn, stride_fr, stride_keep,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ym, stride_yn,
    HAS_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr, EVEN_K: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    pid_m, pid_n = _output_block(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    acc = _lowrank_start(
        S, F, BIAS, KEEP, offs_m, offs_n, pid_n * BLOCK_N, M, N,
        stride_sm, stride_sr, stride_fn, stride_fr, stride_keep,
        HAS_BIAS, HAS_KEEP, R, BLOCK_M, BLOCK_N,
    )
    # Rows past the end read the first rows again and are not stored: the loop needs no row mask.
    x_ptrs = X + (offs_m % M)[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = W + (offs_n % N)[None, :] * stride_wn + offs_k[:, None] * stride_wk
    step = tl.full([], BLOCK_K, tl.int64)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptrs)  # [BLOCK_K, BLOCK_N]
        else:
            in_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=in_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=in_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    y_ptrs = Y + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(y_ptrs, acc.to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "programs"])
def _descriptor_kernel(
    X, W, S, F, BIAS, KEEP, Y, M, N, K, programs,
    stride_sm, stride_sr, stride_fn, stride_fr, stride_keep,
    HAS_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr, AS_STEP: tl.constexpr,
    W_TRANSPOSED: tl.constexpr, STORES: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """With AS_STEP, S and F are descriptors and their product is extra steps of the loop over K.

    TMA fills their columns beyond the rank with zeros. A step selects its descriptors by value,
    because a branch around the loads, or a separate start inside the flattened loop, would keep
    the loads from running ahead.
    """
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, programs, flatten=AS_STEP):
        pid_m, pid_n = _output_block(tile, num_m, num_n, GROUP_M)
        start_m = pid_m * BLOCK_M
        start_n = pid_n * BLOCK_N
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if AS_STEP:
            first = -tl.cdiv(R, BLOCK_K) * BLOCK_K
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        else:
            first = 0
            # S and F are loaded by pointers: the loop then reuses their shared memory.
            acc = _lowrank_start(
                S, F, BIAS, KEEP, (start_m + tl.arange(0, BLOCK_M)).to(tl.int64),
                offs_n.to(tl.int64), start_n, M, N,
                stride_sm, stride_sr, stride_fn, stride_fr, stride_keep,
                HAS_BIAS, HAS_KEEP, R, BLOCK_M, BLOCK_N,
            )
        for k in range(first, K, BLOCK_K):
            left = X
            right = W
            at = k
            if AS_STEP:
                if k < 0:
                    left = S
                    right = F
                    at = k - first
            x = left.load([start_m, at])  # [BLOCK_M, BLOCK_K]
            if W_TRANSPOSED:
                w = right.load([at, start_n])  # [BLOCK_K, BLOCK_N]
            else:
                w = right.load([start_n, at]).T
            acc = tl.dot(x, w, acc, input_precision="ieee")
        if AS_STEP and HAS_BIAS:
            bias = tl.load(BIAS + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
            acc += bias[None, :]
        _store(Y, acc, start_m, start_n, STORES, BLOCK_M, BLOCK_N)


def is_transposed(W: Tensor) -> bool:
    """Whether W [N, K] is stored column by column, like the transposed weight in dx = dy W."""
    return W.stride(1) != 1


def takes_descriptors(*tensors: Tensor) -> bool:
    """Whether TMA can address them: unit last stride, base and first stride 16-byte aligned."""
    return all(
        t.stride(-1) == 1
        and t.stride(0) > 0
        and t.stride(0) * t.element_size() % DESCRIPTOR_ALIGNMENT == 0
        and t.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
        for t in tensors
    )


def launch_lowrank_gemm(
    X: Tensor, W: Tensor, S: Tensor, F: Tensor, bias: Tensor | None, Y: Tensor,
    tile: GemmTile, multiprocessors: int, keep: Tensor | None = None,
) -> Launch:
    """X [M, K], W [N, K], bias [N] or None (any strides), S [M, R], F [N, R] -> Y [M, N].

    ``keep`` [M, ceil(N/32)] masks S Fᵀ and cannot be combined with a bias. Operands that
    descriptors cannot address are loaded by pointers, with the tile
    :data:`~fastbound.kernels.tiles.ELEMENTWISE` in place of any larger one.
    """
    M, K = X.shape
    N, R = F.shape
    transposed = is_transposed(W)
    stored, f = (W.t(), F.t()) if transposed else (W, F)
    aligned = M > 0 and K > 0 and takes_descriptors(X, stored, Y)
    described = tile.descriptors and aligned
    if not aligned and tile.volume > ELEMENTWISE.volume:
        tile = ELEMENTWISE
    others = (Y if bias is None else bias.contiguous(), Y if keep is None else keep)
    strides = (*S.stride(), *F.stride(), 0 if keep is None else keep.stride(0))
    constants = dict(
        HAS_BIAS=bias is not None, HAS_KEEP=keep is not None, R=R,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
    )
    tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    if described:
        block_x = [tile.block_m, tile.block_k]
        block_w = [tile.block_k, tile.block_n] if transposed else [tile.block_n, tile.block_k]
        as_step = keep is None and takes_descriptors(S, f)
        s, f = (_describe(S, block_x), _describe(f, block_w)) if as_step else (S, F)
        programs = min(tiles, multiprocessors)
        return Launch(
            _descriptor_kernel,
            (programs,),
            (
                _describe(X, block_x), _describe(stored, block_w), s, f, *others,
                _describe(Y, [tile.block_m, tile.block_n // tile.stores]),
                M, N, K, programs, *strides,
            ),
            dict(AS_STEP=as_step, W_TRANSPOSED=transposed, STORES=tile.stores, **constants),
            tile.warps,
            tile.stages if as_step else min(tile.stages, START_STAGES),
        )
    return Launch(
        _pointer_kernel,
        (tiles,),
        (X, W, S, F, *others, Y, M, N, K, *strides, *X.stride(), *W.stride(), *Y.stride()),
        dict(EVEN_K=K % tile.block_k == 0, **constants),
        tile.warps,
        tile.stages,
        REGISTERS if tile.warps <= 8 else None,
    )


def lowrank_gemm(
    X: Tensor, W: Tensor, S: Tensor, F: Tensor, bias: Tensor | None,
    tile: GemmTile, multiprocessors: int, keep: Tensor | None = None,
) -> Tensor:
    """``X Wᵀ + S Fᵀ + bias`` [M, N] in X's dtype, accumulated in fp32 and rounded once.

    For ``keep`` see :func:`launch_lowrank_gemm`.
    """
    Y = X.new_empty(X.shape[0], W.shape[0])
    launch_lowrank_gemm(X, W, S, F, bias, Y, tile, multiprocessors, keep).run()
    return Y
