# SPDX-License-Identifier: MIT
# pyright: basic, reportCallIssue=false
"""The diagonal scan whose decay, and gain if it has one, are constant in time.

It runs at the speed of memory: forward reads x and writes h, backward reads g and h (and x where
there is a gain) and writes dx.
"""

from __future__ import annotations

from lrnnx_core.backends.cpu import diagonal_lines as k
from lrnnx_core.backends.cpu.compiling import inline, jit
from lrnnx_core.backends.cpu.pointers import at


@inline
def _advance(a_re, a_im, h_re, h_im, x_re, x_im, n):
    """Compute h = a h + x."""
    for c in range(n):
        re = a_re[c] * h_re[c] - a_im[c] * h_im[c] + x_re[c]
        h_im[c] = a_re[c] * h_im[c] + a_im[c] * h_re[c] + x_im[c]
        h_re[c] = re


@inline
def _advance_gained(a_re, a_im, g_re, g_im, h_re, h_im, x_re, x_im, n):
    """Compute h = a h + g x."""
    for c in range(n):
        re = a_re[c] * h_re[c] - a_im[c] * h_im[c]
        im = a_re[c] * h_im[c] + a_im[c] * h_re[c]
        h_re[c] = re + (g_re[c] * x_re[c] - g_im[c] * x_im[c])
        h_im[c] = im + (g_re[c] * x_im[c] + g_im[c] * x_re[c])


@jit
def forward(begin, end, worker, x, one):
    """Write h and the last state."""
    for item in range(begin, end):
        batch, _, first, n = k.block(x, item)
        p, r = batch // x[k.INNER], batch % x[k.INNER]
        W = (n + k.LANES - 1) // k.LANES * k.LANES
        start = x[k.SCRATCH] + worker * x[k.SCRATCH_STEP]
        a_re, a_im, g_re, g_im, h_re, h_im, _ = k.six(start, W * x[k.ITEMSIZE], W, one)
        k.table(x, p, k.A_RE, first, n, a_re, one)
        k.table(x, p, k.A_IM, first, n, a_im, one)
        k.table(x, p, k.GAIN_RE, first, n, g_re, one)
        k.table(x, p, k.GAIN_IM, first, n, g_im, one)
        k.begun(x, batch, first, n, h_re, h_im, one)
        for t in range(x[k.LENGTH]):
            if k.cleared(x, batch, t):
                k.erase(h_re)
                k.erase(h_im)
            if not k.padding(x, batch, t):
                u, v = k.step(x, k.X, p, r, t, first)
                x_re, x_im = at(u, one), at(v, one)
                if x[k.GAINED]:
                    _advance_gained(a_re, a_im, g_re, g_im, h_re, h_im, x_re, x_im, n)
                else:
                    _advance(a_re, a_im, h_re, h_im, x_re, x_im, n)
            u, v = k.step(x, k.H, p, r, t, first)
            k.write(u, n, h_re, one)
            k.write(v, n, h_im, one)
        u, v = k.end(x, k.LAST, batch, first)
        k.write(u, n, h_re, one)
        k.write(v, n, h_im, one)


@inline
def _collect(sum_re, sum_im, l_re, l_im, b_re, b_im, n):
    """Add lam conj(b)."""
    for c in range(n):
        sum_re[c] += l_re[c] * b_re[c] + l_im[c] * b_im[c]
        sum_im[c] += l_im[c] * b_re[c] - l_re[c] * b_im[c]


@inline
def _turn(a_re, a_im, l_re, l_im, to_re, to_im, n):
    """Compute to = lam conj(a)."""
    for c in range(n):
        re, im = l_re[c], l_im[c]
        to_re[c] = a_re[c] * re + a_im[c] * im
        to_im[c] = a_re[c] * im - a_im[c] * re


@jit
def backward(begin, end, worker, x, one):
    """Write dx and dh0, and add the gradients of decay and gain to the sums."""
    for item in range(begin, end):
        batch, _, first, n = k.block(x, item)
        p, r = batch // x[k.INNER], batch % x[k.INNER]
        W = (n + k.LANES - 1) // k.LANES * k.LANES
        start = x[k.SCRATCH] + worker * x[k.SCRATCH_STEP]
        line = W * x[k.ITEMSIZE]
        a_re, a_im, g_re, g_im, l_re, l_im, start = k.six(start, line, W, one)
        p_re, p_im, y_re, y_im, sum_re, sum_im, start = k.six(start, line, W, one)
        more_re, more_im, _, _, _, _, _ = k.six(start, line, W, one)
        k.erase(sum_re)
        k.erase(sum_im)
        k.erase(more_re)
        k.erase(more_im)
        k.table(x, p, k.A_RE, first, n, a_re, one)
        k.table(x, p, k.A_IM, first, n, a_im, one)
        k.table(x, p, k.GAIN_RE, first, n, g_re, one)
        k.table(x, p, k.GAIN_IM, first, n, g_im, one)
        k.begun(x, batch, first, n, p_re, p_im, one)
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
                k.blank(x, k.DX, p, r, t, first, n, one)
            else:
                if t and not clear:
                    u, v = k.step(x, k.H, p, r, t - 1, first)
                    _collect(sum_re, sum_im, l_re, l_im, at(u, one), at(v, one), n)
                elif not clear:
                    _collect(sum_re, sum_im, l_re, l_im, p_re, p_im, n)
                to, too = k.step(x, k.DX, p, r, t, first)
                if x[k.GAINED]:
                    u, v = k.step(x, k.X, p, r, t, first)
                    _collect(more_re, more_im, l_re, l_im, at(u, one), at(v, one), n)
                    _turn(g_re, g_im, l_re, l_im, y_re, y_im, n)
                    k.write(to, n, y_re, one)
                    k.write(too, n, y_im, one)
                else:
                    k.write(to, n, l_re, one)
                    k.write(too, n, l_im, one)
                _turn(a_re, a_im, l_re, l_im, l_re, l_im, n)
            if clear:
                k.erase(l_re)
                k.erase(l_im)
            if t % k.CHUNK == 0:
                k.settle(x, batch, 0, first, n, sum_re, one)
                k.settle(x, batch, 1, first, n, sum_im, one)
                if x[k.GAINED]:
                    k.settle(x, batch, 2, first, n, more_re, one)
                    k.settle(x, batch, 3, first, n, more_im, one)
        u, v = k.end(x, k.DH0, batch, first)
        k.write(u, n, l_re, one)
        k.write(v, n, l_im, one)
