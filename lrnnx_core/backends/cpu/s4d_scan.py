# SPDX-License-Identifier: MIT
# pyright: basic
"""The scan of S4D on the CPU.

An item is a row of the batch and a block of as many neighbouring channels as a vector holds. Its
samples go by in tiles that stay in the first-level cache; over a tile, the states and coefficients
of a few pairs are kept in registers, and each adds its part to the tile's outputs. The backward
starts a tile from the state that the forward kept, writes the states of two pairs into the cache,
and runs the adjoint back over them; p below is its conjugate,

    p_t = a p_{t+1} + v g_t,  du_t = Re sum p_t,  conj da = sum p_{t+1} s_t,  conj dv = sum g_t s_t

Gradients of parameters are summed by worker, and the workers' sums in their order. Addresses and
strides are in bytes; 0 stands for an absent tensor.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lrnnx_core.backends.blocked_s4d import chunk_length, direct_gradients, with_direct
from lrnnx_core.backends.cpu import lanes, pool
from lrnnx_core.backends.cpu.compiling import inline, jit
from lrnnx_core.backends.cpu.lanes import load, nothing, store
from lrnnx_core.backends.cpu.pointers import ONES, address, at, packed, rows

TILE = 64  # samples; every chunk is a multiple
INT = np.int64(1)
FLAG = np.uint8(1)


def s4d_scan(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    keep: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: see `lrnnx_core.backends.blocked_s4d.s4d_scan`."""
    p = _Problem(u, a, v, D, lengths, reset, reverse)
    new = torch.empty if lengths is None else torch.zeros
    y = new(u.shape, dtype=p.dtype)
    last = torch.empty((*u.shape[:-2], p.H, p.M), dtype=a.dtype)
    kept = torch.empty((*u.shape[:-2], p.chunks * p.H * p.M if keep else 0), dtype=a.dtype)
    if not p.items:
        y = with_direct(y.zero_(), D, u, lengths)
        last.zero_()
    else:
        x = p.sequence(u)
        workers, scratch = p.workspace(6, 2 * TILE + 1, TILE)
        pool.run(
            _forward, workers, p.items, *p.written(y), address(last), address(kept) if keep else 0,
            *x, *p.arguments, scratch.data_ptr(), scratch.stride(0), p.one,
        )  # fmt: skip
    return y.to(u.dtype), last, kept


