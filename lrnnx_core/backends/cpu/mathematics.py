# SPDX-License-Identifier: MIT
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false
"""Elementary functions without branches and without calls, so that loops over them vectorise.

The compiler of numba wheels has no vector library: a loop over math.exp runs one number at a time.
These take float32 or float64 and compute in the argument's type. The largest relative error, where
the result is normal, is below 2e-7 (float32) and 1e-15 (float64); tests hold that. Infinities and
NaN give what the limit is, subnormal results are right to an ulp.

All follow one plan: x = n c + r with integer n and small r, a polynomial in r (coefficients: Remez,
relative error), and n put back into the exponent (exp) or into signs and order (sine and cosine).
n comes out of the mantissa of a sum, which every instruction set can do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lrnnx_core.backends.cpu.compiling import inline

# ---------------------------------------------------------------- what Python cannot say


def _polynomial(single: tuple[float, ...], double: tuple[float, ...]) -> Callable[..., Any]:
    """Return p(x) = c[0] + c[1] x + ... with coefficients by the type of x."""

    @intrinsic
    def evaluate(typingctx: Any, x: Any) -> Any:
        coefficients = single if x == types.float32 else double

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (value,) = arguments
            total = ir.Constant(value.type, coefficients[-1])
            for c in coefficients[-2::-1]:
                product = builder.fmul(total, value, flags=("contract",))
                total = builder.fadd(product, ir.Constant(value.type, c), flags=("contract",))
            return total

        return x(x), codegen

    return evaluate


def _constant(single: float, double: float) -> Callable[..., Any]:
    """Return c(x): a constant of the type of x."""
    return _polynomial((single,), (double,))


@intrinsic
def _select(typingctx: Any, condition: Any, yes: Any, no: Any) -> Any:
    """Return yes or no; both are computed."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return yes(types.boolean, yes, yes), codegen


# bits of the whole and of the fraction, bias of the exponent
_BITS = {types.float32: (32, 23, 127), types.float64: (64, 52, 1023)}


@intrinsic
def _powers(typingctx: Any, t: Any) -> Any:
    """Return 2^k and 2^(n - k), k = n // 2, for t = n + 1.5 * 2^fraction.

    Both are normal where 2^n is not. The first one of -n is 1 / the second one of n.
    """
    width, fraction, bias = _BITS[t]

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer = ir.IntType(width)
        (value,) = arguments
        # The lowest bits of t's mantissa are those of n, in two's complement.
        bits = builder.bitcast(value, integer)
        origin = builder.bitcast(ir.Constant(value.type, 1.5 * 2.0**fraction), integer)
        n = builder.sub(bits, origin)
        k = builder.ashr(n, ir.Constant(integer, 1))

        def power(exponent: Any) -> Any:
            biased = builder.add(exponent, ir.Constant(integer, bias))
            shifted = builder.shl(biased, ir.Constant(integer, fraction))
            return builder.bitcast(shifted, value.type)

        pair = (power(k), power(builder.sub(n, k)))
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(t, 2)(t), codegen


@intrinsic
def _turned(typingctx: Any, s: Any, c: Any, t: Any) -> Any:
    """Return (s, c) turned by n quarters, for the float64 t = n + 1.5 * 2^52."""
    width, _, _ = _BITS[s]

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sine, cosine, value = arguments
        integer = ir.IntType(width)
        n = builder.bitcast(value, ir.IntType(64))
        n = builder.trunc(n, integer) if width < 64 else n
        one, two = ir.Constant(integer, 1), ir.Constant(integer, 2)
        odd = builder.icmp_unsigned("!=", builder.and_(n, one), ir.Constant(integer, 0))

        def signed(x: Any, flag: Any) -> Any:
            sign = builder.shl(builder.and_(flag, two), ir.Constant(integer, width - 2))
            return builder.bitcast(builder.xor(builder.bitcast(x, integer), sign), x.type)

        pair = (
            signed(builder.select(odd, cosine, sine), n),
            signed(builder.select(odd, sine, cosine), builder.add(n, one)),
        )
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(s, 2)(s, c, types.float64), codegen


