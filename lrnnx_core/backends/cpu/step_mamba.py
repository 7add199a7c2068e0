# SPDX-License-Identifier: MIT
# pyright: basic
"""One step of a Mamba block between its projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.mathematics import exp, phi1, silu, softplus
from lrnnx_core.backends.cpu.step_memory import (
    LIKE,
    SCHEMES,
    address,
    at,
    convolve,
    dot,
    optional,
    peek,
    put,
    ready,
    small_batch,
    take,
)

BLOCK = 16  # states of a loop of known length, which becomes a few vector instructions
NORM_EPS = 1e-6


def mamba_step(
    xz: Tensor,
    conv: Tensor,
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    decay_dt: Tensor | None,
    timesteps: Tensor | None,
    dt_norm: Tensor | None,
    B_norm: Tensor | None,
    C_norm: Tensor | None,
    dt_scale: float,
    normalized: bool,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.mamba_step`."""
    kind = xz.dtype
    dtype = A.dtype
    xz, conv, h, A = ready(xz, dtype), ready(conv, dtype), ready(h, dtype), ready(A, dtype)
    conv_weight, x_proj, dt_proj = (
        ready(conv_weight, dtype), ready(x_proj, dtype), ready(dt_proj, dtype),
    )  # fmt: skip
    dt_bias, D = ready(dt_bias, dtype), ready(D, dtype)
    conv_bias, decay_dt, timesteps = (
        optional(conv_bias, dtype), optional(decay_dt, dtype), optional(timesteps, dtype),
    )  # fmt: skip
    norms = [optional(t, dtype) for t in (dt_norm, B_norm, C_norm)]
    (width, states), rank, taps = A.shape, dt_proj.shape[1], conv_weight.shape[2]
    parts = rank + 2 * states
    batch = xz.numel() // (2 * width)
    y = xz.new_empty((*xz.shape[:-1], width))
    new, tail = h.new_empty(h.shape), conv.new_empty(conv.shape)
    # v, delta (batch, E) and what x_proj gives (batch, R + 2 N)
    memory = xz.new_empty(batch * (2 * width + parts))
    v_at, size = memory.data_ptr(), batch * dtype.itemsize
    arguments = (
        LIKE[dtype], width, states, rank, taps, xz.data_ptr(), conv.data_ptr(), h.data_ptr(),
        conv_weight.data_ptr(), address(conv_bias), x_proj.data_ptr(), dt_proj.data_ptr(),
        dt_bias.data_ptr(), A.data_ptr(), D.data_ptr(), address(decay_dt), address(timesteps),
        address(norms[0]), address(norms[1]), address(norms[2]), dt_scale, normalized, state_only,
        SCHEMES[scheme], y.data_ptr(), new.data_ptr(), tail.data_ptr(), v_at,
        v_at + size * width, v_at + 2 * size * width,
    )  # fmt: skip
    cost = 0.5 * width * (taps + 2 * states) + 0.1 * width * (parts + rank)
    workers = pool.workers(batch, cost * batch)
    if workers == 1 and small_batch(batch, width * (parts + rank)):
        _step(0, batch, 0, 0, *arguments)
    elif small_batch(batch, width * (parts + rank)):
        pool.run(_step, workers, batch, 0, *arguments)
    else:  # two matrix products between three parts of the kernel
        v, delta, mixed = memory.split([batch * width, batch * width, batch * parts])
        v, delta, mixed = v.view(batch, width), delta.view(batch, width), mixed.view(batch, parts)
        pool.run(_step, workers, batch, 1, *arguments)
        torch.mm(v, x_proj.mT, out=mixed)
        pool.run(_step, workers, batch, 2, *arguments)
        torch.mm(mixed[:, :rank], dt_proj.mT, out=delta)
        pool.run(_step, workers, batch, 3, *arguments)
    if kind is not dtype:
        y, tail = y.to(kind), tail.to(kind)
    return y, tail, new


@jit
def _normalize(mixed, begin, end, stride, offset, size, weight, like):
    """Divide parts of rows by their root mean square, in place."""
    one = like.dtype.type(1)
    for b in range(begin, end):
        x, total = at(mixed, b * stride + offset, like), like.dtype.type(0)
        for i in range(size):
            total += peek(x, i) * peek(x, i)
        factor = one / like.dtype.type(math.sqrt(total / size + NORM_EPS))
        for i in range(size):
            value = factor * peek(x, i)
            put(x, i, value if weight == 0 else value * take(at(weight, 0, like), i))


