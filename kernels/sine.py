"""sin and cos for arguments that training leaves unbounded.

`sine_cosine` reduces and evaluates in fp64 and is exact up to rounding to fp32 for |x| < 2^27. The
factors are small (r·(K + N) elements), and the library's slow path for large arguments would use
local memory. `sine_fp32` is for the N·K angles of the product form.
"""

from __future__ import annotations

import triton
import triton.language as tl

# π/2 in parts of 26, 26 and 53 bits; the products of the first two with q are exact, with or
# without fused multiply-add.
_HALF_PI_HIGH = tl.constexpr(1.5707963109016418)
_HALF_PI_MIDDLE = tl.constexpr(1.5893254712295857e-08)
_HALF_PI_LOW = tl.constexpr(6.123233995736766e-17)
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)


@triton.jit
def sine_cosine(x):
    """sin(x) and cos(x) in fp64 for any floating x.

    x = q·π/2 + t with |t| <= π/4; the Taylor polynomials (to t¹⁵ and t¹⁶) err by less than 1e-15.
    Beyond |x| = 1e15 t is no longer small, but both results stay within [-1, 1].
    """
    x = x.to(tl.float64)
    q = tl.floor(x * _TWO_OVER_PI + 0.5)
    t = x - q * _HALF_PI_HIGH - q * _HALF_PI_MIDDLE - q * _HALF_PI_LOW
    u = t * t
    sine = -7.647163731819816e-13 * u + 1.6059043836821613e-10
    sine = sine * u - 2.505210838544172e-08
    sine = sine * u + 2.7557319223985893e-06
    sine = sine * u - 0.0001984126984126984
    sine = sine * u + 0.008333333333333333
    sine = sine * u - 0.16666666666666666
    sine = sine * u * t + t
    cosine = 4.779477332387385e-14 * u - 1.1470745597729725e-11
    cosine = cosine * u + 2.08767569878681e-09
    cosine = cosine * u - 2.755731922398589e-07
    cosine = cosine * u + 2.48015873015873e-05
    cosine = cosine * u - 0.001388888888888889
    cosine = cosine * u + 0.041666666666666664
    cosine = cosine * u - 0.5
    cosine = cosine * u + 1.0
    quadrant = q - 4.0 * tl.floor(q * 0.25)
    odd = (quadrant == 1.0) | (quadrant == 3.0)
    s = tl.where(odd, cosine, sine)
    c = tl.where(odd, sine, cosine)
    s = tl.where(quadrant >= 2.0, -s, s)
    c = tl.where((quadrant == 1.0) | (quadrant == 2.0), -c, c)
    return _within_one(s), _within_one(c)


@triton.jit
def _within_one(x):
    # Comparisons propagate a NaN; min and max would not.
    return tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))


# π/2 in parts of 8, 8, 8 and 24 bits; in fp32 the products of the first three with q < 2^16 are
# exact, with or without fused multiply-add.
_PART_1 = tl.constexpr(1.5703125)
_PART_2 = tl.constexpr(0.0004825592041015625)
_PART_3 = tl.constexpr(1.2665987014770508e-06)
_PART_4 = tl.constexpr(9.920935184482005e-10)


@triton.jit
def sine_fp32(x, COSINE: tl.constexpr):
    """sin(x), or cos(x) with COSINE, of fp32 arguments in fp32, where fp64 would be too slow.

    The error is at most two units in the last place of 1 for |x| <= 1e5. Beyond, where an fp32
    argument is itself accurate only to about a hundredth, it grows, but the result stays within
    [-1, 1] for any x.
    """
    q = tl.floor(x * _TWO_OVER_PI + 0.5)
    t = x - q * _PART_1
    t = t - q * _PART_2
    t = t - q * _PART_3
    t = t - q * _PART_4
    u = t * t
    sine = 2.7557319223985893e-06 * u - 0.0001984126984126984
    sine = sine * u + 0.008333333333333333
    sine = sine * u - 0.16666666666666666
    sine = sine * u * t + t
    cosine = -2.755731922398589e-07 * u + 2.48015873015873e-05
    cosine = cosine * u - 0.001388888888888889
    cosine = cosine * u + 0.041666666666666664
    cosine = cosine * u - 0.5
    cosine = cosine * u + 1.0
    if COSINE:
        q += 1.0
    quadrant = q - 4.0 * tl.floor(q * 0.25)
    odd = (quadrant == 1.0) | (quadrant == 3.0)
    s = tl.where(odd, cosine, sine)
    s = tl.where(quadrant >= 2.0, -s, s)
    return _within_one(s)
