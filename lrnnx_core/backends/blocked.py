# SPDX-License-Identifier: MIT
"""Leaf operators in pure PyTorch: the default on every device.

The scan is two-level. Time is cut into ``nc`` chunks of ``Q`` steps; one loop over Q runs all
chunks at once from a zero state and keeps the products of the coefficients, one loop over nc
carries the state from chunk to chunk, and a second loop over Q writes the states from the right
start. About ``2 Q + nc`` PyTorch calls instead of L, linear memory, no logarithm and no division,
so zero, negative and complex coefficients are all exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lrnnx_core.backends.reference import state_dtype

# From this many channels on, one PyTorch call a step is already bound by memory, and the two extra
# passes of the two-level form cost more than the calls they save. The batch does not count: a row's
# result must not depend on the rows around it.
SERIAL_CHANNELS = 4096
SERIAL_LENGTH = 16


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Leaf: all states h (..., L, S) and the last one (..., S) of h_t = a_t h_{t-1} + b_t."""
    dtype = state_dtype(b.dtype)
    start = b.new_zeros(b.shape[:-2] + b.shape[-1:], dtype=dtype) if h0 is None else h0.to(dtype)
    h = torch.empty(b.shape, dtype=dtype, device=b.device)
    last = _recurrence(h, a.to(dtype), b.to(dtype), start, reset, reverse, adjoint=False)
    return h.to(b.dtype), last.clone()


def linear_scan_backward(
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    grad_h: Tensor,
    grad_last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: gradients (da, db, dh0) of `linear_scan` in one adjoint scan."""
    dtype = state_dtype(h.dtype)
    lam = torch.empty(h.shape, dtype=dtype, device=h.device)
    coefficient = torch.conj_physical(a.to(dtype))
    dh0 = _recurrence(
        lam, coefficient, grad_h.to(dtype), grad_last.to(dtype), reset, not reverse, adjoint=True
    )
    db = lam.to(h.dtype)
    # lam is ours alone from here on (db is a copy where the dtypes differ).
    shape = h.shape[:-2] + (1,) + h.shape[-1:]
    before = lam.new_zeros(shape) if h0 is None else h0.to(dtype).unsqueeze(-2)
    length = h.shape[-2]
    first, rest = (length - 1, slice(0, -1)) if reverse else (0, slice(1, None))
    earlier = slice(1, None) if reverse else slice(0, -1)
    # Conjugates are physical here: a leaf may run inside a TorchDispatchMode (torch.compile's first
    # call does that), where PyTorch ignores the lazy conjugate bit of intermediate results.
    product = torch.empty_like(lam)
    if length:
        product[..., first, :] = before[..., 0, :]
        product[..., rest, :] = h[..., earlier, :]
        product.conj_physical_().mul_(lam)
    if reset is not None:
        product.masked_fill_(reset.unsqueeze(-1), 0)
    da = product if a.shape[-2] == length else product.sum(-2, keepdim=True)
    return da.to(a.dtype), db, dh0.clone()


def _recurrence(
    out: Tensor,
    c: Tensor,
    x: Tensor,
    state: Tensor,
    reset: Tensor | None,
    reverse: bool,
    *,
    adjoint: bool,
) -> Tensor:
    """Fill ``out`` and return the final state.

    Plain: ``s = c_t s + x_t; out_t = s``. Adjoint: ``out_t = s + x_t; s = c_t out_t``. In both the
    state a step hands on is multiplied by zero where ``reset``.
    """
    length = x.shape[-2]
    if length < SERIAL_LENGTH or x.shape[-1] >= SERIAL_CHANNELS:
        return _serial(out, c, x, state, reset, reverse, adjoint=adjoint)
    q = max(1, math.isqrt(length // 2))
    chunks = length // q
    tail = length - chunks * q
    begin = tail if reverse else 0

    def chunked(t: Tensor, dim: int) -> Tensor:
        if t.shape[dim] != length:
            return t.unsqueeze(dim)
        return t.narrow(dim, begin, chunks * q).unflatten(dim, (chunks, q))

    out_c, x_c, c_c = chunked(out, -2), chunked(x, -2), chunked(c, -2)
    reset_c = None if reset is None else chunked(reset, -1)
    order = range(q - 1, -1, -1) if reverse else range(q)

    # 1. every chunk from a zero state: its last state, and the product of its coefficients
    ends = torch.zeros_like(x_c.select(-2, 0))
    products = torch.ones_like(c_c.select(-2, 0))
    for i in order:
        c_i, x_i = _at(c_c, i), x_c.select(-2, i)
        products = products * c_i
        if adjoint:
            ends.add_(x_i).mul_(c_i)
        if reset_c is not None:
            ends.masked_fill_(reset_c.select(-1, i).unsqueeze(-1), 0)
        if not adjoint:
            torch.addcmul(x_i, c_i, ends, out=ends)

    # 2. the state at the start of every chunk
    starts = torch.empty_like(ends)
    cleared = None if reset_c is None else reset_c.any(-1).unsqueeze(-1)
    for j in range(chunks - 1, -1, -1) if reverse else range(chunks):
        starts.select(-2, j).copy_(state)
        state = torch.addcmul(ends.select(-2, j), _at(products, j), state)
        if cleared is not None:  # chosen, and not multiplied by zero: an infinity must not pass
            state = torch.where(cleared.select(-2, j), ends.select(-2, j), state)

    # 3. every chunk again, from its start
    _serial(out_c, c_c, x_c, starts, reset_c, reverse, adjoint=adjoint)
    if tail:
        cut = slice(0, tail) if reverse else slice(length - tail, None)
        c_tail = c if c.shape[-2] != length else c[..., cut, :]
        reset_tail = None if reset is None else reset[..., cut]
        x_tail, out_tail = x[..., cut, :], out[..., cut, :]
        state = _serial(out_tail, c_tail, x_tail, state, reset_tail, reverse, adjoint=adjoint)
    return state


def _at(t: Tensor, i: int) -> Tensor:
    """Return step ``i`` of axis -2, which has size 1 where the coefficient is constant."""
    return t.select(-2, i if t.shape[-2] > 1 else 0)


def _serial(
    out: Tensor,
    c: Tensor,
    x: Tensor,
    state: Tensor,
    reset: Tensor | None,
    reverse: bool,
    *,
    adjoint: bool,
) -> Tensor:
    length = x.shape[-2]
    outs, xs = out.unbind(-2), x.unbind(-2)
    cs = c.unbind(-2) if c.shape[-2] == length else (c.select(-2, 0),) * length
    resets = None if reset is None else reset.unsqueeze(-1).unbind(-2)
    steps: Iterable[int] = range(length - 1, -1, -1) if reverse else range(length)
    for t in steps:
        if adjoint:
            state = cs[t] * torch.add(state, xs[t], out=outs[t])
        if resets is not None:
            state = state.masked_fill(resets[t], 0)
        if not adjoint:
            state = torch.addcmul(xs[t], cs[t], state, out=outs[t])
    return state
