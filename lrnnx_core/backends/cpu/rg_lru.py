# SPDX-License-Identifier: MIT
# pyright: basic
"""The RG-LRU's gates and recurrence on the CPU, one pass over the samples forward and one backward.

A step's row of channels is worked on at once, in blocks of at most `BLOCK`; everything that a step
needs but the states is made again in the backward, of which the notes in
`lrnnx_core.backends.blocked_rg_lru` give the formulas. The decay and what is missing from it to 1
come of one exponential: 1 - a^2 = -e (2 + e) with e = a - 1.

What belongs to channels lies in rows of `BLOCK` numbers in the worker's scratch, at distances that
the compiler knows: it need not ask whether they overlap.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends.blocked_rg_lru import LEAST_ROOT, Arguments
from lrnnx_core.backends.cpu import mathematics, pool
from lrnnx_core.backends.cpu.compiling import inline, jit
from lrnnx_core.backends.cpu.mathematics import (
    _at_least,
    _at_most,
    _constant,
    _exp_tail,
    _highest,
    _lowest,
    _one,
    _reduced,
    sigmoid,
)
from lrnnx_core.backends.cpu.pointers import (
    ONES,
    address,
    at,
    copy,
    fill,
    flagged,
    packed,
    rows,
)
from lrnnx_core.backends.reference import state_dtype

_powers: Any = mathematics._powers
_select: Any = mathematics._select

BLOCK = 512
_least = _constant(LEAST_ROOT, LEAST_ROOT)
FLUSH = 64  # steps between additions to the sums in float64
DOUBLE = ONES[torch.float64]
# Rows of scratch: parameters, zeros, the coming cotangent, sums over steps, a term of the times'.
RATE, INPUT, RECURRENT, ZERO, COMING, D_RATE, D_INPUT, D_RECURRENT, D_TIME, ROWS = (
    BLOCK * i for i in range(10)
)


def rg_lru_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Leaf: see `lrnnx_core.backends.blocked_rg_lru.rg_lru_scan`."""
    p = _Problem(Arguments(*arguments), 2.5)
    x = p.given.x
    h = torch.empty(x.shape, dtype=p.dtype)
    last = torch.empty((*x.shape[:-2], p.W), dtype=p.dtype)
    if p.items:
        pool.run(_forward, p.workers, p.items, address(h), address(last), *p.arguments)
    return h if x.dtype is p.dtype else h.to(x.dtype), last


