# SPDX-License-Identifier: MIT
# pyright: basic, reportCallIssue=false
"""Zero-order hold of a complex diagonal with one step for decay and input, and its gradients.

Of the schemes it is the one that takes more than a few operations of PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import discretization
from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import inline, jit
from lrnnx_core.backends.cpu.mathematics import (
    _constant,
    _one,
    _select,
    _zero,
    exp,
    expm1,
    sincos,
)
from lrnnx_core.backends.cpu.selective_schemes import ZOH, complex_gain_slope, polar, times
from lrnnx_core.backends.cpu.step_memory import LIKE, address, at, peek, put, take
from lrnnx_core.backends.discretization import Arguments, Layout

WIDE = torch.float64
COST = {"forward": 6.0, "backward": 16.0}  # nanoseconds of an element


def discretize_diagonal(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Leaf: (A_bar, B_bar), as `discretization.formula`."""
    given = Arguments(*arguments)
    x = _laid(given)
    if x is None:
        return discretization.formula(*given)
    dt = given.dt
    p, values, keep = x
    decay, gain = (torch.empty(p.shape, dtype=dt.dtype.to_complex()) for _ in range(2))
    if decay.numel():
        rows = p.sizes[1] * p.sizes[2]
        pool.run(
            _forward, pool.workers(rows, COST["forward"] * decay.numel()), rows, LIKE[dt.dtype],
            rows, *p.sizes[2:], p.sizes[0], *values, decay.data_ptr(), gain.data_ptr(),
        )  # fmt: skip
    del keep
    return decay, gain


