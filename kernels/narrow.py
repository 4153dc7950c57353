"""Convert a thin fp32 matrix, which may exceed fp16's range at both ends, to scaled fp16 columns.

    alone       P = NARROW ⊙ SCALE         each column of NARROW has its largest entry near 2^14
    as a pair   P Fᵀ = NARROW NARROW_Fᵀ    its largest entry is near one; NARROW_F takes the scale

Scaling by a power of two is exact, so NARROW has fp16's full precision over the 28 binades below a
column's largest entry. In a pair, a column of NARROW_F is as large as that column's contribution to
P Fᵀ, so neither matrix is out of range if the product is in range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastbound.kernels.launch import Launch
from torch import Tensor

BLOCK = 1024  # rows at a time
ALONE = 14  # the binary exponent of a column's largest entry; fp16's largest is 15


@triton.jit(do_not_specialize=["M", "N"])
def _narrow_kernel(
    P, NARROW, SCALE, F, NARROW_F, M, N,
    stride_pm, stride_pr, stride_nm, stride_nr, stride_fn, stride_fr, stride_gn, stride_gr,
    EXPONENT: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK).to(tl.int64)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for m in range(0, M, BLOCK):
        p_ptrs = P + (m + offs) * stride_pm + r * stride_pr
        size = tl.abs(tl.load(p_ptrs, mask=m + offs < M, other=0.0))
        # An entry that is not finite stays so, and does not affect the scale of the others.
        largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
    bits = tl.max(largest).to(tl.int32, bitcast=True) & 0x7F800000
    # The bits of 2^e, clamped to 2^-112..2^112; the bits of 2^-e are (254 << 23) minus these.
    bits = tl.minimum(tl.maximum(bits, 15 << 23), 239 << 23) - (EXPONENT << 23)
    scale = bits.to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    for m in range(0, M, BLOCK):
        p = tl.load(P + (m + offs) * stride_pm + r * stride_pr, mask=m + offs < M, other=0.0)
        n_ptrs = NARROW + (m + offs) * stride_nm + r * stride_nr
        tl.store(n_ptrs, (p * inverse).to(NARROW.dtype.element_ty), mask=m + offs < M)
    if PAIR:
        for n in range(0, N, BLOCK):
            f = tl.load(F + (n + offs) * stride_fn + r * stride_fr, mask=n + offs < N, other=0.0)
            g_ptrs = NARROW_F + (n + offs) * stride_gn + r * stride_gr
            tl.store(g_ptrs, (f * scale).to(NARROW_F.dtype.element_ty), mask=n + offs < N)
    else:
        tl.store(SCALE + r, scale)


def launch_narrow(
    P: Tensor, narrow: Tensor, scale: Tensor, F: Tensor | None, narrow_F: Tensor | None
) -> Launch:
    """P [M, R] -> narrow [M, R] and scale [R]; with F [N, R], narrow and narrow_F [N, R]."""
    f, g = (P, narrow) if F is None or narrow_F is None else (F, narrow_F)
    return Launch(
        _narrow_kernel,
        (P.shape[1],),
        (
            P, narrow, scale, f, g, P.shape[0], f.shape[0],
            *P.stride(), *narrow.stride(), *f.stride(), *g.stride(),
        ),
        dict(EXPONENT=ALONE if F is None else 0, PAIR=F is not None, BLOCK=BLOCK),
        warps=4,
        stages=1,
    )


def narrowed(P: Tensor) -> tuple[Tensor, Tensor]:
    """An fp16 matrix [M, R] and an fp32 scale [R] whose product is P [M, R] up to fp16 rounding."""
    narrow = torch.empty_like(P, dtype=torch.float16)
    scale = P.new_empty(P.shape[1])
    launch_narrow(P, narrow, scale, None, None).run()
    return narrow, scale


def narrowed_pair(P: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 matrices [M, R] and [N, R]: the first times the transpose of the second is P Fᵀ."""
    narrow, narrow_F = (torch.empty_like(t, dtype=torch.float16) for t in (P, F))
    launch_narrow(P, narrow, P, F, narrow_F).run()
    return narrow, narrow_F