def rg_lru_scan_backward(
    h: Tensor, grad_h: Tensor, grad_last: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Leaf: the gradients, of shape (0,) where the input was None (h0's is always given)."""
    p = _Problem(Arguments(*arguments), 5.0)
    x, timesteps = p.given.x, p.given.timesteps
    dx, d_input, d_recurrent = (torch.empty(x.shape, dtype=p.dtype) for _ in range(3))
    dh0 = torch.empty((*x.shape[:-2], p.W), dtype=p.dtype)
    dtime = torch.zeros(p.blocks if timesteps is not None else 0, p.P * p.R, p.L, dtype=p.dtype)
    sums = torch.zeros(p.workers, p.P, 3, p.W, dtype=torch.float64)
    if p.items:
        states, cotangents = (rows(t, p.dtype, p.P, p.R, p.L, p.W) for t in (h, grad_h))
        to_last = packed(grad_last, p.dtype)
        pool.run(
            _backward, p.workers, p.items, address(dx), address(d_input), address(d_recurrent),
            address(dh0), address(dtime) if timesteps is not None else 0, address(sums), p.P,
            *states.layout, *cotangents.layout, address(to_last), *p.arguments,
        )  # fmt: skip
    total = sums.sum(0)

    def parameter(i: int, like: Tensor | None) -> Tensor:
        if like is None:
            return grad_last.new_empty(0)
        return torch.empty(like.shape, dtype=like.dtype).copy_(total[:, i].reshape(like.shape))

    return (
        dx.to(x.dtype),
        d_input.to(x.dtype),
        d_recurrent.to(x.dtype),
        parameter(0, p.given.rate),
        parameter(1, p.given.input_bias),
        parameter(2, p.given.recurrent_bias),
        dh0,
        grad_last.new_empty(0) if timesteps is None else dtime.sum(0).reshape(timesteps.shape),
    )


class _Problem:
    """The arguments that both kernels take, and how the work is divided."""

    def __init__(self, given: Arguments, nanoseconds: float) -> None:
        self.given, x = given, given.x
        batch, shared = x.shape[:-2], given.rate.ndim - 1
        self.P, self.R = math.prod(batch[:shared]), math.prod(batch[shared:])
        self.L, self.W = x.shape[-2:]
        self.dtype = dtype = state_dtype(x.dtype)
        self.one = ONES[dtype]
        count = self.P * self.R
        self.blocks = blocks = -(-self.W // BLOCK)
        self.workers = 1
        if count and self.W:
            work = nanoseconds * count * (self.L + 1) * self.W
            finest = max(blocks, self.W // 64)
            self.workers = workers = pool.workers(count * finest, work)
            if workers > 1 and count * blocks < 8 * workers and count * blocks % workers:
                step = workers // math.gcd(count, workers)
                self.blocks = min(-(-blocks // step) * step, finest)
        wide = -(-self.W // (16 * max(self.blocks, 1))) * 16
        self.items = count * self.blocks
        self.workers = max(1, min(self.workers, self.items))
        self.scratch = torch.empty(self.workers, ROWS, dtype=dtype)
        sequences = [rows(t, dtype, self.P, self.R, self.L, self.W) for t in given.sequences]
        others = [
            *(packed(t, dtype) for t in (*given.parameters, given.h0, given.timesteps)),
            packed(given.reset, torch.bool),
            packed(given.mask, torch.bool),
        ]
        self.held = (sequences, others)
        self.arguments: tuple[Any, ...] = (
            *sequences[0].layout, *sequences[1].layout, *sequences[2].layout,
            *(address(t) for t in others), address(self.scratch), self.R, self.L, self.W,
            self.blocks, wide, *given.choices, self.one.itemsize, self.one,
        )  # fmt: skip


@inline
def _decay(x):
    """Return e^x and e^x - 1."""
    r, t = _reduced(_at_least(_at_most(x, _highest(x)), _lowest(x)))
    first, second = _powers(t)
    p = r + r * r * _exp_tail(r)
    power = first * second
    return (_one(x) + p) * first * second, p * power + (power - _one(x))


@inline
def _gates(u, v, to_u, to_v):
    return sigmoid(u + to_u), sigmoid(v + to_v)


@inline
def _parameters(scratch, rate, input_bias, recurrent_bias, n, one):
    """Copy a block's parameters to scratch, zeros for None."""
    s = at(scratch, one)
    r, i, q = at(rate, one), at(input_bias, one), at(recurrent_bias, one)
    for c in range(BLOCK):
        s[c + ZERO] = 0
    for c in range(n):
        s[c + RATE] = r[c]
    for c in range(n):
        s[c + INPUT] = i[c] if input_bias else s[c + ZERO]
    for c in range(n):
        s[c + RECURRENT] = q[c] if recurrent_bias else s[c + ZERO]


@inline
def _step(h, before, x, u, v, scratch, tau, starts, state_only, n, one):
    """Write h = a before + m i x."""
    h, before, x, u, v = at(h, one), at(before, one), at(x, one), at(u, one), at(v, one)
    s = at(scratch, one)
    two = one + one
    if state_only:
        for c in range(n):
            i, r = _gates(u[c], v[c], s[c + INPUT], s[c + RECURRENT])
            untimed = -s[c + RATE] * r
            a, _ = _decay(untimed * tau)
            _, e = _decay(untimed)
            m = _select(starts, one, math.sqrt(-e * (two + e)))
            h[c] = a * before[c] + m * i * x[c]
    else:
        for c in range(n):
            i, r = _gates(u[c], v[c], s[c + INPUT], s[c + RECURRENT])
            a, e = _decay(-s[c + RATE] * r * tau)
            m = _select(starts, one, math.sqrt(-e * (two + e)))
            h[c] = a * before[c] + m * i * x[c]


@jit
def _forward(
    begin, end, worker, h, last, x, x_p, x_r, x_t, u, u_p, u_r, u_t, v, v_p, v_r, v_t, rate,
    input_bias, recurrent_bias, h0, timesteps, reset, mask, scratch, R, L, W, blocks, wide,
    state_only, start_rule, size, one,
):  # fmt: skip
    scratch += worker * ROWS * size
    zero = scratch + ZERO * size
    for item in range(begin, end):
        q, first = item // blocks, item % blocks * wide
        n = min(wide, W - first)
        if n <= 0:
            continue
        p, r = q // R, q % R
        own = (p * W + first) * size
        _parameters(
            scratch, rate + own, input_bias + own if input_bias else 0,
            recurrent_bias + own if recurrent_bias else 0, n, one,
        )  # fmt: skip
        xs = x + p * x_p + r * x_r + first * size
        us = u + p * u_p + r * u_r + first * size
        vs = v + p * v_p + r * v_r + first * size
        to = h + (q * L * W + first) * size
        resets = reset + q * L if reset else 0
        masks = mask + q * L if mask else 0
        times = at(timesteps + q * L * size, one)
        before = h0 + (q * W + first) * size if h0 else zero
        for t in range(L):
            opens = flagged(resets, t)
            if opens:
                before = zero
            if masks and not flagged(masks, t):
                copy(to, before, n, one)
            else:
                starts = start_rule and (opens or (t == 0 and h0 == 0))
                tau = times[t] if timesteps else one
                _step(
                    to, before, xs + t * x_t, us + t * u_t, vs + t * v_t, scratch, tau, starts,
                    state_only, n, one,
                )  # fmt: skip
            before = to
            to += W * size
        copy(last + (q * W + first) * size, before, n, one)


@inline
def _back(
    dx, du, dv, g, before, x, u, v, scratch, tau, opens, starts, state_only, n, one
):  # fmt: skip
    """Write a step's gradients and what comes to the step before it."""
    dx, du, dv, g = at(dx, one), at(du, one), at(dv, one), at(g, one)
    before, x, u, v, s = at(before, one), at(x, one), at(u, one), at(v, one), at(scratch, one)
    two, none = one + one, one - one
    least = _least(one)
    for c in range(n):
        i, r = _gates(u[c], v[c], s[c + INPUT], s[c + RECURRENT])
        rate = s[c + RATE]
        untimed = -rate * r
        a, e = _decay(untimed * tau)
        b, f = (a, e)
        if state_only:
            b, f = _decay(untimed)
        lam = g[c] + s[c + COMING]
        m = math.sqrt(-f * (two + f))
        slope = _select(starts, none, b * b / _select(m < least, least, m))
        m = _select(starts, one, m)
        moved = lam * x[c] * i
        through = lam * before[c] * a
        to_gain = -slope * moved
        if state_only:
            to_log = through * tau + to_gain
        else:
            through += to_gain
            to_log = through * tau
        by_r = to_log * untimed * (one - r)
        by_i = moved * m * (one - i)
        s[c + D_TIME] = through * untimed
        s[c + D_RATE] -= to_log * r
        s[c + D_INPUT] += by_i
        s[c + D_RECURRENT] += by_r
        s[c + COMING] = _select(opens, none, a * lam)
        dx[c] = lam * m * i
        du[c] = by_i
        dv[c] = by_r


@inline
def _pass_on(scratch, g, opens, n, one):
    """Padding: the cotangent goes to the step before as it is."""
    s, g = at(scratch, one), at(g, one)
    for c in range(n):
        s[c + COMING] = _select(opens, one - one, s[c + COMING] + g[c])


@inline
def _flush(sums, scratch, W, n, one):
    """Add the sums over steps to those in float64 (3, W) and clear them."""
    s, to = at(scratch, one), at(sums, DOUBLE)
    for k in range(3):
        for c in range(n):
            to[k * W + c] += s[c + D_RATE + k * BLOCK]
            s[c + D_RATE + k * BLOCK] = 0


@jit
def _backward(
    begin, end, worker, dx, du, dv, dh0, dtime, sums, P, h, h_p, h_r, h_t, g, g_p, g_r, g_t,
    to_last, x, x_p, x_r, x_t, u, u_p, u_r, u_t, v, v_p, v_r, v_t, rate, input_bias,
    recurrent_bias, h0, timesteps, reset, mask, scratch, R, L, W, blocks, wide, state_only,
    start_rule, size, one,
):  # fmt: skip
    scratch += worker * ROWS * size
    zero = scratch + ZERO * size
    for item in range(begin, end):
        q, block = item // blocks, item % blocks
        first = block * wide
        n = min(wide, W - first)
        if n <= 0:
            continue
        p, r = q // R, q % R
        own = (p * W + first) * size
        _parameters(
            scratch, rate + own, input_bias + own if input_bias else 0,
            recurrent_bias + own if recurrent_bias else 0, n, one,
        )  # fmt: skip
        hs = h + p * h_p + r * h_r + first * size
        gs = g + p * g_p + r * g_r + first * size
        xs = x + p * x_p + r * x_r + first * size
        us = u + p * u_p + r * u_r + first * size
        vs = v + p * v_p + r * v_r + first * size
        here = (q * L * W + first) * size
        resets = reset + q * L if reset else 0
        masks = mask + q * L if mask else 0
        times = at(timesteps + q * L * size, one)
        state = (q * W + first) * size
        total = sums + ((worker * P + p) * 3 * W + first) * 8
        s = at(scratch, one)
        for k in range(3):
            fill(scratch + (D_RATE + k * BLOCK) * size, n, one)
        copy(scratch + COMING * size, to_last + state, n, one)
        for t in range(L - 1, -1, -1):
            opens = flagged(resets, t)
            at_t = here + t * W * size
            if masks and not flagged(masks, t):
                fill(dx + at_t, n, one)
                fill(du + at_t, n, one)
                fill(dv + at_t, n, one)
                _pass_on(scratch, gs + t * g_t, opens, n, one)
                continue
            before = zero
            if t > 0:
                before = hs + (t - 1) * h_t
            elif h0:
                before = h0 + state
            if opens:
                before = zero
            starts = start_rule and (opens or (t == 0 and h0 == 0))
            tau = times[t] if timesteps else one
            _back(
                dx + at_t, du + at_t, dv + at_t, gs + t * g_t, before, xs + t * x_t, us + t * u_t,
                vs + t * v_t, scratch, tau, opens, starts, state_only, n, one,
            )  # fmt: skip
            if dtime:
                by_time = one - one
                for c in range(n):
                    by_time += s[c + D_TIME]
                at(dtime + ((block * P * R + q) * L + t) * size, one)[0] = by_time
            if t % FLUSH == 0:
                _flush(total, scratch, W, n, one)
        _flush(total, scratch, W, n, one)
        copy(dh0 + state, scratch + COMING * size, n, one)


def warm() -> None:
    """Compile the kernels, or load them from disk."""
    for dtype in ONES:
        x, rate = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
        given = (x, x, x, rate, None, None, None, None, None, None, False, False)
        h, last = rg_lru_scan(*given)
        rg_lru_scan_backward(h, x, last, *given)
