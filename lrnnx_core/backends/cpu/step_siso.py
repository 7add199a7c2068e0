# SPDX-License-Identifier: MIT
# pyright: basic
"""One step of a diagonal state for each channel, with a low-rank part or without (S4D, S4)."""

from __future__ import annotations

import torch
from torch import Tensor

from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.step_memory import (
    LIKE,
    PARTS,
    at,
    dot,
    peek,
    put,
    ready,
    take,
)

BLOCK = 16  # states of a loop of known length, which becomes a few vector instructions


def siso_step(
    u: Tensor,
    state: Tensor,
    a: Tensor,
    B: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    C_re: Tensor,
    C_im: Tensor | None,
    D: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.siso_step`."""
    wide = a.dtype
    dtype = PARTS.get(wide, wide)
    if a.ndim > 2:
        a = a.expand(state.shape)
    if B.ndim > 2:
        B = B.expand(state.shape)
    x, h, a, B, C_re = (
        ready(u, dtype), ready(state, wide), ready(a, wide), ready(B, wide), ready(C_re, dtype),
    )  # fmt: skip
    if wide is not dtype:
        C_im = C_re.new_zeros(C_re.shape) if C_im is None else ready(C_im, dtype)
    D = None if D is None else ready(D, dtype)
    width, states = a.shape[-2:]
    channels = C_re.shape[0] if C_re.ndim > 2 else 1
    rank, low, high = 0, 0, 0
    if U is not None and V is not None:
        if U.ndim > 3:
            shape = (*state.shape[:-2], *U.shape[-3:])
            U, V = U.expand(shape), V.expand(shape)
        U, V = ready(U, wide), ready(V, wide)
        rank, low, high = U.shape[-3], U.data_ptr(), V.data_ptr()
    y = x.new_empty((*u.shape[:-1], channels * width))
    new = h.new_empty(h.shape)
    rows, cost = x.numel(), 0.5 * states * (2 + channels + 2 * rank)
    pool.run(
        _complex if wide is not dtype else _real, pool.workers(rows, cost * rows), rows,
        LIKE[dtype], width, states, channels, rank, x.data_ptr(), h.data_ptr(),
        a.data_ptr(), a.ndim > 2, B.data_ptr(), B.ndim > 2, low, high,
        U is not None and U.ndim > 3, C_re.data_ptr(), 0 if C_im is None else C_im.data_ptr(),
        0 if D is None else D.data_ptr(), scale, y.data_ptr(), new.data_ptr(),
    )  # fmt: skip
    return y.to(u.dtype), new


def warm() -> None:
    """Compile the kernels."""
    for wide, dtype in PARTS.items():
        zeros = torch.zeros(1, 2, dtype=dtype)
        for kind in (wide, dtype):
            state, a = torch.zeros(1, 2, 2, dtype=kind), torch.zeros(2, 2, dtype=kind)
            siso_step(zeros, state, a, a, None, None, a.real, None, None, 1.0)


@jit
def _complex(
    begin, end, worker, like, width, states, channels, rank, u, h, a, a_varies, B, B_varies, U, V,
    low_varies, C_re, C_im, D, scale, y, new,
):  # fmt: skip
    zero, size, factor = like.dtype.type(0), 2 * states, like.dtype.type(scale)
    for place in range(begin, end):
        b, i = place // width, place % width
        x = take(at(u, place, like), 0)
        before, after = at(h, place * size, like), at(new, place * size, like)
        decay = at(a, (place if a_varies else i) * size, like)
        drive = at(B, (place if B_varies else i) * size, like)
        c_re, c_im, read = at(C_re, i * states, like), at(C_im, i * states, like), zero
        for block in range(states // BLOCK):
            for k in range(BLOCK):
                m = block * BLOCK + k
                re, im = take(before, 2 * m), take(before, 2 * m + 1)
                d_re, d_im = take(decay, 2 * m), take(decay, 2 * m + 1)
                n_re = d_re * re - d_im * im + take(drive, 2 * m) * x
                n_im = d_re * im + d_im * re + take(drive, 2 * m + 1) * x
                put(after, 2 * m, n_re)
                put(after, 2 * m + 1, n_im)
                read += take(c_re, m) * n_re - take(c_im, m) * n_im
        for m in range(states - states % BLOCK, states):
            re, im = take(before, 2 * m), take(before, 2 * m + 1)
            d_re, d_im = take(decay, 2 * m), take(decay, 2 * m + 1)
            n_re = d_re * re - d_im * im + take(drive, 2 * m) * x
            n_im = d_re * im + d_im * re + take(drive, 2 * m + 1) * x
            put(after, 2 * m, n_re)
            put(after, 2 * m + 1, n_im)
            read += take(c_re, m) * n_re - take(c_im, m) * n_im
        for r in range(rank):
            spot = (((b if low_varies else 0) * rank + r) * width + i) * size
            high, low = at(V, spot, like), at(U, spot, like)
            total = zero
            for m in range(states):
                total += take(high, 2 * m) * take(before, 2 * m)
                total -= take(high, 2 * m + 1) * take(before, 2 * m + 1)
            total = total + total
            for m in range(size):
                put(after, m, peek(after, m) - take(low, m) * total)
        for c in range(channels):
            spot = c * width + i
            if rank > 0 or c > 0:
                c_re, c_im = at(C_re, spot * states, like), at(C_im, spot * states, like)
                read = zero
                for m in range(states):
                    read += take(c_re, m) * peek(after, 2 * m)
                    read -= take(c_im, m) * peek(after, 2 * m + 1)
            through = zero
            if D != 0:
                through = take(at(D, spot, like), 0) * x
            put(at(y, (b * channels + c) * width + i, like), 0, factor * read + through)


@jit
def _real(
    begin, end, worker, like, width, states, channels, rank, u, h, a, a_varies, B, B_varies, U, V,
    low_varies, C_re, C_im, D, scale, y, new,
):  # fmt: skip
    zero, factor = like.dtype.type(0), like.dtype.type(scale)
    for place in range(begin, end):
        b, i = place // width, place % width
        x = take(at(u, place, like), 0)
        before, after = at(h, place * states, like), at(new, place * states, like)
        decay = at(a, (place if a_varies else i) * states, like)
        drive = at(B, (place if B_varies else i) * states, like)
        for m in range(states):
            put(after, m, take(decay, m) * take(before, m) + take(drive, m) * x)
        for c in range(channels):
            spot = c * width + i
            read = dot(at(C_re, spot * states, like), after, states, zero)
            through = zero
            if D != 0:
                through = take(at(D, spot, like), 0) * x
            put(at(y, (b * channels + c) * width + i, like), 0, factor * read + through)
