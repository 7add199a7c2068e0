# SPDX-License-Identifier: MIT
# pyright: basic
"""The trilinear form on the CPU: a matrix product in tiles, the rest of the sum in cache.

A weight (A, B, C) in memory, whatever its axes mean, meets the samples in one of two ways, neither
of which copies it:

    its last axis belongs to an input:   M = x_c W^T, (samples, A B), then M with the other input
    its last axis belongs to the output: pairs x_a x_b, (samples, A B), then out = pairs W

A tile of M or of the pairs is `TILE` columns of ``chunk_size`` samples; it stays in the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lrnnx_core.backends import library
from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.pointers import ONES, address, at
from lrnnx_core.backends.transforms import full_precision

TILE = 512


def trilinear(w: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    """Leaf: w (*b, I, J, K), p (*b, T, J), q (*b, T, K) -> (*b, T, I)."""
    batch = p.shape[:-2]
    if batch:
        if p.numel() and all(n == 1 or s == 0 for n, s in zip(batch, w.stride(), strict=False)):
            # one weight for all: its batch joins the samples
            w = w[(0,) * len(batch)]
            out = trilinear(w, p.flatten(0, len(batch)), q.flatten(0, len(batch)), chunk_size)
            return out.view(*batch, -1, w.shape[0])
        out = p.new_empty(*batch, p.shape[-2], w.shape[-3])
        for i in itertools.product(*map(range, batch)):
            out[i] = trilinear(w[i], p[i], q[i], chunk_size)
        return out
    order = next((o for o in ORDERS if w.permute(o).is_contiguous()), None)
    sizes = w.shape[0], w.shape[1], w.shape[2]
    if order is None or w.dtype not in ONES or not (w.numel() and p.shape[0]):
        return library.default("trilinear")(w, p, q, chunk_size)
    if order[2] != 0 and 2 * sizes[order[2]] < sizes[3 - order[2]]:  # a product with a short side
        return library.default("trilinear")(w, p, q, chunk_size)
    inputs = {1: p.contiguous(), 2: q.contiguous()}
    with full_precision(w.device):  # a backward pass may be run inside of an autocast region
        run = _by_pairs if order[2] == 0 else _by_matrices
        return run(w.permute(order), order, inputs, chunk_size)


ORDERS = ((0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0), (2, 1, 0))


def trilinear_outer(g: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    """Leaf: g (*b, T, I), p (*b, T, J), q (*b, T, K) -> sum of products over T, (*b, I, J, K)."""
    batch = g.shape[:-2]
    I, J, K = g.shape[-1], p.shape[-1], q.shape[-1]
    if g.dtype not in ONES or not (g.shape[-2] and I * J * K) or max(I, J) > 2 * K:
        return library.default("trilinear_outer")(g, p, q, chunk_size)
    out = torch.empty(*batch, I, J, K, dtype=g.dtype)
    with full_precision(g.device):
        for i in itertools.product(*map(range, batch)):
            _outer(g[i].contiguous(), p[i].contiguous(), q[i].contiguous(), out[i], chunk_size)
    return out


def _outer(g: Tensor, p: Tensor, q: Tensor, out: Tensor, chunk_size: int) -> None:
    buffer = _buffer(g, p.shape[1], chunk_size)
    for now, part, pairs in _tiles(g, p.shape[1], buffer, chunk_size):
        _multiply(pairs, g, p, now, part)
        target = out[part].view(-1, q.shape[1])
        target.addmm_(pairs.mT, q[now], beta=0 if now.start == 0 else 1)


def _by_matrices(
    w: Tensor, order: tuple[int, int, int], inputs: dict[int, Tensor], chunk_size: int
) -> Tensor:
    """Multiply the input of the last axis first."""
    x, y = inputs[order[2]], inputs[3 - order[2]]
    A, B, _ = w.shape
    outer = order[0] == 0  # whether the output is w's first axis, else the second
    out = torch.empty(len(x), A, dtype=w.dtype) if outer else torch.zeros(len(x), B, dtype=w.dtype)
    buffer = _buffer(x, B, chunk_size, A)
    for now, part, matrices in _tiles(x, B, buffer, chunk_size, A):
        torch.mm(x[now], w[part].flatten(0, 1).mT, out=matrices)
        rows = len(matrices)
        pool.run(
            _dots if outer else _sums, pool.workers(rows, 0.3 * matrices.numel()), rows,
            address(matrices), address(y) + now.start * y.shape[1] * y.element_size(), y.shape[1],
            address(out) + now.start * out.shape[1] * out.element_size(), out.shape[1],
            part.start, part.stop - part.start, B, y.element_size(), ONES[w.dtype],
        )  # fmt: skip
    return out


def _by_pairs(
    w: Tensor, order: tuple[int, int, int], inputs: dict[int, Tensor], chunk_size: int
) -> Tensor:
    """Multiply the inputs, of w's first two axes, and then the weight."""
    x, y = inputs[order[0]], inputs[order[1]]
    _, B, C = w.shape
    out = torch.empty(len(x), C, dtype=w.dtype)
    buffer = _buffer(x, B, chunk_size)
    for now, part, pairs in _tiles(x, B, buffer, chunk_size):
        _multiply(pairs, x, y, now, part)
        out[now].addmm_(pairs, w[part].flatten(0, 1), beta=0 if part.start == 0 else 1)
    return out