@jit
def _step(
    begin, end, worker, phase, like, width, states, rank, taps, xz, conv, h, conv_weight,
    conv_bias, x_proj, dt_proj, dt_bias, A, D, decay_dt, timesteps, dt_norm, B_norm, C_norm,
    dt_scale, normalized, state_only, scheme, y, new, tail, v, delta, mixed,
):  # fmt: skip
    """Run all phases (0), or the convolution (1), the norms (2), the recurrence (3) alone."""
    zero, one, half = like.dtype.type(0), like.dtype.type(1), like.dtype.type(0.5)
    scale, parts = like.dtype.type(dt_scale), rank + 2 * states
    if phase <= 1:
        for b in range(begin, end):
            out = at(v, b * width, like)
            convolve(
                out, at(xz, 2 * b * width, like), at(conv, b * (taps - 1) * width, like),
                at(tail, b * (taps - 1) * width, like), conv_weight, conv_bias, width, taps, like,
            )  # fmt: skip
            for e in range(width):
                put(out, e, silu(peek(out, e)))
    if phase == 0:
        for r in range(parts):
            weight = at(x_proj, r * width, like)
            for b in range(begin, end):
                found = dot(weight, at(v, b * width, like), width, zero)
                put(at(mixed, b * parts, like), r, found)
    if phase in (0, 2) and normalized:
        _normalize(mixed, begin, end, parts, 0, rank, dt_norm, like)
        _normalize(mixed, begin, end, parts, rank, states, B_norm, like)
        _normalize(mixed, begin, end, parts, rank + states, states, C_norm, like)
    if phase == 0:
        for b in range(begin, end):
            low, out = at(mixed, b * parts, like), at(delta, b * width, like)
            for e in range(width):
                put(out, e, dot(at(dt_proj, e * rank, like), low, rank, zero))
    if phase == 1 or phase == 2:
        return
    for b in range(begin, end):
        step, bias = at(delta, b * width, like), at(dt_bias, 0, like)
        for e in range(width):
            put(step, e, scale * softplus(peek(step, e) + take(bias, e)))
        elapsed, through = one, one
        if timesteps != 0:
            elapsed = take(at(timesteps, b, like), 0)
            through = one if state_only else elapsed
        B, C = at(mixed, b * parts + rank, like), at(mixed, b * parts + rank + states, like)
        x, out = at(v, b * width, like), at(y, b * width, like)
        for e in range(width):
            start = (b * width + e) * states
            before, after = at(h, start, like), at(new, start, like)
            rates, value = at(A, e * states, like), peek(x, e)
            d = peek(step, e)
            fade = elapsed * (d if decay_dt == 0 else take(at(decay_dt, e, like), 0))
            d = through * d
            read = zero
            if scheme <= 1:
                drive = value if scheme == 1 else d * value
                for block in range(states // BLOCK):
                    for k in range(BLOCK):
                        n = block * BLOCK + k
                        s = exp(fade * take(rates, n)) * take(before, n) + drive * peek(B, n)
                        put(after, n, s)
                        read += s * peek(C, n)
                for n in range(states - states % BLOCK, states):
                    s = exp(fade * take(rates, n)) * take(before, n) + drive * peek(B, n)
                    put(after, n, s)
                    read += s * peek(C, n)
            elif scheme == 2:
                drive = d * value
                for n in range(states):
                    a, gain = exp(fade * take(rates, n)), phi1(d * take(rates, n))
                    s = a * take(before, n) + gain * drive * peek(B, n)
                    put(after, n, s)
                    read += s * peek(C, n)
            else:
                drive = d * value
                for n in range(states):
                    turn, gain = half * fade * take(rates, n), one - half * d * take(rates, n)
                    s = (one + turn) / (one - turn) * take(before, n) + drive * peek(B, n) / gain
                    put(after, n, s)
                    read += s * peek(C, n)
            put(out, e, read)
        direct, gate = at(D, 0, like), at(xz, (2 * b + 1) * width, like)
        for e in range(width):
            put(out, e, (peek(out, e) + take(direct, e) * peek(x, e)) * silu(take(gate, e)))


def warm() -> None:
    """Compile the kernels."""
    for dtype in LIKE:
        t = lambda *shape: torch.zeros(shape, dtype=dtype)  # noqa: E731, B023
        mamba_step(
            t(2, 8), t(2, 3, 4), t(2, 4, 2), t(4, 1, 4), None, t(5, 4), t(4, 1), t(4), t(4, 2),
            t(4), None, None, None, None, None, 1.0, False, False, "mamba",
        )  # fmt: skip
