# SPDX-License-Identifier: MIT
# pyright: basic
"""One step of a Griffin block (RG-LRU) between its projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.mathematics import exp, expm1, sigmoid
from lrnnx_core.backends.cpu.step_memory import (
    LIKE,
    address,
    at,
    convolve,
    optional,
    peek,
    put,
    ready,
    small_batch,
    take,
)

TANH_SCALE = 2 * math.sqrt(2 / math.pi)  # gelu(x) is nearly x sigmoid(scale (x + 0.044715 x^3))


def griffin_step(
    x: Tensor,
    gate: Tensor,
    conv: Tensor,
    h: Tensor,
    started: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    input_weight: Tensor,
    input_bias: Tensor,
    recurrent_weight: Tensor,
    recurrent_bias: Tensor,
    rate: Tensor,
    timesteps: Tensor | None,
    state_only: bool,
    start_rule: bool,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.griffin_step`."""
    kind, dtype = x.dtype, rate.dtype
    x, gate, conv, h, rate, conv_weight, input_weight, recurrent_weight = (
        ready(t, dtype)
        for t in (x, gate, conv, h, rate, conv_weight, input_weight, recurrent_weight)
    )
    input_bias, recurrent_bias = ready(input_bias, dtype), ready(recurrent_bias, dtype)
    conv_bias, timesteps = optional(conv_bias, dtype), optional(timesteps, dtype)
    started = started.contiguous()
    width, taps, (heads, block, _) = rate.shape[0], conv_weight.shape[2], input_weight.shape
    batch = x.numel() // width
    y, new, tail = x.new_empty(x.shape), h.new_empty(h.shape), conv.new_empty(conv.shape)
    v, i, r = (x.new_empty((batch, width)) for _ in range(3))
    arguments = (
        LIKE[dtype], width, taps, heads, block, x.data_ptr(), gate.data_ptr(), conv.data_ptr(),
        h.data_ptr(), started.view(torch.uint8).view(-1).numpy(), conv_weight.data_ptr(),
        address(conv_bias), input_weight.data_ptr(), input_bias.data_ptr(),
        recurrent_weight.data_ptr(), recurrent_bias.data_ptr(), rate.data_ptr(),
        address(timesteps), state_only, start_rule, tanh, y.data_ptr(), new.data_ptr(),
        tail.data_ptr(), v.data_ptr(), i.data_ptr(), r.data_ptr(),
    )  # fmt: skip
    products = 2 * width * block
    cost = 0.1 * products + width * (taps + (8 if tanh else 20))
    workers = pool.workers(batch, cost * batch)
    if small_batch(batch, products):
        pool.run(_step, workers, batch, 0, *arguments)
    else:  # a matrix product a gate between two parts of the kernel
        pool.run(_step, workers, batch, 1, *arguments)
        blocks = v.view(batch, heads, block).transpose(0, 1)
        for out, weight in ((i, input_weight), (r, recurrent_weight)):
            out.view(batch, heads, block).copy_(torch.bmm(blocks, weight).transpose(0, 1))
        pool.run(_step, workers, batch, 2, *arguments)
    return y.to(kind), tail.to(kind), new, torch.ones_like(started)


def warm() -> None:
    """Compile the kernels."""
    for dtype in LIKE:
        t = lambda *shape: torch.zeros(shape, dtype=dtype)  # noqa: E731, B023
        griffin_step(
            t(1, 4), t(1, 4), t(1, 1, 4), t(1, 4), torch.zeros(1, dtype=torch.bool), t(4, 1, 2),
            None, t(2, 2, 2), t(4), t(2, 2, 2), t(4), t(4), None, False, True, True,
        )  # fmt: skip


@jit
def _step(
    begin, end, worker, phase, like, width, taps, heads, block, x, gate, conv, h, started,
    conv_weight, conv_bias, input_weight, input_bias, recurrent_weight, recurrent_bias, rate,
    timesteps, state_only, start_rule, tanh, y, new, tail, v, i_raw, r_raw,
):  # fmt: skip
    """Run all phases (0), or the convolution (1), the recurrence (2) alone."""
    one, two, half = like.dtype.type(1), like.dtype.type(2), like.dtype.type(0.5)
    cubic, scale = like.dtype.type(0.044715), like.dtype.type(TANH_SCALE)
    spread, zero = like.dtype.type(math.sqrt(0.5)), like.dtype.type(0)
    if phase <= 1:
        for b in range(begin, end):
            past = b * (taps - 1) * width
            convolve(
                at(v, b * width, like), at(x, b * width, like), at(conv, past, like),
                at(tail, past, like), conv_weight, conv_bias, width, taps, like,
            )  # fmt: skip
    if phase == 0:
        for b in range(begin, end):
            for head in range(heads):
                seen = at(v, b * width + head * block, like)
                to_i = at(i_raw, b * width + head * block, like)
                to_r = at(r_raw, b * width + head * block, like)
                for j in range(block):
                    put(to_i, j, zero)
                    put(to_r, j, zero)
                for k in range(block):
                    value = peek(seen, k)
                    w_i = at(input_weight, (head * block + k) * block, like)
                    w_r = at(recurrent_weight, (head * block + k) * block, like)
                    for j in range(block):
                        put(to_i, j, peek(to_i, j) + value * take(w_i, j))
                    for j in range(block):
                        put(to_r, j, peek(to_r, j) + value * take(w_r, j))
    if phase == 1:
        return
    for b in range(begin, end):
        i, r, seen = at(i_raw, b * width, like), at(r_raw, b * width, like), at(v, b * width, like)
        before, after = at(h, b * width, like), at(new, b * width, like)
        bias_i, bias_r = at(input_bias, 0, like), at(recurrent_bias, 0, like)
        rates, opening, out = at(rate, 0, like), at(gate, b * width, like), at(y, b * width, like)
        elapsed = one
        if timesteps != 0:
            elapsed = take(at(timesteps, b, like), 0)
        outside = one if state_only else elapsed
        fresh = start_rule and started[b] == 0
        keep = zero if fresh else one
        for e in range(width):
            log_a = -take(rates, e) * sigmoid(peek(r, e) + take(bias_r, e))
            root = math.sqrt(-expm1(two * outside * log_a))
            root = one if fresh else root
            drive = sigmoid(peek(i, e) + take(bias_i, e)) * peek(seen, e)
            memory = zero if fresh else take(before, e)
            put(after, e, keep * exp(elapsed * log_a) * memory + root * drive)
        if tanh:
            for e in range(width):
                g = take(opening, e)
                g = g * sigmoid(scale * (g + cubic * g * g * g))
                put(out, e, g * peek(after, e))
        else:
            for e in range(width):
                g = take(opening, e)
                put(out, e, half * g * (one + math.erf(g * spread)) * peek(after, e))