def discretize_diagonal_backward(
    grad_A_bar: Tensor, grad_B_bar: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Leaf: the gradients of all tensors, as `discretization.gradients`."""
    given = Arguments(*arguments)
    x = _laid(given)
    if x is None:
        return discretization.gradients(grad_A_bar, grad_B_bar, *given)
    A, A_im, dt, _, B, B_im, *_ = given
    p, values, keep = x
    shape = (1,) * p.summed + p.shape[p.summed :]
    # summed over time in float64: one after the other, float32 numbers would drift
    made = [None if t is None else dt.new_zeros(shape, dtype=WIDE) for t in (A, A, B, B)]
    summed = dt.shape[-1] == 1
    step = dt.new_empty(p.shape[:-1] + (1,) if summed else p.shape)
    if step.numel():
        outer, n1, n2, states = p.sizes
        grads = [g.resolve_conj().contiguous() for g in (grad_A_bar, grad_B_bar)]
        rows = n1 * n2
        workers = pool.workers(rows, COST["backward"] * outer * rows * states)
        scratch = dt.new_empty(workers * states)
        pool.run(
            _backward, workers, rows, LIKE[dt.dtype], LIKE[WIDE], rows, n2, states, outer, *values,
            *(g.data_ptr() for g in grads), *map(address, made), step.data_ptr(), summed,
            scratch.data_ptr(),
        )  # fmt: skip
    del keep
    found: list[Tensor | None] = []
    for re, im, value, part in ((*made[:2], A, A_im), (*made[2:], B, B_im)):
        if value is None:
            found += [None, None]
            continue
        re, im = (t.sum_to_size(value.shape).to(dt.dtype) for t in (re, im))  # type: ignore[union-attr]
        found += [re, im] if part is not None else [torch.complex(re, im), None]
    results = (*found[:2], step.sum_to_size(dt.shape), None, *found[2:])
    return tuple(dt.new_empty(0) if t is None else t for t in results)


def warm() -> None:
    """Compile the kernels."""
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(1, 2, dtype=dtype)
        arguments = (x, x, x[:, :1], None, x, x, "zoh", 0.0)
        discretize_diagonal_backward(*discretize_diagonal(*arguments), *arguments)


def _laid(x: Arguments) -> tuple[Layout, list[int], list[Tensor]] | None:
    """Return the layout, what kernels get of the inputs, and what has to live; None for PyTorch's.

    Rows of states are compact: of steps that all states share there are copies.
    """
    complex_ = x.A.is_complex() or x.A_im is not None
    if x.scheme != "zoh" or not complex_ or x.dt_input is not None:
        return None
    shape = discretization.together(x.A, x.dt)
    if discretization.together(x.A, x.dt, x.B) != shape:
        return None
    states = shape[-1]

    def rows(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t.resolve_conj().resolve_neg()
        t = t if t.shape[-1] == states else t.expand(*t.shape[:-1], states)
        return t if t.stride(-1) == 1 or states == 1 else t.contiguous()

    parts = [rows(t) for t in (*_parts(x.A, x.A_im), *_parts(x.B, x.B_im), x.dt)]
    absent = (0,) * len(shape)
    strides = tuple(absent if t is None else discretization.strides(t) for t in parts)
    p = discretization.layout(tuple(shape), discretization.shared(*parts[:4]), strides)
    if p is None:
        parts = [None if t is None else t.expand(shape).contiguous() for t in parts]
        strides = tuple(absent if t is None else t.stride() for t in parts)
        p = discretization.layout(tuple(shape), (False,) * len(shape), strides)
        if p is None:
            return None
    values: list[int] = []
    for t, (outer, n1, n2, _) in zip(parts, p.strides, strict=True):
        values += [address(t), n1, n2]
        last = outer
    return p, [*values, last], [t for t in parts if t is not None]


def _parts(x: Tensor | None, im: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if x is None or not x.is_complex():
        return x, im
    return x.real, x.imag


_half, _least = _constant(0.5, 0.5), _constant(1e-30, 1e-30)


@inline
def _quotient(re, im):
    """Return (e^z - 1) / z at z = re + i im, where nothing cancels."""
    grown = expm1(re)
    s, c = sincos(im)
    turn, _ = sincos(_half(im) * im)
    x, y = grown * c - (turn + turn) * turn, (_one(re) + grown) * s
    size = re * re + im * im
    near = size < _least(re)
    scale = _one(re) / _select(near, _one(re), size)
    return (
        _select(near, _one(re), (x * re + y * im) * scale),
        _select(near, _zero(re), (y * re - x * im) * scale),
    )


@jit
def _forward(
    begin, end, worker, like, rows, n2, states, outer, A_re, A_re1, A_re2, A_im, A_im1, A_im2,
    B_re, B_re1, B_re2, B_im, B_im1, B_im2, dt, dt1, dt2, dt0, decay, gain,
):  # fmt: skip
    for row in range(begin, end):
        i, j = row // n2, row % n2
        a_re, a_im = at(A_re, i * A_re1 + j * A_re2, like), at(A_im, i * A_im1 + j * A_im2, like)
        b_re, b_im = at(B_re, i * B_re1 + j * B_re2, like), at(B_im, i * B_im1 + j * B_im2, like)
        for o in range(outer):
            steps = at(dt, o * dt0 + i * dt1 + j * dt2, like)
            to = 2 * (o * rows + row) * states
            fade, drive = at(decay, to, like), at(gain, to, like)
            for m in range(states):
                d = take(steps, m)
                re, im = d * take(a_re, m), d * take(a_im, m)
                x, y = polar(exp(re), im)
                put(fade, 2 * m, x)
                put(fade, 2 * m + 1, y)
                x, y = _quotient(re, im)
                put(drive, 2 * m, d * x)
                put(drive, 2 * m + 1, d * y)
            if B_re != 0:
                for m in range(states):
                    x, y = peek(drive, 2 * m), peek(drive, 2 * m + 1)
                    x, y = times(x, y, take(b_re, m), take(b_im, m))
                    put(drive, 2 * m, x)
                    put(drive, 2 * m + 1, y)


@jit
def _backward(
    begin, end, worker, like, wide, rows, n2, states, outer, A_re, A_re1, A_re2, A_im, A_im1, A_im2,
    B_re, B_re1, B_re2, B_im, B_im1, B_im2, dt, dt1, dt2, dt0, grad_decay, grad_gain, dA_re,
    dA_im, dB_re, dB_im, ddt, summed, scratch,
):  # fmt: skip
    for row in range(begin, end):
        i, j = row // n2, row % n2
        a_re, a_im = at(A_re, i * A_re1 + j * A_re2, like), at(A_im, i * A_im1 + j * A_im2, like)
        b_re, b_im = at(B_re, i * B_re1 + j * B_re2, like), at(B_im, i * B_im1 + j * B_im2, like)
        p_re, p_im = at(dA_re, row * states, wide), at(dA_im, row * states, wide)
        q_re, q_im = at(dB_re, row * states, wide), at(dB_im, row * states, wide)
        for o in range(outer):
            steps = at(dt, o * dt0 + i * dt1 + j * dt2, like)
            to = (o * rows + row) * states
            f, g = at(grad_decay, 2 * to, like), at(grad_gain, 2 * to, like)
            slopes = at(scratch, worker * states, like) if summed else at(ddt, to, like)
            for m in range(states):
                d, r, k = take(steps, m), take(a_re, m), take(a_im, m)
                re, im = d * r, d * k
                x, y = polar(exp(re), -im)  # the decay's conjugate
                w_re, w_im = times(x, y, take(f, 2 * m), take(f, 2 * m + 1))
                h_re, h_im = take(g, 2 * m), take(g, 2 * m + 1)
                if B_re != 0:
                    h_re, h_im = times(h_re, h_im, take(b_re, m), -take(b_im, m))
                n_re, n_im = complex_gain_slope(ZOH, re, im)
                v_re, v_im = times(d * d * n_re, -(d * d * n_im), h_re, h_im)
                put(p_re, m, peek(p_re, m) + (d * w_re + v_re))
                put(p_im, m, peek(p_im, m) + (d * w_im + v_im))
                put(slopes, m, r * w_re + k * w_im + x * h_re - y * h_im)
            if B_re != 0:
                for m in range(states):
                    d = take(steps, m)
                    x, y = _quotient(d * take(a_re, m), d * take(a_im, m))
                    x, y = times(d * x, -(d * y), take(g, 2 * m), take(g, 2 * m + 1))
                    put(q_re, m, peek(q_re, m) + x)
                    put(q_im, m, peek(q_im, m) + y)
            if summed:
                total = like.dtype.type(0)
                for m in range(states):
                    total += peek(slopes, m)
                put(at(ddt, o * rows + row, like), 0, total)