def s4d_scan_backward(
    kept: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf: see `lrnnx_core.backends.blocked_s4d.s4d_scan_backward`."""
    p = _Problem(u, a, v, D, lengths, reset, reverse)
    du = (torch.empty if lengths is None else torch.zeros)(u.shape, dtype=p.dtype)
    if not p.items:
        du, dD = direct_gradients(du.zero_(), grad_y, u, D, lengths)
        return du.to(u.dtype), torch.zeros_like(a), torch.zeros_like(v), dD
    workers, scratch = p.workspace(23, 7 * p.chunk + 2, p.chunk)
    sums = torch.zeros((workers, 2, *a.shape), dtype=a.dtype)
    direct = None if D is None else torch.zeros((workers, *a.shape[:-1]), dtype=p.dtype)
    x, g = p.sequence(u), p.sequence(grad_y)
    states, end = packed(kept, a.dtype), packed(grad_last, a.dtype)
    pool.run(
        _backward, workers, p.items, *p.written(du), address(sums), address(direct),
        address(states), address(end), *x, *g, *p.arguments, scratch.data_ptr(),
        scratch.stride(0), p.one,
    )  # fmt: skip
    da, dv = torch.conj_physical(_total(sums)).unbind(0)
    dD = u.new_empty(0) if direct is None else _total(direct)
    return du.to(u.dtype), da.clone(), dv.clone(), dD


def _total(sums: Tensor) -> Tensor:
    """Add the sums of the workers in their order."""
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total


class _Problem:
    """Sizes, and the arguments that both kernels take; it keeps the tensors alive."""

    def __init__(
        self,
        u: Tensor,
        a: Tensor,
        v: Tensor,
        D: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        reverse: bool,
    ) -> None:
        self.reverse = reverse
        reset = reset.flip(-1) if reset is not None and reverse else reset
        *batch, self.L, self.H = u.shape
        self.M = a.shape[-1]
        self.G = math.prod(a.shape[:-2])
        self.R = math.prod(batch[a.ndim - 2 :])
        self.dtype = a.real.dtype if a.is_complex() else a.dtype
        self.one = ONES[self.dtype]
        self.chunk = chunk_length(self.M)
        self.chunks = -(-self.L // self.chunk)
        self.parts = 2 if a.is_complex() else 1
        self.pairs = 1 if a.is_complex() else None  # numba leaves out what None does not reach
        group = 4 // self.parts
        self.padded = -(-self.M // group) * group
        size = self.one.itemsize
        self.width = lanes.count(size)
        self.items = self.G * -(-self.H // self.width) * self.R if self.M and self.L else 0
        self.tensors: list[Tensor | None] = [
            packed(a, a.dtype),
            packed(v, a.dtype),
            packed(None if D is None else D.expand(a.shape[:-1]), self.dtype),
            packed(lengths, torch.int64),
            packed(reset, torch.bool),
        ]
        self.arguments = (
            *(address(t) for t in self.tensors), self.G, self.R, self.L, self.H, self.M,
            self.padded, self.chunk, self.parts, self.pairs, self.width, size,
        )  # fmt: skip

    def sequence(self, t: Tensor) -> tuple[int, ...]:
        """Return the address of the first step run of (*batch, L, H), and strides."""
        kept, (start, outer, inner, time) = rows(t, self.dtype, self.G, self.R, self.L, self.H)
        self.tensors.append(kept)
        if self.reverse:
            start, time = start + (self.L - 1) * time, -time
        return start, outer, inner, time

    def written(self, t: Tensor) -> tuple[int, int]:
        """Return the address of the first step run of a dense one, and its stride in time."""
        start, _, _, time = self.sequence(t)
        return start, time

    def workspace(self, operations: int, rows: int, samples: int) -> tuple[int, Tensor]:
        """Return the workers, and bytes for each: tile rows, six blocks of states, and bounds."""
        vectors = self.items * self.L * self.padded * operations * self.parts / 2
        workers = pool.workers(self.items, 0.3 * vectors)
        size = (rows + 6 * self.parts * self.padded) * self.width * self.one.itemsize
        size += 8 * (samples + 8)
        return workers, torch.zeros((workers, -(-size // 64) * 64), dtype=torch.uint8)


# ------------------------------------------------------------ moving blocks


@inline
def _spread(block, source, M, padded, parts, h, W, one):
    """Copy (h, M, parts) to (padded, parts, W), zeros in the padding."""
    block, source = at(block, one), at(source, one)
    for i in range(padded * parts * W):
        block[i] = 0
    for c in range(h):
        for i in range(M * parts):
            block[i * W + c] = source[c * M * parts + i]


@inline
def _collect(target, block, M, parts, h, W, one):
    """Copy (M, parts, W) to (h, M, parts)."""
    block, target = at(block, one), at(target, one)
    for c in range(h):
        for i in range(M * parts):
            target[c * M * parts + i] = block[i * W + c]


@inline
def _clear(block, count, V, one):
    for i in range(count):
        store(block + i * V, nothing(one))


@inline
def _scale(tile, x, factor, count, V, one):
    """Write a tile times one number a channel."""
    f = load(factor, one)
    for t in range(count):
        store(tile + t * V, f * load(x + t * V, one))


@inline
def _weigh(total, g, x, count, V, one):
    """Add sum g x over a tile."""
    s = nothing(one)
    for t in range(count):
        s = s + load(g + t * V, one) * load(x + t * V, one)
    store(total, load(total, one) + s)


@inline
def _fetch(tile, x, step, count, h, W, V, one):
    """Copy rows of h numbers, ``step`` bytes apart, to a tile (count, W)."""
    if h == W:
        for t in range(count):
            store(tile + t * V, load(x + t * step, one))
    else:
        for t in range(count):
            target, source = at(tile + t * V, one), at(x + t * step, one)
            for c in range(h):
                target[c] = source[c]


@inline
def _deliver(y, step, tile, count, h, W, V, one):
    """Copy a tile (count, W) to rows of h numbers."""
    if h == W:
        for t in range(count):
            store(y + t * step, load(tile + t * V, one))
    else:
        for t in range(count):
            target, source = at(y + t * step, one), at(tile + t * V, one)
            for c in range(h):
                target[c] = source[c]


@inline
def _segments(bounds, reset, count):
    """Write 0, the resets within a tile but at its first sample, count; return how many parts."""
    bounds = at(bounds, INT)
    bounds[0], n = 0, 1
    if reset != 0:
        flags = at(reset, FLAG)
        for t in range(1, count):
            if flags[t] != 0:
                bounds[n] = t
                n += 1
    bounds[n] = count
    return n


# ------------------------------------------------------------ forward


@inline
def _run_pairs(x, y, S, A, C, padded, bounds, segments, V, one):
    """Run all complex states over a tile, two at a time; y += Re sum v s."""
    cuts = at(bounds, INT)
    for n in range(0, padded, 2):
        b = 2 * n * V
        pr, pi = load(S + b, one), load(S + b + V, one)
        qr, qi = load(S + b + 2 * V, one), load(S + b + 3 * V, one)
        ar, ai = load(A + b, one), load(A + b + V, one)
        br, bi = load(A + b + 2 * V, one), load(A + b + 3 * V, one)
        cr, ci = load(C + b, one), load(C + b + V, one)
        dr, di = load(C + b + 2 * V, one), load(C + b + 3 * V, one)
        for k in range(segments):
            if k > 0:
                pr, pi, qr, qi = nothing(one), nothing(one), nothing(one), nothing(one)
            for t in range(cuts[k], cuts[k + 1]):
                u = load(x + t * V, one)
                pr, pi = (u + ar * pr) - ai * pi, ai * pr + ar * pi
                qr, qi = (u + br * qr) - bi * qi, bi * qr + br * qi
                z = load(y + t * V, one) + cr * pr - ci * pi
                store(y + t * V, z + dr * qr - di * qi)
        store(S + b, pr)
        store(S + b + V, pi)
        store(S + b + 2 * V, qr)
        store(S + b + 3 * V, qi)


@inline
def _run_real(x, y, S, A, C, padded, bounds, segments, V, one):
    """Run all real states over a tile, four at a time."""
    cuts = at(bounds, INT)
    for n in range(0, padded, 4):
        b = n * V
        p, q = load(S + b, one), load(S + b + V, one)
        r, s = load(S + b + 2 * V, one), load(S + b + 3 * V, one)
        ap, aq = load(A + b, one), load(A + b + V, one)
        ar, as_ = load(A + b + 2 * V, one), load(A + b + 3 * V, one)
        cp, cq = load(C + b, one), load(C + b + V, one)
        cr, cs = load(C + b + 2 * V, one), load(C + b + 3 * V, one)
        for k in range(segments):
            if k > 0:
                p, q, r, s = nothing(one), nothing(one), nothing(one), nothing(one)
            for t in range(cuts[k], cuts[k + 1]):
                u = load(x + t * V, one)
                p, q, r, s = u + ap * p, u + aq * q, u + ar * r, u + as_ * s
                z = load(y + t * V, one) + cp * p + cq * q
                store(y + t * V, z + cr * r + cs * s)
        store(S + b, p)
        store(S + b + V, q)
        store(S + b + 2 * V, r)
        store(S + b + 3 * V, s)


@jit
def _forward(
    begin, end, worker, y, y_t, last, kept, u, u_g, u_r, u_t, a, v, direct, lengths, reset, G, R, L,
    H, M, padded, chunk, parts, pairs, W, size, scratch, stride, one,
):  # fmt: skip
    blocks, chunks = (H + W - 1) // W, (L + chunk - 1) // chunk
    V = W * size
    x_tile = scratch + worker * stride
    y_tile = x_tile + TILE * V
    S = y_tile + TILE * V
    A = S + parts * padded * V
    C = A + parts * padded * V
    D = C + parts * padded * V
    bounds = D + V
    state = parts * M * size  # bytes of a channel's states
    for item in range(begin, end):
        gb, r = item // R, item % R
        g, first = gb // blocks, (gb % blocks) * W
        h = min(W, H - first)
        row = g * R + r
        if item == begin or r == 0:
            _spread(A, a + (g * H + first) * state, M, padded, parts, h, W, one)
            _spread(C, v + (g * H + first) * state, M, padded, parts, h, W, one)
            if direct != 0:
                _spread(D, direct + (g * H + first) * size, 1, 1, 1, h, W, one)
        _clear(S, parts * padded, V, one)
        stop = L if lengths == 0 else at(lengths + 8 * row, INT)[0]
        flags = 0 if reset == 0 else reset + row * L
        for t0 in range(0, stop, TILE):
            count = min(TILE, stop - t0)
            if kept != 0 and t0 % chunk == 0:
                place = ((row * chunks + t0 // chunk) * H + first) * state
                _collect(kept + place, S, M, parts, h, W, one)
            if flags != 0 and at(flags + t0, FLAG)[0] != 0:
                _clear(S, parts * padded, V, one)
            segments = _segments(bounds, 0 if flags == 0 else flags + t0, count)
            source = u + g * u_g + r * u_r + t0 * u_t + first * size
            _fetch(x_tile, source, u_t, count, h, W, V, one)
            if direct != 0:
                _scale(y_tile, x_tile, D, count, V, one)
            else:
                _clear(y_tile, count, V, one)
            if pairs is not None:
                _run_pairs(x_tile, y_tile, S, A, C, padded, bounds, segments, V, one)
            else:
                _run_real(x_tile, y_tile, S, A, C, padded, bounds, segments, V, one)
            target = y + (row * L * H + first) * size + t0 * y_t
            _deliver(target, y_t, y_tile, count, h, W, V, one)
        _collect(last + (row * H + first) * state, S, M, parts, h, W, one)
        if kept != 0:
            for c in range((stop + chunk - 1) // chunk, chunks):
                place = ((row * chunks + c) * H + first) * state
                _collect(kept + place, S, M, parts, h, W, one)


# ------------------------------------------------------------ backward


@inline
def _states_of_pairs(x, T, S, A, bounds, segments, V, one):
    """Write the states of two pairs over a tile: T (count, 2, 2, W)."""
    cuts = at(bounds, INT)
    pr, pi = load(S, one), load(S + V, one)
    qr, qi = load(S + 2 * V, one), load(S + 3 * V, one)
    ar, ai = load(A, one), load(A + V, one)
    br, bi = load(A + 2 * V, one), load(A + 3 * V, one)
    for k in range(segments):
        if k > 0:
            pr, pi, qr, qi = nothing(one), nothing(one), nothing(one), nothing(one)
        for t in range(cuts[k], cuts[k + 1]):
            u = load(x + t * V, one)
            pr, pi = (u + ar * pr) - ai * pi, ai * pr + ar * pi
            qr, qi = (u + br * qr) - bi * qi, bi * qr + br * qi
            at_t = T + 4 * t * V
            store(at_t, pr)
            store(at_t + V, pi)
            store(at_t + 2 * V, qr)
            store(at_t + 3 * V, qi)


@inline
def _adjoint_of_pair(g, du, T, P, A, C, GA, GC, bounds, segments, ends, V, one):
    """Run the adjoint of a pair back over a tile; ``ends`` where the tile is the last one."""
    cuts = at(bounds, INT)
    pr, pi = load(P, one), load(P + V, one)
    ar, ai = load(A, one), load(A + V, one)
    cr, ci = load(C, one), load(C + V, one)
    xr, xi, zr, zi = nothing(one), nothing(one), nothing(one), nothing(one)
    for j in range(segments):
        k = segments - 1 - j
        low, high = cuts[k], cuts[k + 1]
        if ends and j == 0:  # what comes in is the cotangent of the last state itself
            high -= 1
            y = load(g + high * V, one)
            sr, si = load(T + 4 * high * V, one), load(T + 4 * high * V + V, one)
            zr, zi = y * sr, y * si
            pr, pi = pr + cr * y, pi + ci * y
            store(du + high * V, load(du + high * V, one) + pr)
        for i in range(high - low):
            t = high - 1 - i
            y = load(g + t * V, one)
            sr, si = load(T + 4 * t * V, one), load(T + 4 * t * V + V, one)
            xr, xi = xr + pr * sr - pi * si, xi + pr * si + pi * sr
            zr, zi = zr + y * sr, zi + y * si
            pr, pi = (cr * y + ar * pr) - ai * pi, (ci * y + ai * pr) + ar * pi
            store(du + t * V, load(du + t * V, one) + pr)
        if k > 0:
            pr, pi = nothing(one), nothing(one)
    store(P, pr)
    store(P + V, pi)
    store(GA, load(GA, one) + xr)
    store(GA + V, load(GA + V, one) + xi)
    store(GC, load(GC, one) + zr)
    store(GC + V, load(GC + V, one) + zi)


@inline
def _states_of_real(x, T, S, A, bounds, segments, V, one):
    """Write four real states over a tile: T (count, 4, W)."""
    cuts = at(bounds, INT)
    p, q, r, s = load(S, one), load(S + V, one), load(S + 2 * V, one), load(S + 3 * V, one)
    ap, aq, ar, as_ = load(A, one), load(A + V, one), load(A + 2 * V, one), load(A + 3 * V, one)
    for k in range(segments):
        if k > 0:
            p, q, r, s = nothing(one), nothing(one), nothing(one), nothing(one)
        for t in range(cuts[k], cuts[k + 1]):
            u = load(x + t * V, one)
            p, q, r, s = u + ap * p, u + aq * q, u + ar * r, u + as_ * s
            at_t = T + 4 * t * V
            store(at_t, p)
            store(at_t + V, q)
            store(at_t + 2 * V, r)
            store(at_t + 3 * V, s)


@inline
def _adjoint_of_two(g, du, T, P, A, C, GA, GC, bounds, segments, ends, V, one):
    """Run the adjoints of two real states back over a tile."""
    cuts = at(bounds, INT)
    p, q = load(P, one), load(P + V, one)
    ap, aq = load(A, one), load(A + V, one)
    cp, cq = load(C, one), load(C + V, one)
    xp, xq, zp, zq = nothing(one), nothing(one), nothing(one), nothing(one)
    for j in range(segments):
        k = segments - 1 - j
        low, high = cuts[k], cuts[k + 1]
        if ends and j == 0:
            high -= 1
            y = load(g + high * V, one)
            zp, zq = y * load(T + 4 * high * V, one), y * load(T + 4 * high * V + V, one)
            p, q = p + cp * y, q + cq * y
            store(du + high * V, load(du + high * V, one) + p + q)
        for i in range(high - low):
            t = high - 1 - i
            y = load(g + t * V, one)
            sp, sq = load(T + 4 * t * V, one), load(T + 4 * t * V + V, one)
            xp, xq = xp + p * sp, xq + q * sq
            zp, zq = zp + y * sp, zq + y * sq
            p, q = cp * y + ap * p, cq * y + aq * q
            store(du + t * V, load(du + t * V, one) + p + q)
        if k > 0:
            p, q = nothing(one), nothing(one)
    store(P, p)
    store(P + V, q)
    store(GA, load(GA, one) + xp)
    store(GA + V, load(GA + V, one) + xq)
    store(GC, load(GC, one) + zp)
    store(GC + V, load(GC + V, one) + zq)


@inline
def _add(target, block, M, parts, h, W, one):
    """Add (M, parts, W) to (h, M, parts)."""
    block, target = at(block, one), at(target, one)
    for c in range(h):
        for i in range(M * parts):
            target[c * M * parts + i] += block[i * W + c]


@jit
def _backward(
    begin, end, worker, du, du_t, sums, direct_sums, kept, grad_last, u, u_g, u_r, u_t, grad, g_g,
    g_r, g_t, a, v, direct, lengths, reset, G, R, L, H, M, padded, chunk, parts, pairs, W, size,
    scratch, stride, one,
):  # fmt: skip
    blocks, chunks = (H + W - 1) // W, (L + chunk - 1) // chunk
    V = W * size
    block = parts * padded * V
    x_tile = scratch + worker * stride
    g_tile, d_tile, T = x_tile + chunk * V, x_tile + 2 * chunk * V, x_tile + 3 * chunk * V
    S = x_tile + 7 * chunk * V
    P, A, C, GA, GC = S + block, S + 2 * block, S + 3 * block, S + 4 * block, S + 5 * block
    D = S + 6 * block
    GD, bounds = D + V, D + 2 * V
    state = parts * M * size  # bytes of a channel's states
    for item in range(begin, end):
        gb, r = item // R, item % R
        g, first = gb // blocks, (gb % blocks) * W
        h = min(W, H - first)
        row = g * R + r
        if item == begin or r == 0:
            _spread(A, a + (g * H + first) * state, M, padded, parts, h, W, one)
            _spread(C, v + (g * H + first) * state, M, padded, parts, h, W, one)
            if direct != 0:
                _spread(D, direct + (g * H + first) * size, 1, 1, 1, h, W, one)
            _clear(GA, 2 * parts * padded, V, one)
            _clear(GD, 1, V, one)
        _spread(P, grad_last + (row * H + first) * state, M, padded, parts, h, W, one)
        if pairs is not None:
            for n in range(padded):
                store(P + (2 * n + 1) * V, nothing(one) - load(P + (2 * n + 1) * V, one))
        stop = L if lengths == 0 else at(lengths + 8 * row, INT)[0]
        flags = 0 if reset == 0 else reset + row * L
        used = (stop + chunk - 1) // chunk
        for j in range(used):
            c = used - 1 - j
            t0 = c * chunk
            count = min(chunk, stop - t0)
            starts = flags != 0 and at(flags + t0, FLAG)[0] != 0
            if starts:
                _clear(S, parts * padded, V, one)
            else:
                place = ((row * chunks + c) * H + first) * state
                _spread(S, kept + place, M, padded, parts, h, W, one)
            segments = _segments(bounds, 0 if flags == 0 else flags + t0, count)
            source = u + g * u_g + r * u_r + t0 * u_t + first * size
            _fetch(x_tile, source, u_t, count, h, W, V, one)
            source = grad + g * g_g + r * g_r + t0 * g_t + first * size
            _fetch(g_tile, source, g_t, count, h, W, V, one)
            if direct != 0:
                _scale(d_tile, g_tile, D, count, V, one)
                _weigh(GD, g_tile, x_tile, count, V, one)
            else:
                _clear(d_tile, count, V, one)
            for n in range(0, parts * padded, 4):
                b = n * V
                if pairs is not None:
                    _states_of_pairs(x_tile, T, S + b, A + b, bounds, segments, V, one)
                else:
                    _states_of_real(x_tile, T, S + b, A + b, bounds, segments, V, one)
                for i in range(0, 4, 2):
                    o = b + i * V
                    if pairs is not None:
                        _adjoint_of_pair(
                            g_tile, d_tile, T + i * V, P + o, A + o, C + o, GA + o, GC + o, bounds,
                            segments, j == 0, V, one,
                        )  # fmt: skip
                    else:
                        _adjoint_of_two(
                            g_tile, d_tile, T + i * V, P + o, A + o, C + o, GA + o, GC + o, bounds,
                            segments, j == 0, V, one,
                        )  # fmt: skip
            if starts:
                _clear(P, parts * padded, V, one)
            target = du + (row * L * H + first) * size + t0 * du_t
            _deliver(target, du_t, d_tile, count, h, W, V, one)
        if r == R - 1 or item == end - 1:
            target = sums + 2 * worker * G * H * state + (g * H + first) * state
            _add(target, GA, M, parts, h, W, one)
            _add(target + G * H * state, GC, M, parts, h, W, one)
            if direct != 0:
                target = direct_sums + (worker * G * H + g * H + first) * size
                _add(target, GD, 1, 1, h, W, one)


def warm() -> None:
    """Compile the kernels."""
    kinds = {torch.float32: torch.complex64, torch.float64: torch.complex128}
    for real, pairs in kinds.items():
        for kind in (real, pairs):
            u, a = torch.zeros(1, 1, 1, dtype=real), torch.zeros(1, 1, dtype=kind)
            y, last, kept = s4d_scan(u, a, a, None, None, None, True)
            s4d_scan_backward(kept, y, last, u, a, a, None, None, None)
