# SPDX-License-Identifier: MIT
# pyright: basic, reportCallIssue=false
"""The diagonal scan whose decay and gain come from A, a step and elapsed time at every sample.

Both directions form them anew, a line of channels at a time: exponential, sine and cosine cost more
than what memory moves meanwhile. Kernels are compiled per scheme, and ``same`` where decay and gain
have one step and share the exponential.
"""

from __future__ import annotations

import functools
from typing import Any

from lrnnx_core.backends.cpu import diagonal_lines as k
from lrnnx_core.backends.cpu import selective_schemes as schemes
from lrnnx_core.backends.cpu.compiling import inline, jit
from lrnnx_core.backends.cpu.pointers import at, fill


@inline
def _steps(x, p, r, t, batch, first, n, d, dd, di, one):
    """Fill the lines of steps: as given, in the decay, in the gain. Return the elapsed time."""
    if x[k.DT]:
        k.read(k.step(x, k.DT, p, r, t, first)[0], n, d, one)
    tau = one
    if x[k.TIMES]:
        tau = at(x[k.TIMES] + (batch * x[k.LENGTH] + t) * x[k.ITEMSIZE], one)[0]
    factor = one if x[k.STATE_ONLY] else tau
    for w in range(d.shape[0]):
        dd[w] = tau * d[w]
        di[w] = factor * d[w]
    return tau


@inline
def _form(scheme, same, dd, di, A_re, A_im, a_re, a_im, g_re, g_im):
    """Form decay and gain of a step."""
    for w in range(dd.shape[0]):
        re, im = dd[w] * A_re[w], dd[w] * A_im[w]
        if scheme == schemes.ZOH and same:
            a_re[w], a_im[w] = schemes.complex_exp(re, im)
            y, z = schemes.complex_phi1(re, im)
            g_re[w], g_im[w] = dd[w] * y, dd[w] * z
        else:
            a_re[w], a_im[w] = schemes.complex_decay(scheme, re, im)
            if scheme >= schemes.ZOH:
                y, z = schemes.complex_gain(scheme, di[w] * A_re[w], di[w] * A_im[w])
                g_re[w], g_im[w] = di[w] * y, di[w] * z


@inline
def _advance(scheme, a_re, a_im, g_re, g_im, di, h_re, h_im, x_re, x_im, n):
    """Compute h = a h + gamma x."""
    for c in range(n):
        u, v = x_re[c], x_im[c]
        if scheme == schemes.EXPONENTIAL:
            u, v = di[c] * u, di[c] * v
        elif scheme >= schemes.ZOH:
            u, v = schemes.times(g_re[c], g_im[c], u, v)
        re = a_re[c] * h_re[c] - a_im[c] * h_im[c] + u
        h_im[c] = a_re[c] * h_im[c] + a_im[c] * h_re[c] + v
        h_re[c] = re


@functools.cache
def forward(scheme: int, same: bool) -> Any:
    """Return the forward kernel of a scheme."""

    @jit
    def diagonal_forward(begin, end, worker, x, one):
        for item in range(begin, end):
            batch, _, first, n = k.block(x, item)
            p, r = batch // x[k.INNER], batch % x[k.INNER]
            W = (n + k.LANES - 1) // k.LANES * k.LANES
            start = x[k.SCRATCH] + worker * x[k.SCRATCH_STEP]
            line = W * x[k.ITEMSIZE]
            A_re, A_im, d, dd, di, h_re, start = k.six(start, line, W, one)
            a_re, a_im, g_re, g_im, h_im, _, _ = k.six(start, line, W, one)
            k.table(x, p, k.A_RE, first, n, A_re, one)
            k.table(x, p, k.A_IM, first, n, A_im, one)
            k.table(x, p, k.STEP, first, n, d, one)
            k.begun(x, batch, first, n, h_re, h_im, one)
            for t in range(x[k.LENGTH]):
                if k.cleared(x, batch, t):
                    k.erase(h_re)
                    k.erase(h_im)
                if not k.padding(x, batch, t):
                    _steps(x, p, r, t, batch, first, n, d, dd, di, one)
                    _form(scheme, same, dd, di, A_re, A_im, a_re, a_im, g_re, g_im)
                    u, v = k.step(x, k.X, p, r, t, first)
                    x_re, x_im = at(u, one), at(v, one)
                    _advance(scheme, a_re, a_im, g_re, g_im, di, h_re, h_im, x_re, x_im, n)
                u, v = k.step(x, k.H, p, r, t, first)
                k.write(u, n, h_re, one)
                k.write(v, n, h_im, one)
            u, v = k.end(x, k.LAST, batch, first)
            k.write(u, n, h_re, one)
            k.write(v, n, h_im, one)

    return diagonal_forward


