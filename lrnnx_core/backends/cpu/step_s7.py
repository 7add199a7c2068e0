# SPDX-License-Identifier: MIT
# pyright: basic
"""One step of S7 with every matrix made from the input, after the product that makes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.step_memory import LIKE, at, peek, put, ready, take


def s7_step(v: Tensor, h: Tensor, weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.s7_step`."""
    dtype = base.dtype
    v, h, base = ready(v, dtype), ready(h, dtype), ready(base, dtype)
    made = ready(linear(v, ready(weight, dtype)), dtype)
    width, states = v.shape[-1], base.shape[0]
    batch = v.numel() // width
    y, new = v.new_empty(v.shape), h.new_empty(h.shape)
    cost = 0.2 * width * states * batch
    pool.run(
        _step, pool.workers(batch, cost), batch, LIKE[dtype], width, states, v.data_ptr(),
        h.data_ptr(), made.data_ptr(), base.data_ptr(), y.data_ptr(), new.data_ptr(),
    )  # fmt: skip
    return y, new


def warm() -> None:
    """Compile the kernels."""
    for dtype in LIKE:
        zeros = [torch.zeros(s, dtype=dtype) for s in ((1, 2), (1, 2), (14, 2), (2,))]
        s7_step(*zeros)


@jit
def _step(begin, end, worker, like, width, states, v, h, made, base, y, new):
    one, half, zero = like.dtype.type(1), like.dtype.type(0.5), like.dtype.type(0)
    rows = 2 * states + 2 * width * states + width
    for b in range(begin, end):
        x, a = at(v, b * width, like), at(made, b * rows, like)
        B = at(made, b * rows + states, like)
        C = at(made, b * rows + states + width * states, like)
        d = at(made, b * rows + states + 2 * width * states, like)
        beta = at(made, b * rows + states + 2 * width * states + width, like)
        before, after, start = at(h, b * states, like), at(new, b * states, like), at(base, 0, like)
        for n in range(states):
            raw = take(a, n) + take(start, n)
            decay = one - one / (raw * raw + half)
            put(after, n, decay * take(before, n) + take(beta, n))
        for i in range(width):
            value = take(x, i)
            for n in range(states):
                put(after, n, peek(after, n) + take(B, i * states + n) * value)
        out = at(y, b * width, like)
        for i in range(width):
            read = zero
            for n in range(states):
                read += take(C, i * states + n) * peek(after, n)
            put(out, i, read + take(d, i) * take(x, i))
