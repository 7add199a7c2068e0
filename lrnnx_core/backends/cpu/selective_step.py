# SPDX-License-Identifier: MIT
# pyright: basic
"""One step of the selective scan on the CPU, for a decoder: real states, few words around it.

A decoder's step is short, so that Python's part counts: the tensors go to the kernel as addresses
and strides, and what does not fit goes the general way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu import selective_schemes as schemes
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.mathematics import silu, softplus
from lrnnx_core.backends.cpu.pointers import BYTE, ONES, at
from lrnnx_core.backends.cpu.selective_coefficients import plane

ALONE = 1 << 16  # states up to which one thread is enough


def selective_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    decay_dt: Tensor | None,
    timesteps: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return y, the state and no checkpoints for L = 1, or None where this is not the way.

    It takes one batch axis or none, real float32 or float64 throughout, and rows that are dense.
    """
    dtype = u.dtype
    one = ONES.get(dtype)
    if one is None or A.ndim != 2 or u.ndim > 3 or not A.is_contiguous():
        return None
    for t in (dt, A, B, C, D, z, dt_bias, h0, decay_dt, timesteps):
        if t is not None and t.dtype is not dtype:
            return None
    E, N = A.shape
    for t in (u, dt, z, decay_dt):
        if t is not None and t.stride(-1) != 1 and E > 1:
            return None
    for t in (D, dt_bias, h0):
        if t is not None and not t.is_contiguous():
            return None
    if N > 1 and (B.stride(-1) != 1 or C.stride(-1) != 1):
        return None
    batched, size = u.ndim == 3, dtype.itemsize
    rows = u.shape[0] if batched else 1
    y, last = torch.empty(u.shape, dtype=dtype), torch.empty((*u.shape[:-2], E, N), dtype=dtype)
    arguments = [E, N, y.data_ptr(), last.data_ptr(), A.data_ptr()]
    for t in (D, dt_bias, h0):
        arguments.append(0 if t is None else t.data_ptr())
    for t in (u, dt, z, decay_dt, timesteps, reset):
        if t is None:
            arguments += (0, 0)
        else:
            arguments += (t.data_ptr(), t.stride(0) * t.itemsize if batched else 0)
    for t in (B, C):
        row = t.stride(0) * size if batched else 0
        arguments += (t.data_ptr(), row, E // t.shape[-2], t.stride(-2) * size)
    step = kernel(schemes.SCHEMES[scheme])
    if rows * E * N <= ALONE:
        step(0, rows, 0, *arguments, softplus, state_only, size, one)
    else:
        workers = pool.workers(rows, rows * E * N * 2.0)
        pool.run(step, workers, rows, *arguments, softplus, state_only, size, one)
    return y, last, torch.empty((*u.shape[:-2], 0), dtype=dtype)


@functools.cache
def kernel(scheme: int) -> Any:
    """Return the kernel of a scheme."""

    @jit
    def selective_step_kernel(
        begin, end, worker, E, N, y, last, A, D, bias, h0, u, u_row, dt, dt_row, z, z_row, own,
        own_row, times, times_row, reset, reset_row, B, b_row, b_width, b_group, C, c_row, c_width,
        c_group, smooth, state_only, size, one,
    ):  # fmt: skip
        zero = one - one
        for r in range(begin, end):
            out = plane(y + r * E * size, one)
            x, given = at(u + r * u_row, one), at(dt + r * dt_row, one)
            if bias != 0:
                shift = at(bias, one)
                for e in range(E):
                    out[e] = given[e] + shift[e]
            else:
                for e in range(E):
                    out[e] = given[e]
            if smooth:
                for e in range(E):
                    out[e] = softplus(out[e])
            tau = one if times == 0 else at(times + r * times_row, one)[0]
            tau_in = one if state_only else tau
            fresh = h0 == 0 or (reset != 0 and at(reset + r * reset_row, BYTE)[0] != 0)
            b_at, c_at, place = B + r * b_row, C + r * c_row, r * E * N * size
            after = plane(last + place, one)
            for e in range(E):
                if b_width < E and e > 0 and e % b_width == 0:
                    b_at += b_group
                if c_width < E and e > 0 and e % c_width == 0:
                    c_at += c_group
                b, c = at(b_at, one), at(c_at, one)
                dd = tau * (out[e] if own == 0 else at(own + r * own_row, one)[e])
                di = tau_in * out[e]
                du = x[e] if scheme == schemes.DIRAC else di * x[e]
                rates, total = at(A + e * N * size, one), zero
                before = at((A if fresh else h0 + place) + e * N * size, one)
                for n in range(N):
                    a = schemes.decay(scheme, dd * rates[n])
                    g = du * b[n] * schemes.gain(scheme, di * rates[n])
                    h = g if fresh else a * before[n] + g
                    after[e * N + n] = h
                    total += c[n] * h
                out[e] = total
            if D != 0:
                skip = at(D, one)
                for e in range(E):
                    out[e] += skip[e] * x[e]
            if z != 0:
                gate = at(z + r * z_row, one)
                for e in range(E):
                    out[e] *= silu(gate[e])

    return selective_step_kernel