@intrinsic
def _like(typingctx: Any, value: Any, x: Any) -> Any:
    """Return value, a float64, in the type of x."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, like = arguments
        return number if number.type == like.type else builder.fptrunc(number, like.type)

    return x(types.float64, x), codegen


@intrinsic
def _double(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (number,) = arguments
        return number if x == types.float64 else builder.fpext(number, ir.DoubleType())

    return types.float64(x), codegen


# ---------------------------------------------------------------- exponentials

_one = _constant(1.0, 1.0)
_zero = _constant(0.0, 0.0)
_half = _constant(0.5, 0.5)
_twenty = _constant(20.0, 20.0)
_nan = _constant(float("nan"), float("nan"))
_minus_infinity = _constant(float("-inf"), float("-inf"))
_magic = _constant(1.5 * 2.0**23, 1.5 * 2.0**52)
_per_ln2 = _constant(1.4426950408889634, 1.4426950408889634)
# ln 2 in two parts: n times the first one is exact.
_ln2_first = _constant(0.693145751953125, 0.693147180559663)
_ln2_rest = _constant(1.4286068203094173e-06, 2.8235290563031577e-13)
_highest = _constant(120.0, 780.0)  # beyond it every result overflows
_lowest = _constant(-120.0, -780.0)
_lowest_silu = _constant(-1000.0, -1000.0)  # below it the result is -0
_lowest_expm1 = _constant(-20.0, -45.0)  # below it the result is -1
# (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2
_exp_tail = _polynomial(
    (0.499999996, 0.16666577, 0.041666854, 0.0083631997, 0.00139013191),
    (
        0.5, 0.1666666666666667, 0.041666666666666616, 0.00833333333332611, 0.0013888888888918159,
        0.00019841269874923414, 2.4801587245492494e-05, 2.755725525745929e-06,
        2.755734965501249e-07, 2.5105280410882582e-08, 2.088942852263023e-09,
    ),
)  # fmt: skip
# ln(1 + e) / e - 1 as a function of e - 1/2, on 0 <= e <= 1
_log1p_rest = _polynomial(
    (
        -0.189069781, -0.288526665, 0.132609085, -0.0677114478, 0.0366338504, -0.0202282375,
        0.0115865368, -0.0085744841, 0.0052325792,
    ),
    (
        -0.18906978378367124, -0.2885270990993239, 0.1326097537542029, -0.0676886433109661,
        0.03661185452315798, -0.020548811918992292, 0.01183379210966027, -0.006945394979111187,
        0.004136179121813843, -0.0024918411230540295, 0.0015153828238149744,
        -0.0009288581604319334, 0.000573065403737537, -0.0003548159694568835,
        0.00022107444016384418, -0.00014211658125428761, 8.973254857027388e-05,
        -4.479526649316217e-05, 2.7524717074001573e-05, -3.839035782506068e-05,
        2.504162529847591e-05,
    ),
)  # fmt: skip


@inline
def _at_most(x, bound):
    return _select(x > bound, bound, x)  # NaN stays


@inline
def _at_least(x, bound):
    return _select(x < bound, bound, x)


@inline
def _reduced(x):
    """Return r = x - n ln 2 and the sum that holds n."""
    t = x * _per_ln2(x) + _magic(x)
    n = t - _magic(x)
    return (x - n * _ln2_first(x)) - n * _ln2_rest(x), t


@inline
def exp(x):
    """Return e^x."""
    r, t = _reduced(_at_least(_at_most(x, _highest(x)), _lowest(x)))
    first, second = _powers(t)
    return (_one(x) + (r + r * r * _exp_tail(r))) * first * second


@inline
def _scaled_expm1(x):
    r, t = _reduced(_at_least(_at_most(x, _highest(x)), _lowest_expm1(x)))
    first, second = _powers(t)
    up, more = _powers(_magic(x) - (t - _magic(x)))
    # e^x - 1 = 2^n (e^r - 1 + 1 - 2^-n); without loss also where n = 0
    return (r + r * r * _exp_tail(r)) + (_one(x) - up * more), first, second


@inline
def expm1(x):
    """Return e^x - 1, right to the last digits also where x is small."""
    m, first, second = _scaled_expm1(x)
    return (m * first) * second


@inline
def phi1(x):
    """Return (e^x - 1) / x, 1 at 0."""
    m, first, second = _scaled_expm1(x)
    y = _at_most(x, _highest(x))
    zero = y == _zero(x)
    # divided before the last scaling: the quotient may fit where e^x does not
    quotient = (m * first) / _select(zero, _one(x), y)
    return _select(zero, _one(x), quotient * second)


@inline
def _logistic(x, factor):
    """Return factor / (1 + e^-x)."""
    r, t = _reduced(_at_least(_at_most(-x, _highest(x)), _lowest(x)))
    first, _ = _powers(t)
    scale, _ = _powers(_magic(x) - (t - _magic(x)))
    # e^-x = m / scale; neither m nor scale overflows where e^-x does
    m = (_one(x) + (r + r * r * _exp_tail(r))) * first
    return factor / (scale + m) * scale


@inline
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    return _logistic(x, _one(x))


@inline
def silu(x):
    """Return x / (1 + e^-x), and NaN at -inf, as PyTorch does."""
    y = _logistic(x, _at_least(x, _lowest_silu(x)))
    return _select(x == _minus_infinity(x), _nan(x), y)


@inline
def softplus(x):
    """Return ln(1 + e^x), and x above 20, as PyTorch does."""
    e = exp(-abs(x))
    y = _at_least(x, _zero(x)) + (e + e * _log1p_rest(e - _half(x)))
    return _select(x > _twenty(x), x, y)


@inline
def softplus_slope(x):
    """Return the derivative of `softplus`: the sigmoid, and 1 above 20."""
    return _select(x > _twenty(x), _one(x), sigmoid(x))


# ---------------------------------------------------------------- sine and cosine

SINCOS_RANGE = 2.0**27
"""Up to this modulus `sincos` is right, beyond it NaN: hand such arguments to another path."""

# pi/2 in parts: n < 2^27 times each of the first three is exact.
_QUARTER = (1.5707963109016418, 1.5893254712295857e-08, 6.123233932053594e-17, 6.36831716351095e-25)
_PER_QUARTER = 0.6366197723675814
_MAGIC = 1.5 * 2.0**52
_sin_tail = _polynomial(  # (sin(r) / r - 1) / r^2 as a function of r^2, |r| <= pi/4
    (-0.166666646, 0.00833274474, -0.000195873048),
    (
        -0.16666666666666666, 0.008333333333330922, -0.00019841269836724283, 2.755731608675085e-06,
        -2.505112887545726e-08, 1.591793404433567e-10,
    ),
)  # fmt: skip
_cos_tail = _polynomial(  # (cos(r) - 1 + r^2 / 2) / r^4
    (0.0416666646, -0.00138883007, 2.45475537e-05),
    (
        0.041666666666666664, -0.0013888888888887387, 2.4801587298750995e-05,
        -2.755731726491031e-07, 2.087614497811562e-09, -1.1382547036611657e-11,
    ),
)  # fmt: skip


@inline
def sincos(x):
    """Return (sin(x), cos(x)) for |x| <= `SINCOS_RANGE`, (NaN, NaN) beyond.

    The quarter turns are taken off in float64 for float32 too: a large angle loses nothing.
    """
    wide = _double(x)
    t = wide * _PER_QUARTER + _MAGIC
    n = t - _MAGIC
    angle = ((wide - n * _QUARTER[0]) - n * _QUARTER[1]) - n * _QUARTER[2] - n * _QUARTER[3]
    r = _like(_select(abs(wide) <= SINCOS_RANGE, angle, _nan(wide)), x)
    w = r * r
    s = r + r * (w * _sin_tail(w))
    c = (_one(x) - _half(x) * w) + (w * w) * _cos_tail(w)
    return _turned(s, c, t)