@inline
def _slopes(scheme, same, dd, di, A_re, A_im, a_re, a_im, s_re, s_im, e_re, e_im, f_re, f_im):
    """Form the derivative s of the decay, e of the gain by its step, f of the gain by A."""
    for w in range(dd.shape[0]):
        if scheme == schemes.BILINEAR:
            re, im = dd[w] * A_re[w], dd[w] * A_im[w]
            s_re[w], s_im[w] = schemes.complex_decay_slope(scheme, re, im, a_re[w], a_im[w])
        else:
            s_re[w], s_im[w] = a_re[w], a_im[w]
        if scheme >= schemes.ZOH:
            re, im = di[w] * A_re[w], di[w] * A_im[w]
            e_re[w], e_im[w] = schemes.complex_gain_dt(scheme, re, im)
            y, z = schemes.complex_gain_slope(scheme, re, im)
            square = di[w] * di[w]
            f_re[w], f_im[w] = square * y, square * z


@inline
def _decay_gradients(A_re, A_im, s_re, s_im, dd, l_re, l_im, b_re, b_im, sum_re, sum_im, to_d, n):
    """With w = lam conj(h_{t-1} s): dA += w dd, d dd = Re(w conj(A))."""
    for c in range(n):
        u, v = schemes.times(b_re[c], b_im[c], s_re[c], s_im[c])
        y, z = l_re[c] * u + l_im[c] * v, l_im[c] * u - l_re[c] * v
        sum_re[c] += y * dd[c]
        sum_im[c] += z * dd[c]
        to_d[c] = y * A_re[c] + z * A_im[c]


@inline
def _gain_gradients(
    scheme, di, l_re, l_im, x_re, x_im, g_re, g_im, e_re, e_im, f_re, f_im, sum_re, sum_im, to_i,
    y_re, y_im, n,
):  # fmt: skip
    """With q = lam conj(x): d di = Re(q conj(e)), dA += q conj(f); y = dx = lam conj(gamma)."""
    for c in range(n):
        u, v = l_re[c], l_im[c]
        q, z = u * x_re[c] + v * x_im[c], v * x_re[c] - u * x_im[c]
        if scheme == schemes.EXPONENTIAL:
            to_i[c] = q
            y_re[c] = di[c] * u
            y_im[c] = di[c] * v
        else:
            to_i[c] = q * e_re[c] + z * e_im[c]
            sum_re[c] += q * f_re[c] + z * f_im[c]
            sum_im[c] += z * f_re[c] - q * f_im[c]
            y_re[c] = u * g_re[c] + v * g_im[c]
            y_im[c] = v * g_re[c] - u * g_im[c]


@inline
def _back(a_re, a_im, l_re, l_im, n):
    """Compute lam = conj(a) lam."""
    for c in range(n):
        re, im = l_re[c], l_im[c]
        l_re[c] = a_re[c] * re + a_im[c] * im
        l_im[c] = a_re[c] * im - a_im[c] * re


@jit
def _dot(a, b):
    total = a[0] * b[0]
    for w in range(1, a.shape[0]):
        total += a[w] * b[w]
    return total


@inline
def _hand_on(x, p, r, t, batch, piece, first, n, tau, d, to_d, to_i, sum_d, one):
    """Give the gradients of the steps to what they were made from."""
    factor = one if x[k.STATE_ONLY] else tau
    if x[k.TIMES]:
        elapsed = _dot(d, to_d)
        if not x[k.STATE_ONLY]:
            elapsed += _dot(d, to_i)
        index = (piece * x[k.BATCHES] + batch) * x[k.LENGTH] + t
        at(x[k.DTIMES] + index * x[k.ITEMSIZE], one)[0] = elapsed
    for w in range(n):
        to_d[w] = tau * to_d[w] + factor * to_i[w]
    if x[k.DT]:
        k.write(k.step(x, k.DDT, p, r, t, first)[0], n, to_d, one)
    else:
        for w in range(n):
            sum_d[w] += to_d[w]