def _buffer(x: Tensor, inner: int, chunk_size: int, outer: int | None = None) -> Tensor:
    """Return memory for a tile."""
    outer = x.shape[1] if outer is None else outer
    return torch.empty(min(chunk_size, len(x)) * min(outer, _height(inner)) * inner, dtype=x.dtype)


def _height(inner: int) -> int:
    return max(1, TILE // inner)


def _tiles(
    x: Tensor, inner: int, buffer: Tensor, chunk_size: int, outer: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield spans of samples, spans of the outer axis, and a tile (samples, outer * inner)."""
    outer, height = x.shape[1] if outer is None else outer, _height(inner)
    for first in range(0, outer, height):
        part = slice(first, min(first + height, outer))
        width = (part.stop - part.start) * inner
        for start in range(0, len(x), chunk_size):
            now = slice(start, min(start + chunk_size, len(x)))
            rows = now.stop - now.start
            yield now, part, buffer[: rows * width].view(rows, width)


def _multiply(pairs: Tensor, x: Tensor, y: Tensor, now: slice, part: slice) -> None:
    """Write x_a y_b for a span of a."""
    rows, size = len(pairs), x.element_size()
    pool.run(
        _products, pool.workers(rows, 0.3 * pairs.numel()), rows, address(pairs),
        address(x) + (now.start * x.shape[1] + part.start) * size, x.shape[1],
        address(y) + now.start * y.shape[1] * size, part.stop - part.start, y.shape[1], size,
        ONES[x.dtype],
    )  # fmt: skip


@jit
def _dots(begin, end, worker, matrices, x, x_t, out, out_t, first, A, B, size, one):
    """out[t, first + a] = sum_b matrices[t, a, b] x[t, b]."""
    for t in range(begin, end):
        m, y = at(matrices + t * A * B * size, one), at(x + t * x_t * size, one)
        to = at(out + (t * out_t + first) * size, one)
        for a in range(A):
            total = one - one
            for b in range(B):
                total += m[a * B + b] * y[b]
            to[a] = total


@jit
def _sums(begin, end, worker, matrices, x, x_t, out, out_t, first, A, B, size, one):
    """out[t, b] += sum_a matrices[t, a, b] x[t, first + a]."""
    for t in range(begin, end):
        m, y = at(matrices + t * A * B * size, one), at(x + (t * x_t + first) * size, one)
        to = at(out + t * out_t * size, one)
        for a in range(0, A - A % 4, 4):
            y0, y1, y2, y3 = y[a], y[a + 1], y[a + 2], y[a + 3]
            for b in range(B):
                to[b] += (y0 * m[a * B + b] + y1 * m[(a + 1) * B + b]) + (
                    y2 * m[(a + 2) * B + b] + y3 * m[(a + 3) * B + b]
                )
        for a in range(A - A % 4, A):
            for b in range(B):
                to[b] += y[a] * m[a * B + b]


@jit
def _products(begin, end, worker, pairs, x, x_t, y, A, B, size, one):
    for t in range(begin, end):
        u, v = at(x + t * x_t * size, one), at(y + t * B * size, one)
        to = at(pairs + t * A * B * size, one)
        for a in range(A):
            for b in range(B):
                to[a * B + b] = u[a] * v[b]


def warm() -> None:
    """Compile the kernels, or load them from disk."""
    for dtype in ONES:
        x, w = torch.zeros(1, 2, dtype=dtype), torch.zeros(2, 2, 2, dtype=dtype)
        for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
            trilinear(w.permute(order), x, x, 1)
