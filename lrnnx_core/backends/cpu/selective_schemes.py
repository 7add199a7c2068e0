# SPDX-License-Identifier: MIT
# pyright: basic, reportCallIssue=false
"""The fused discretizations in kernels: `lrnnx_core.discretize.FUSED` a number at a time.

A scheme is A_bar = decay(step A) and gamma = step gain(step A) with their derivatives. It is a
number that is constant where the kernel is compiled. Complex numbers are pairs (re, im).
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lrnnx_core.backends.cpu.compiling import inline
from lrnnx_core.backends.cpu.mathematics import (
    _at_least,
    _at_most,
    _constant,
    _polynomial,
    _reduced,
    _select,
    _zero,
    exp,
    phi1,
    sincos,
)

EXPONENTIAL, DIRAC, ZOH, BILINEAR = range(4)  # gamma is free of A in the first two
SCHEMES = {"mamba": EXPONENTIAL, "dirac": DIRAC, "zoh": ZOH, "bilinear": BILINEAR}

# ---------------------------------------------------------------- real

_half = _constant(0.5, 0.5)
_one = _constant(1.0, 1.0)
_two = _constant(2.0, 2.0)
_lowest = _constant(-126 * math.log(2), -1022 * math.log(2))
_highest = _constant(128.9 * math.log(2), 1024.9 * math.log(2))
# 2 (e^r - 1) / r on |r| <= ln(2) / 2; the relative error of e^r is at most 2.6e-9, 1.8e-17
_rise = _polynomial(
    (2.0000001, 1.00000009, 0.333327309, 0.0833295546, 0.0167580223, 0.00281224798),
    (2.0000000000000013, 1.000000000000001, 0.3333333333331461, 0.08333333333314728,
     0.01666666667543093, 0.0027777777864681093, 0.00039682522982774956,
     4.9603009022535966e-05, 5.512850986612844e-06, 5.525259296567648e-07,
     4.596262146037799e-08),
)  # fmt: skip


@intrinsic
def _half_power(typing_context, t):
    """Return 2^(n - 1) for t = n + 1.5 * 2^fraction; 0 for the lowest n, inf for the highest."""

    def generate(context, builder, signature, arguments):
        (value,) = arguments
        width, fraction, bias = (32, 23, 127) if t == types.float32 else (64, 52, 1023)
        integer = ir.IntType(width)
        # the shift drops all bits of the mantissa of t but those of n
        n = builder.shl(builder.bitcast(value, integer), ir.Constant(integer, fraction))
        power = builder.add(n, ir.Constant(integer, (bias - 1) << fraction))
        return builder.bitcast(power, value.type)

    return t(t), generate


@inline
def fading(x):
    """Return e^x, but 0 below 2^-125.5, the smallest normal number nearly (2^-1021.5 in float64).

    This is the arithmetic of the inner loop: fewer operations than `mathematics.exp`.
    """
    r, t = _reduced(_at_most(_at_least(x, _lowest(x)), _highest(x)))
    return (r * _rise(r) + _two(x)) * _half_power(t)


@inline
def decay(scheme, x):
    """Return A_bar at x = step A."""
    if scheme == BILINEAR:
        half = x * _half(x)
        return (_one(x) + half) / (_one(x) - half)
    return fading(x)


@inline
def decay_slope(scheme, x, a):
    """Return the derivative of decay at x, where it is a."""
    if scheme == BILINEAR:
        q = _one(x) / (_one(x) - x * _half(x))
        return q * q
    return a


@inline
def gain(scheme, y):
    """Return gamma / step at y = step * A."""
    if scheme == BILINEAR:
        return _one(y) / (_one(y) - y * _half(y))
    if scheme == ZOH:
        return phi1(y)
    return _one(y)


@inline
def gain_dt(scheme, y):
    """Return the derivative of step * gain(step * A) by the step."""
    if scheme == BILINEAR:
        q = _one(y) / (_one(y) - y * _half(y))
        return q * q
    return exp(y)


_SLOPE = tuple(
    tuple((k + 1) / math.factorial(k + 2) for k in range(n)) for n in (9, 14)
)  # phi1'(y) = sum_k (k + 1) y^k / (k + 2)!
_slope_near = _polynomial(*_SLOPE)
_near = _constant(0.5, 0.4)


@inline
def gain_slope(scheme, y):
    """Return the derivative of gain."""
    if scheme == BILINEAR:
        q = _one(y) / (_one(y) - y * _half(y))
        return _half(y) * q * q
    near = abs(y) < _near(y)
    far = _select(near, _one(y), y)
    return _select(near, _slope_near(y), (exp(far) - phi1(far)) / far)


# ---------------------------------------------------------------- complex


@inline
def times(a_re, a_im, b_re, b_im):
    """Return the product of two complex numbers."""
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@inline
def inverse(re, im):
    """Return 1 / (re + i im)."""
    scale = _one(re) / (re * re + im * im)
    return re * scale, -(im * scale)


@inline
def polar(e, angle):
    """Return e (cos, sin), 0 where e is 0 whatever the angle."""
    s, c = sincos(angle)
    zero = e == _zero(e)
    return _select(zero, e, e * c), _select(zero, e, e * s)


@inline
def complex_exp(re, im):
    """Return e^(re + i im)."""
    return polar(exp(re), im)


@inline
def complex_decay(scheme, re, im):
    """Return A_bar."""
    if scheme == BILINEAR:
        h, k = re * _half(re), im * _half(re)
        q, s = inverse(_one(re) - h, -k)
        return times(_one(re) + h, k, q, s)
    return polar(fading(re), im)


@inline
def complex_decay_slope(scheme, re, im, a_re, a_im):
    """Return the derivative of the decay."""
    if scheme == BILINEAR:
        q, s = inverse(_one(re) - re * _half(re), -(im * _half(re)))
        return times(q, s, q, s)
    return a_re, a_im


def _series(terms):
    """Return a power series, by Horner, at re + i im; ``terms`` for float32 and for float64."""

    @intrinsic
    def evaluate(typing_context, re, im):
        coefficients = terms[0] if re == types.float32 else terms[1]

        def generate(context, builder, signature, arguments):
            x, y = arguments
            p, q = ir.Constant(x.type, coefficients[-1]), ir.Constant(x.type, 0.0)

            def product(a, b):
                return builder.fmul(a, b, flags=("contract",))

            for c in coefficients[-2::-1]:
                real = builder.fsub(product(p, x), product(q, y), flags=("contract",))
                q = builder.fadd(product(p, y), product(q, x), flags=("contract",))
                p = builder.fadd(real, ir.Constant(x.type, c), flags=("contract",))
            return context.make_tuple(builder, signature.return_type, (p, q))

        return types.UniTuple(re, 2)(re, im), generate

    return evaluate


_phi1_near = _series(  # sum_k y^k / (k + 1)!
    tuple(tuple(1 / math.factorial(k + 1) for k in range(n)) for n in (9, 15))
)
_complex_slope_near = _series(_SLOPE)


@inline
def complex_phi1(re, im):
    """Return (e^y - 1) / y."""
    e_re, e_im = complex_exp(re, im)
    near = re * re + im * im < _near(re) * _near(re)
    q, s = inverse(_select(near, _one(re), re), im)
    f_re, f_im = times(e_re - _one(re), e_im, q, s)
    n_re, n_im = _phi1_near(re, im)
    return _select(near, n_re, f_re), _select(near, n_im, f_im)


@inline
def complex_gain(scheme, re, im):
    """Return gamma / step."""
    if scheme == BILINEAR:
        return inverse(_one(re) - re * _half(re), -(im * _half(re)))
    return complex_phi1(re, im)


@inline
def complex_gain_dt(scheme, re, im):
    """Return the derivative of step * gain(step * A) by the step."""
    if scheme == BILINEAR:
        q, s = inverse(_one(re) - re * _half(re), -(im * _half(re)))
        return times(q, s, q, s)
    return complex_exp(re, im)


@inline
def complex_gain_slope(scheme, re, im):
    """Return the derivative of gain."""
    if scheme == BILINEAR:
        q, s = inverse(_one(re) - re * _half(re), -(im * _half(re)))
        a, b = times(q, s, q, s)
        return _half(re) * a, _half(re) * b
    near = re * re + im * im < _near(re) * _near(re)
    e_re, e_im = complex_exp(re, im)
    p_re, p_im = complex_phi1(re, im)
    q, s = inverse(_select(near, _one(re), re), im)
    f_re, f_im = times(e_re - p_re, e_im - p_im, q, s)
    n_re, n_im = _complex_slope_near(re, im)
    return _select(near, n_re, f_re), _select(near, n_im, f_im)
