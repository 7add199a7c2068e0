# SPDX-License-Identifier: MIT
# pyright: basic
"""Cauchy sums on the CPU: reciprocals of a block of nodes are made in cache, and used at once.

The formulas are those of `lrnnx_core.backends.blocked_sums`. Of a head's nodes `BLOCK` at a time
lie in rows of the worker's scratch, at distances that the compiler knows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import library
from lrnnx_core.backends.blocked_sums import half_angles
from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.pointers import ONES, address, at, packed

BLOCK = 256
# Rows of scratch; the sums or cotangents of every row of coefficients follow, four each.
X, COS, X2, COS2, XCOS2, Y_RE, Y_IM = (BLOCK * i for i in range(7))
U, V = BLOCK * 7, BLOCK * 11  # real and imaginary parts of four reciprocals
ROWS = BLOCK * 15
MANY = 16  # rows of coefficients that share their nodes, beyond which matrix products are faster
DOUBLE = ONES[torch.float64]


def cauchy(
    alpha: Tensor, beta: Tensor, square: Tensor, rho: Tensor, a: Tensor, length: int
) -> Tensor:
    """Leaf: see `lrnnx_core.backends.blocked_sums.cauchy`."""
    p = _Problem(alpha, beta, square, rho, a, length, 0.5, 0.1)
    if not p.fits:
        return library.default("cauchy")(alpha, beta, square, rho, a, length)
    out = torch.empty(*alpha.shape[:-1], p.K, 2, dtype=alpha.dtype)
    pool.run(_forward, p.workers, p.heads, address(out), *p.arguments)
    return out


def cauchy_backward(
    grad: Tensor,
    alpha: Tensor,
    beta: Tensor,
    square: Tensor,
    rho: Tensor,
    a: Tensor,
    length: int,
) -> tuple[Tensor, ...]:
    """Leaf: see `lrnnx_core.backends.blocked_sums.cauchy_backward`."""
    p = _Problem(alpha, beta, square, rho, a, length, 1.0, 0.5)
    if not p.fits:
        return library.default("cauchy_backward")(grad, alpha, beta, square, rho, a, length)
    found = tuple(torch.empty(t.shape, dtype=t.dtype) for t in (alpha, beta, square, rho, a))
    upstream = packed(grad, alpha.dtype)
    sums = torch.empty(p.workers, p.N * (2 * p.R + 3), dtype=torch.float64)
    pool.run(
        _backward, p.workers, p.heads, address(upstream), *(address(t) for t in found),
        address(sums), *p.arguments,
    )  # fmt: skip
    return found


class _Problem:
    """The arguments that both kernels take, and how the work is divided."""

    def __init__(
        self,
        alpha: Tensor,
        beta: Tensor,
        square: Tensor,
        rho: Tensor,
        a: Tensor,
        length: int,
        per_node: float,
        per_row: float,
    ) -> None:
        *batch, self.R, H, self.N = alpha.shape
        P, dtype = math.prod(batch), alpha.dtype
        self.K = length // 2 + 1
        self.heads = P * H
        shared = bool(batch) and all(t.stride(0) == 0 for t in (square, rho, a))
        rows = self.R * P if shared else self.R
        self.fits = dtype in ONES and alpha.numel() > 0 and rows <= MANY
        if not self.fits:
            return
        work = self.heads * self.N * self.K * (per_node + per_row * self.R)
        self.workers = pool.workers(self.heads, work)
        width = ROWS + 4 * self.R * BLOCK
        one = ONES[dtype]
        self.held: tuple[Any, ...] = (
            *(packed(t, dtype) for t in (alpha, beta, square, rho, a)),
            *half_angles(length, a),
            torch.empty(self.workers, width, dtype=dtype),
        )
        self.arguments = (
            *(address(t) for t in self.held), width, self.R, H, self.N, self.K, one.itemsize, one,
        )  # fmt: skip


@jit
def _forward(
    begin, end, worker, out, alpha, beta, square, rho, a, sine, cosine, scratch, width, R, H, N, K,
    size, one,
):  # fmt: skip
    scratch += worker * width * size
    s = at(scratch, one)
    none, two = one - one, one + one
    sine, cosine = at(sine, one), at(cosine, one)
    for head in range(begin, end):
        p, h = head // H, head % H
        first = (p * R * H + h) * N  # of coefficients; the next row is H N further on
        al, be = at(alpha + first * size, one), at(beta + first * size, one)
        sq, rh = at(square + head * N * size, one), at(rho + head * N * size, one)
        a_h = at(a, one)[head]
        for k0 in range(0, K, BLOCK):
            n_k = min(BLOCK, K - k0)
            for k in range(n_k):
                x, c = a_h * sine[k0 + k], cosine[k0 + k]
                s[k + X], s[k + COS] = x, c
                s[k + X2], s[k + COS2], s[k + XCOS2] = x * x, c * c, two * x * c
            for k in range(4 * R * BLOCK):
                s[k + ROWS] = none
            for n0 in range(0, N, 4):
                for i in range(4):
                    n = n0 + i
                    if n >= N:
                        for k in range(n_k):
                            s[k + U + i * BLOCK] = none
                            s[k + V + i * BLOCK] = none
                        continue
                    q, r = sq[n], rh[n]
                    for k in range(n_k):
                        u, w = s[k + COS2] * q - s[k + X2], s[k + XCOS2] * r
                        m = one / (u * u + w * w)
                        s[k + U + i * BLOCK] = u * m
                        s[k + V + i * BLOCK] = w * m
                n1, n2, n3 = min(n0 + 1, N - 1), min(n0 + 2, N - 1), min(n0 + 3, N - 1)
                for r in range(R):
                    row = r * H * N
                    a0, a1, a2, a3 = al[row + n0], al[row + n1], al[row + n2], al[row + n3]
                    b0, b1, b2, b3 = be[row + n0], be[row + n1], be[row + n2], be[row + n3]
                    to = at(scratch + (ROWS + 4 * r * BLOCK) * size, one)
                    for k in range(n_k):
                        u0, w0 = s[k + U], s[k + V]
                        u1, w1 = s[k + U + BLOCK], s[k + V + BLOCK]
                        u2, w2 = s[k + U + 2 * BLOCK], s[k + V + 2 * BLOCK]
                        u3, w3 = s[k + U + 3 * BLOCK], s[k + V + 3 * BLOCK]
                        to[k] += (a0 * u0 + a1 * u1) + (a2 * u2 + a3 * u3)
                        to[k + BLOCK] += (b0 * u0 + b1 * u1) + (b2 * u2 + b3 * u3)
                        to[k + 2 * BLOCK] += (a0 * w0 + a1 * w1) + (a2 * w2 + a3 * w3)
                        to[k + 3 * BLOCK] += (b0 * w0 + b1 * w1) + (b2 * w2 + b3 * w3)
            for r in range(R):
                to = at(out + (((p * R + r) * H + h) * K + k0) * 2 * size, one)
                found = at(scratch + (ROWS + 4 * r * BLOCK) * size, one)
                for k in range(n_k):
                    x, c = two * s[k + X], two * s[k + COS]
                    to[2 * k] = -(x * found[k + 3 * BLOCK] + c * found[k])
                    to[2 * k + 1] = x * found[k + BLOCK] - c * found[k + 2 * BLOCK]


@jit
def _backward(
    begin, end, worker, grad, dalpha, dbeta, dsquare, drho, da, sums, alpha, beta, square, rho, a,
    sine, cosine, scratch, width, R, H, N, K, size, one,
):  # fmt: skip
    scratch += worker * width * size
    s = at(scratch, one)
    total = at(sums + worker * N * (2 * R + 3) * 8, DOUBLE)  # (N, 2 R + 3)
    none, two = one - one, one + one
    sine, cosine = at(sine, one), at(cosine, one)
    for head in range(begin, end):
        p, h = head // H, head % H
        first = (p * R * H + h) * N
        al, be = at(alpha + first * size, one), at(beta + first * size, one)
        sq, rh = at(square + head * N * size, one), at(rho + head * N * size, one)
        a_h = at(a, one)[head]
        for i in range(N * (2 * R + 3)):
            total[i] = 0
        for k0 in range(0, K, BLOCK):
            n_k = min(BLOCK, K - k0)
            for k in range(n_k):
                x, c = a_h * sine[k0 + k], cosine[k0 + k]
                s[k + X2], s[k + COS2], s[k + XCOS2] = x * x, c * c, two * x * c
            for r in range(R):
                g = at(grad + (((p * R + r) * H + h) * K + k0) * 2 * size, one)
                to = at(scratch + (ROWS + 4 * r * BLOCK) * size, one)
                for k in range(n_k):
                    x, c = two * a_h * sine[k0 + k], two * cosine[k0 + k]
                    to[k] = -c * g[2 * k]
                    to[k + BLOCK] = x * g[2 * k + 1]
                    to[k + 2 * BLOCK] = c * g[2 * k + 1]
                    to[k + 3 * BLOCK] = x * g[2 * k]
            for n in range(N):
                q, pole = sq[n], rh[n]
                for k in range(n_k):
                    u, w = s[k + COS2] * q - s[k + X2], s[k + XCOS2] * pole
                    m = one / (u * u + w * w)
                    s[k + U] = u * m
                    s[k + V] = w * m
                    s[k + Y_RE] = none
                    s[k + Y_IM] = none
                for r in range(R):
                    coefficient, other = al[r * H * N + n], be[r * H * N + n]
                    by_alpha = by_beta = none
                    to = at(scratch + (ROWS + 4 * r * BLOCK) * size, one)
                    for k in range(n_k):
                        g0, g1, g2, g3 = to[k], to[k + BLOCK], to[k + 2 * BLOCK], to[k + 3 * BLOCK]
                        by_alpha += g0 * s[k + U] - g2 * s[k + V]
                        by_beta += g1 * s[k + U] - g3 * s[k + V]
                        s[k + Y_RE] += coefficient * g0 + other * g1
                        s[k + Y_IM] += coefficient * g2 + other * g3
                    total[n * (2 * R + 3) + 2 * r] += by_alpha
                    total[n * (2 * R + 3) + 2 * r + 1] += by_beta
                by_square = by_x = by_rho = none
                for k in range(n_k):
                    u, w = s[k + U], s[k + V]
                    e, f = u * u - w * w, two * u * w
                    z_re = s[k + Y_RE] * e - s[k + Y_IM] * f
                    by_square += z_re * s[k + COS2]
                    by_x += z_re * s[k + X2]
                    by_rho += (s[k + Y_IM] * e + s[k + Y_RE] * f) * s[k + XCOS2]
                total[n * (2 * R + 3) + 2 * R] += by_square
                total[n * (2 * R + 3) + 2 * R + 1] += by_x
                total[n * (2 * R + 3) + 2 * R + 2] += by_rho
        by_a = 0.0
        for n in range(N):
            found = n * (2 * R + 3)
            for r in range(R):
                i = first + r * H * N + n
                at(dalpha, one)[i] = total[found + 2 * r]
                at(dbeta, one)[i] = total[found + 2 * r + 1]
                by_a += be[r * H * N + n] * total[found + 2 * r + 1]
            at(dsquare, one)[head * N + n] = -total[found + 2 * R]
            at(drho, one)[head * N + n] = -total[found + 2 * R + 2]
            by_a += 2 * total[found + 2 * R + 1] - rh[n] * total[found + 2 * R + 2]
        at(da, one)[head] = by_a / a_h


def warm() -> None:
    """Compile the kernels, or load them from disk."""
    for dtype in ONES:
        v, z, a = torch.ones(1, 1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), torch.ones(1)
        a = a.to(dtype)
        cauchy_backward(cauchy(v, v, z, z, a, 1), v, v, z, z, a, 1)
