# SPDX-License-Identifier: MIT
# pyright: basic
"""One step of a Mamba-2 block between its projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.mathematics import exp, silu, softplus
from lrnnx_core.backends.cpu.step_memory import (
    LIKE,
    address,
    at,
    convolve,
    optional,
    peek,
    put,
    ready,
    take,
)

BLOCK = 16  # states of a loop of known length, which becomes a few vector instructions
NORM_EPS = 1e-5


def ssd_step(
    parts: Tensor,
    conv: Tensor,
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    timesteps: Tensor | None,
    n_groups: int,
    low: float,
    high: float,
    dt_scale: float,
    state_only: bool,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.ssd_step`."""
    kind, dtype = parts.dtype, A.dtype
    parts, conv, h, conv_weight, dt_bias, A, D = (
        ready(t, dtype) for t in (parts, conv, h, conv_weight, dt_bias, A, D)
    )
    conv_bias, norm_weight, timesteps = (
        optional(conv_bias, dtype), optional(norm_weight, dtype), optional(timesteps, dtype),
    )  # fmt: skip
    (heads, size, states), (mixed, _, taps) = h.shape[-3:], conv_weight.shape
    width = heads * size
    row = width + mixed + heads
    batch = parts.numel() // row
    y = parts.new_empty((*parts.shape[:-1], width))
    new, tail, v = h.new_empty(h.shape), conv.new_empty(conv.shape), parts.new_empty(batch * mixed)
    cost = batch * (0.2 * width * states + 2.0 * mixed)
    pool.run(
        _step, pool.workers(batch, cost), batch, LIKE[dtype], heads, size, states, n_groups, mixed,
        taps, parts.data_ptr(), conv.data_ptr(), h.data_ptr(), conv_weight.data_ptr(),
        address(conv_bias), dt_bias.data_ptr(), A.data_ptr(), D.data_ptr(), address(norm_weight),
        address(timesteps), low, high, dt_scale, state_only, norm_before_gate, y.data_ptr(),
        new.data_ptr(), tail.data_ptr(), v.data_ptr(),
    )  # fmt: skip
    return y.to(kind), tail.to(kind), new


def warm() -> None:
    """Compile the kernels."""
    for dtype in LIKE:
        t = lambda *shape: torch.zeros(shape, dtype=dtype)  # noqa: E731, B023
        ssd_step(
            t(1, 9), t(1, 1, 6), t(1, 1, 2, 2), t(6, 1, 2), None, t(1), t(1), t(1), None, None, 1,
            0.0, math.inf, 1.0, False, False,
        )  # fmt: skip


@jit
def _step(
    begin, end, worker, like, heads, size, states, groups, mixed, taps, parts, conv, h,
    conv_weight, conv_bias, dt_bias, A, D, norm_weight, timesteps, low, high, dt_scale, state_only,
    norm_before_gate, y, new, tail, scratch,
):  # fmt: skip
    zero, one, width = like.dtype.type(0), like.dtype.type(1), heads * size
    least, most = like.dtype.type(low), like.dtype.type(high)
    scale, row = like.dtype.type(dt_scale), width + mixed + heads
    for b in range(begin, end):
        gate, past = at(parts, b * row, like), b * (taps - 1) * mixed
        v, out = at(scratch, b * mixed, like), at(y, b * width, like)
        convolve(
            v, at(parts, b * row + width, like), at(conv, past, like), at(tail, past, like),
            conv_weight, conv_bias, mixed, taps, like,
        )  # fmt: skip
        for e in range(mixed):
            put(v, e, silu(peek(v, e)))
        elapsed = one
        if timesteps != 0:
            elapsed = take(at(timesteps, b, like), 0)
        through = one if state_only else elapsed
        for head in range(heads):
            raw = take(at(parts, b * row + width + mixed, like), head)
            delta = softplus(raw + take(at(dt_bias, 0, like), head))
            delta = least if delta < least else delta
            delta = scale * (most if delta > most else delta)
            decay = exp(elapsed * delta * take(at(A, 0, like), head))
            delta = through * delta
            direct, group = take(at(D, 0, like), head), head // (heads // groups)
            B = at(scratch, b * mixed + width + group * states, like)
            C = at(scratch, b * mixed + width + (groups + group) * states, like)
            for p in range(size):
                start = ((b * heads + head) * size + p) * states
                before, after = at(h, start, like), at(new, start, like)
                x = peek(v, head * size + p)
                drive, read = delta * x, zero
                for block in range(states // BLOCK):
                    for k in range(BLOCK):
                        n = block * BLOCK + k
                        s = decay * take(before, n) + drive * peek(B, n)
                        put(after, n, s)
                        read += s * peek(C, n)
                for n in range(states - states % BLOCK, states):
                    s = decay * take(before, n) + drive * peek(B, n)
                    put(after, n, s)
                    read += s * peek(C, n)
                put(out, head * size + p, read + direct * x)
        if norm_weight == 0 or not norm_before_gate:
            for e in range(width):
                put(out, e, peek(out, e) * silu(take(gate, e)))
        if norm_weight != 0:
            each = width // groups
            for group in range(groups):
                part, total = at(y, b * width + group * each, like), zero
                weight = at(norm_weight, group * each, like)
                for e in range(each):
                    total += peek(part, e) * peek(part, e)
                factor = one / like.dtype.type(math.sqrt(total / each + NORM_EPS))
                for e in range(each):
                    put(part, e, factor * peek(part, e) * take(weight, e))
            if norm_before_gate:
                for e in range(width):
                    put(out, e, peek(out, e) * silu(take(gate, e)))