@inline
def _skip(x, p, r, t, batch, piece, first, n, one):
    """Write the gradients of padding."""
    k.blank(x, k.DX, p, r, t, first, n, one)
    if x[k.DT]:
        fill(k.step(x, k.DDT, p, r, t, first)[0], n, one)
    if x[k.TIMES]:
        index = (piece * x[k.BATCHES] + batch) * x[k.LENGTH] + t
        at(x[k.DTIMES] + index * x[k.ITEMSIZE], one)[0] = 0


@functools.cache
def backward(scheme: int, same: bool) -> Any:
    """Return the kernel of the gradients of `forward` with the same arguments."""

    @jit
    def diagonal_backward(begin, end, worker, x, one):
        for item in range(begin, end):
            batch, piece, first, n = k.block(x, item)
            p, r = batch // x[k.INNER], batch % x[k.INNER]
            W = (n + k.LANES - 1) // k.LANES * k.LANES
            start = x[k.SCRATCH] + worker * x[k.SCRATCH_STEP]
            line = W * x[k.ITEMSIZE]
            A_re, A_im, d, dd, di, sum_d, start = k.six(start, line, W, one)
            a_re, a_im, g_re, g_im, l_re, l_im, start = k.six(start, line, W, one)
            s_re, s_im, e_re, e_im, f_re, f_im, start = k.six(start, line, W, one)
            y_re, y_im, sum_re, sum_im, to_d, to_i, _ = k.six(start, line, W, one)
            k.erase(sum_d)
            k.erase(sum_re)
            k.erase(sum_im)
            k.erase(to_d)
            k.erase(to_i)
            k.table(x, p, k.A_RE, first, n, A_re, one)
            k.table(x, p, k.A_IM, first, n, A_im, one)
            k.table(x, p, k.STEP, first, n, d, one)
            u, v = k.end(x, k.LAST, batch, first)  # the cotangent of the last state
            k.read(u, n, l_re, one)
            k.read(v, n, l_im, one)
            for t in range(x[k.LENGTH] - 1, -1, -1):
                u, v = k.step(x, k.G, p, r, t, first)
                c_re, c_im = at(u, one), at(v, one)
                for c in range(n):
                    l_re[c] += c_re[c]
                    l_im[c] += c_im[c]
                clear = k.cleared(x, batch, t)
                if k.padding(x, batch, t):
                    _skip(x, p, r, t, batch, piece, first, n, one)
                else:
                    tau = _steps(x, p, r, t, batch, first, n, d, dd, di, one)
                    _form(scheme, same, dd, di, A_re, A_im, a_re, a_im, g_re, g_im)
                    _slopes(
                        scheme, same, dd, di, A_re, A_im, a_re, a_im, s_re, s_im, e_re, e_im,
                        f_re, f_im,
                    )  # fmt: skip
                    if clear:
                        k.erase(y_re)
                        k.erase(y_im)
                    elif t:
                        u, v = k.step(x, k.H, p, r, t - 1, first)
                        k.read(u, n, y_re, one)
                        k.read(v, n, y_im, one)
                    else:
                        k.begun(x, batch, first, n, y_re, y_im, one)
                    _decay_gradients(
                        A_re, A_im, s_re, s_im, dd, l_re, l_im, y_re, y_im, sum_re, sum_im, to_d, n
                    )
                    to, too = k.step(x, k.DX, p, r, t, first)
                    if scheme == schemes.DIRAC:
                        k.write(to, n, l_re, one)
                        k.write(too, n, l_im, one)
                    else:
                        u, v = k.step(x, k.X, p, r, t, first)
                        _gain_gradients(
                            scheme, di, l_re, l_im, at(u, one), at(v, one), g_re, g_im, e_re, e_im,
                            f_re, f_im, sum_re, sum_im, to_i, y_re, y_im, n,
                        )  # fmt: skip
                        k.write(to, n, y_re, one)
                        k.write(too, n, y_im, one)
                    _hand_on(x, p, r, t, batch, piece, first, n, tau, d, to_d, to_i, sum_d, one)
                    _back(a_re, a_im, l_re, l_im, n)
                if clear:
                    k.erase(l_re)
                    k.erase(l_im)
                if t % k.CHUNK == 0:
                    k.settle(x, batch, 0, first, n, sum_re, one)
                    k.settle(x, batch, 1, first, n, sum_im, one)
                    k.settle(x, batch, 2, first, n, sum_d, one)
            u, v = k.end(x, k.DH0, batch, first)
            k.write(u, n, l_re, one)
            k.write(v, n, l_im, one)

    return diagonal_backward
