# SPDX-License-Identifier: MIT
# pyright: basic, reportCallIssue=false
"""The linear scan's leaf operators, compiled: steps in order, all channels of a step at once.

Work is dealt out as (row of the batch, block of channels). A step reads one line of each sequence
and writes one, which runs at the speed of memory; the state, one line, stays in the first cache.
Complex numbers lie as [re, im] pairs. A coefficient that is constant in time has stride 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import inline, jit
from lrnnx_core.backends.cpu.pointers import ONES, address, at, copy, fill, flagged, packed, rows
from lrnnx_core.backends.reference import state_dtype

LEAST = 256  # bytes of a line in a block
FORWARD = 0.15  # nanoseconds a byte of a sequence
BACKWARD = 0.25
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


@inline
def _step(to, a, b, state, n, one):
    """Compute state = a state + b, and write it to ``to`` as well."""
    to, a, b, state = at(to, one), at(a, one), at(b, one), at(state, one)
    for c in range(n):
        h = a[c] * state[c] + b[c]
        state[c] = h
        to[c] = h


@inline
def _step_pairs(to, a, b, state, n, one):
    to, a, b, state = at(to, one), at(a, one), at(b, one), at(state, one)
    for c in range(n // 2):
        i, j = 2 * c, 2 * c + 1
        x, y = state[i], state[j]
        re = a[i] * x - a[j] * y + b[i]
        im = a[i] * y + a[j] * x + b[j]
        state[i] = re
        state[j] = im
        to[i] = re
        to[j] = im


@jit
def _forward(
    begin, end, worker, h, last, a, a_q, a_t, b, b_q, b_t, h0, reset, L, C, blocks, wide, pairs,
    reverse, size, one,
):  # fmt: skip
    for item in range(begin, end):
        q, first = item // blocks, item % blocks * wide
        n = min(wide, C - first)
        state = last + (q * C + first) * size
        if h0:
            copy(state, h0 + (q * C + first) * size, n, one)
        else:
            fill(state, n, one)
        flags = reset + q * L if reset else 0
        a_row, b_row = a + q * a_q + first * size, b + q * b_q + first * size
        h_row = h + (q * L * C + first) * size
        for k in range(L):
            t = L - 1 - k if reverse else k
            to = h_row + t * C * size
            if flagged(flags, t):
                fill(state, n, one)
            if pairs:
                _step_pairs(to, a_row + t * a_t, b_row + t * b_t, state, n, one)
            else:
                _step(to, a_row + t * a_t, b_row + t * b_t, state, n, one)


@inline
def _back(da, db, a, before, g, carry, n, one):
    """Compute lam = g + carry, db = lam, da = lam before, carry = a lam."""
    # Everything is read before anything is written: tensors often lie a multiple of 4096 bytes
    # apart, and a read behind a write whose address ends alike waits for it.
    da, db, a, before = at(da, one), at(db, one), at(a, one), at(before, one)
    g, carry = at(g, one), at(carry, one)
    for c in range(n):
        factor, earlier = a[c], before[c]
        lam = g[c] + carry[c]
        db[c] = lam
        da[c] = lam * earlier
        carry[c] = factor * lam


@inline
def _back_pairs(da, db, a, before, g, carry, n, one):
    da, db, a, before = at(da, one), at(db, one), at(a, one), at(before, one)
    g, carry = at(g, one), at(carry, one)
    for c in range(n // 2):
        i, j = 2 * c, 2 * c + 1
        x, y, p, q = a[i], a[j], before[i], before[j]
        re, im = g[i] + carry[i], g[j] + carry[j]
        db[i] = re
        db[j] = im
        da[i] = re * p + im * q
        da[j] = im * p - re * q
        carry[i] = x * re + y * im
        carry[j] = x * im - y * re


@inline
def _back_cleared(db, g, carry, n, one):
    """Compute lam = g + carry, db = lam; nothing goes further back."""
    db, g, carry = at(db, one), at(g, one), at(carry, one)
    for c in range(n):
        db[c] = g[c] + carry[c]
        carry[c] = 0


@inline
def _collect(total, part, n, one):
    """Add a line to sums in float64."""
    total, part = at(total, 0.0), at(part, one)
    for c in range(n):
        total[c] += part[c]


@inline
def _settle(to, total, n, one):
    to, total = at(to, one), at(total, 0.0)
    for c in range(n):
        to[c] = total[c]


@jit
def _backward(
    begin, end, worker, da, da_t, db, dh0, a, a_q, a_t, h, h_q, h_t, g, g_q, g_t, h0, grad_last,
    reset, zeros, part, total, L, C, blocks, wide, pairs, reverse, size, one,
):  # fmt: skip
    # Where a is constant in time, da_t is 0: a step's product lies in ``part`` until it is added.
    for item in range(begin, end):
        q, first = item // blocks, item % blocks * wide
        n = min(wide, C - first)
        line = (q * C + first) * size
        carry = dh0 + line
        copy(carry, grad_last + line, n, one)
        flags = reset + q * L if reset else 0
        a_row, h_row = a + q * a_q + first * size, h + q * h_q + first * size
        g_row, db_row = g + q * g_q + first * size, db + (q * L * C + first) * size
        da_row = da + (q * L * C + first) * size
        product = part + worker * wide * size
        sums = total + worker * wide * 8
        if not da_t:
            fill(sums, n, 0.0)
        for k in range(L):
            t = k if reverse else L - 1 - k
            to = db_row + t * C * size
            if da_t:
                product = da_row + t * da_t
            if flagged(flags, t):
                _back_cleared(to, g_row + t * g_t, carry, n, one)
                if da_t:
                    fill(product, n, one)
            else:
                before = h_row + (t + 1 if reverse else t - 1) * h_t
                if k == L - 1:
                    before = h0 + line if h0 else zeros
                a_at, g_at = a_row + t * a_t, g_row + t * g_t
                if pairs:
                    _back_pairs(product, to, a_at, before, g_at, carry, n, one)
                else:
                    _back(product, to, a_at, before, g_at, carry, n, one)
                if not da_t:
                    _collect(sums, product, n, one)
        if not da_t:
            _settle(da + line, sums, n, one)


class _Work:
    """How a scan is dealt out."""

    def __init__(self, x: Tensor, dtype: torch.dtype, cost: float) -> None:
        *batch, self.length, self.channels = x.shape
        self.batch = 1
        for n in batch:
            self.batch *= n
        self.pairs = dtype.is_complex
        self.dtype = dtype
        self.real = REAL.get(dtype, dtype)
        self.size = self.real.itemsize
        self.numbers = self.channels * (2 if self.pairs else 1)  # of a line
        most = max(1, self.numbers * self.size // LEAST)
        nanoseconds = x.numel() * dtype.itemsize * cost
        self.workers = pool.workers(self.batch * most, nanoseconds)
        # Lines are cut only as far as it takes to give every worker as much.
        self.blocks = 1
        if self.batch < 4 * self.workers:
            even = (n for n in range(1, most + 1) if self.batch * n % self.workers == 0)
            self.blocks = next(even, most)
        lanes = LEAST // 4 // self.size
        self.wide = -(-self.numbers // (self.blocks * lanes)) * lanes

    def rows(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Return what has to be kept alive, and its address and strides; 0 in time where 1 long."""
        steps = x.shape[-2]
        kept, (start, _, row, step) = rows(x, self.dtype, 1, self.batch, steps, self.channels)
        return kept, (start, row, step if steps == self.length else 0)

    def run(self, kernel: Any, *arguments: int, reverse: bool) -> None:
        """Call a kernel with its own arguments and those that all kernels here end with."""
        pool.run(
            kernel, self.workers, self.batch * self.blocks, *arguments, self.length, self.numbers,
            self.blocks, self.wide, self.pairs, reverse, self.size, ONES[self.real],
        )  # fmt: skip


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Leaf: all states h (..., L, S) and the last one (..., S), as `blocked.linear_scan`."""
    dtype = state_dtype(b.dtype)
    h = torch.empty(b.shape, dtype=dtype)
    last = torch.empty(b.shape[:-2] + b.shape[-1:], dtype=dtype)
    if h.numel() == 0:
        return h.to(b.dtype), last.zero_() if h0 is None else last.copy_(h0)
    work = _Work(b, dtype, FORWARD)
    start, flags = packed(h0, dtype), packed(reset, torch.bool)
    keep_a, by_a = work.rows(a)
    keep_b, by_b = work.rows(b)
    work.run(
        _forward, h.data_ptr(), last.data_ptr(), *by_a, *by_b, address(start), address(flags),
        reverse=reverse,
    )  # fmt: skip
    del keep_a, keep_b
    return h.to(b.dtype), last


def linear_scan_backward(
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    grad_h: Tensor,
    grad_last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: gradients (da, db, dh0), as `blocked.linear_scan_backward`."""
    dtype = state_dtype(h.dtype)
    da = torch.empty(a.shape, dtype=dtype)
    db = torch.empty(h.shape, dtype=dtype)
    dh0 = torch.empty(grad_last.shape, dtype=dtype)
    if db.numel() == 0:
        return da.zero_().to(a.dtype), db.to(h.dtype), dh0.copy_(grad_last)
    work = _Work(h, dtype, BACKWARD)
    start, flags, end = packed(h0, dtype), packed(reset, torch.bool), packed(grad_last, dtype)
    keep_a, by_a = work.rows(a)
    keep_h, by_h = work.rows(h)
    keep_g, by_g = work.rows(grad_h)
    varying = a.shape[-2] == work.length
    zeros = torch.zeros(work.wide, dtype=work.real)
    part = torch.empty(0 if varying else work.workers * work.wide, dtype=work.real)
    total = torch.empty(part.shape, dtype=torch.float64)
    work.run(
        _backward, da.data_ptr(), work.numbers * work.size if varying else 0, db.data_ptr(),
        dh0.data_ptr(), *by_a, *by_h, *by_g, address(start), address(end), address(flags),
        zeros.data_ptr(), part.data_ptr(), total.data_ptr(), reverse=reverse,
    )  # fmt: skip
    del keep_a, keep_h, keep_g
    return da.to(a.dtype), db.to(h.dtype), dh0


def warm() -> None:
    """Compile every kernel: float32 and float64, forward and backward."""
    for dtype in ONES:
        x = torch.ones(2, 1, dtype=dtype)
        linear_scan(x, x, None, None, False)
        linear_scan_backward(x, x, None, None, x, x[0], False)
