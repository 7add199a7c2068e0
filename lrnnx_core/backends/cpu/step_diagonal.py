# SPDX-License-Identifier: MIT
# pyright: basic
"""One step of a diagonal state that all channels share (S5, LRU and their kin)."""

from __future__ import annotations

import torch
from torch import Tensor

from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.mathematics import exp, expm1, sincos
from lrnnx_core.backends.cpu.step_memory import (
    LIKE,
    PARTS,
    SCHEMES,
    address,
    at,
    dot,
    dot_read,
    optional,
    put,
    ready,
    take,
)


def diagonal_step(
    u: Tensor,
    state: Tensor,
    a: Tensor,
    gain: Tensor | None,
    B: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.diagonal_step`."""
    wide = a.dtype
    dtype = PARTS[wide]
    if a.ndim > 1:
        a = a.expand(state.shape)
    if gain is not None and gain.ndim > 1:
        gain = gain.expand(state.shape)
    x, h, a, B = ready(u, dtype), ready(state, wide), ready(a, wide), ready(B, wide)
    gain = None if gain is None else ready(gain, wide)
    C_re, C_im, D = ready(C_re, dtype), ready(C_im, dtype), ready(D, dtype)
    states, width, outputs = B.shape[0], B.shape[1], C_re.shape[0]
    batch = x.numel() // width
    y = x.new_empty((*u.shape[:-1], outputs))
    new, halves = h.new_empty(h.shape), x.new_empty(2 * batch * states)
    cost = 0.15 * states * (2 * width + 2 * outputs)
    pool.run(
        _diagonal, pool.workers(batch, cost * batch), batch, LIKE[dtype], width, states, outputs,
        x.data_ptr(), h.data_ptr(), a.data_ptr(), a.ndim > 1,
        0 if gain is None else gain.data_ptr(), gain is not None and gain.ndim > 1, B.data_ptr(),
        C_re.data_ptr(), C_im.data_ptr(), D.data_ptr(), D.ndim > 1, scale, y.data_ptr(),
        new.data_ptr(), halves.data_ptr(),
    )  # fmt: skip
    return y.to(u.dtype), new


def flow_step(
    u: Tensor,
    state: Tensor,
    A: Tensor,
    dt: Tensor,
    timesteps: Tensor | None,
    B: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    scale: float,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor]:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.flow_step`."""
    wide = A.dtype
    dtype = PARTS[wide]
    A, dt, elapsed = ready(A, wide), ready(dt, dtype), optional(timesteps, dtype)
    states = A.shape[0]
    shape = state.shape if elapsed is not None or dt.ndim > 1 else A.shape
    a, gain = A.new_empty(shape), A.new_empty(shape)
    rows = a.numel() // states
    pool.run(
        _discretize, pool.workers(rows, 8.0 * a.numel()), rows, LIKE[dtype], states, A.data_ptr(),
        dt.data_ptr(), dt.ndim > 1, address(elapsed), state_only, SCHEMES[scheme], a.data_ptr(),
        gain.data_ptr(),
    )  # fmt: skip
    return diagonal_step(u, state, a, gain, B, C_re, C_im, D, scale)


def warm() -> None:
    """Compile the kernels."""
    for wide, dtype in PARTS.items():
        zeros = [torch.zeros(s, dtype=dtype) for s in ((1, 2), (2,), (2, 2))]
        A, state, B = (torch.zeros(s, dtype=wide) for s in ((2,), (1, 2), (2, 2)))
        u, d, C = zeros
        flow_step(u, state, A, d, None, B, C, C, d, 1.0, False, "zoh")


@jit
def _discretize(
    begin, end, worker, like, states, A, dt, dt_varies, timesteps, state_only, scheme, a, gain
):
    zero, one, half = like.dtype.type(0), like.dtype.type(1), like.dtype.type(0.5)
    least = like.dtype.type(1e-30)
    rates = at(A, 0, like)
    for b in range(begin, end):
        steps = at(dt, b * states if dt_varies else 0, like)
        elapsed = one
        if timesteps != 0:
            elapsed = take(at(timesteps, b, like), 0)
        through = one if state_only else elapsed
        decay, drive = at(a, 2 * b * states, like), at(gain, 2 * b * states, like)
        if scheme == 3:
            for p in range(states):
                d = take(steps, p)
                A_re, A_im = half * take(rates, 2 * p), half * take(rates, 2 * p + 1)
                z_re, z_im = elapsed * d * A_re, elapsed * d * A_im
                size = (one - z_re) * (one - z_re) + z_im * z_im
                # (1 + z) conj(1 - z) / |1 - z|^2
                put(decay, 2 * p, ((one + z_re) * (one - z_re) - z_im * z_im) / size)
                put(decay, 2 * p + 1, (z_im + z_im) / size)
                z_re, z_im = through * d * A_re, through * d * A_im
                size = (one - z_re) * (one - z_re) + z_im * z_im
                put(drive, 2 * p, through * d * (one - z_re) / size)
                put(drive, 2 * p + 1, through * d * z_im / size)
        else:
            for p in range(states):
                d = take(steps, p)
                e = exp(elapsed * d * take(rates, 2 * p))
                s, c = sincos(elapsed * d * take(rates, 2 * p + 1))
                put(decay, 2 * p, e * c)
                put(decay, 2 * p + 1, e * s)
            if scheme == 2:
                for p in range(states):
                    d = through * take(steps, p)
                    z_re, z_im = d * take(rates, 2 * p), d * take(rates, 2 * p + 1)
                    grown = expm1(z_re)
                    s, c = sincos(z_im)
                    turn, _ = sincos(half * z_im)
                    # e^z - 1, where nothing cancels, over z
                    re, im = grown * c - (turn + turn) * turn, (one + grown) * s
                    size = z_re * z_re + z_im * z_im
                    near = size < least
                    size = one if near else size
                    put(drive, 2 * p, d * (one if near else (re * z_re + im * z_im) / size))
                    put(drive, 2 * p + 1, d * (zero if near else (im * z_re - re * z_im) / size))
            else:
                for p in range(states):
                    put(drive, 2 * p, one if scheme == 1 else through * take(steps, p))
                    put(drive, 2 * p + 1, zero)


@jit
def _diagonal(
    begin, end, worker, like, width, states, outputs, u, h, a, a_varies, gain, gain_varies, B,
    C_re, C_im, D, dense, scale, y, new, halves,
):  # fmt: skip
    zero = like.dtype.type(0)
    for p in range(states):
        weights = at(B, 2 * p * width, like)
        for b in range(begin, end):
            x, re, im = at(u, b * width, like), zero, zero
            for j in range(width):
                re += take(weights, 2 * j) * take(x, j)
                im += take(weights, 2 * j + 1) * take(x, j)
            if gain != 0:
                g = at(gain, 2 * (p + b * states * gain_varies), like)
                g_re, g_im = take(g, 0), take(g, 1)
                re, im = re * g_re - im * g_im, re * g_im + im * g_re
            decay = at(a, 2 * (p + b * states * a_varies), like)
            before, after = at(h, 2 * (b * states + p), like), at(new, 2 * (b * states + p), like)
            re += take(decay, 0) * take(before, 0) - take(decay, 1) * take(before, 1)
            im += take(decay, 0) * take(before, 1) + take(decay, 1) * take(before, 0)
            put(after, 0, re)
            put(after, 1, im)
            put(at(halves, 2 * b * states, like), p, re)
            put(at(halves, (2 * b + 1) * states, like), p, im)
    factor = like.dtype.type(scale)
    for o in range(outputs):
        c_re, c_im = at(C_re, o * states, like), at(C_im, o * states, like)
        for b in range(begin, end):
            read = dot(c_re, at(halves, 2 * b * states, like), states, zero)
            read -= dot(c_im, at(halves, (2 * b + 1) * states, like), states, zero)
            x = at(u, b * width, like)
            if dense:
                through = dot_read(at(D, o * width, like), x, width, zero)
            else:
                through = take(at(D, o, like), 0) * take(x, o)
            put(at(y, b * outputs + o, like), 0, factor * read + through)
