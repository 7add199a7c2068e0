# SPDX-License-Identifier: MIT
"""The machinery of models with one diagonal state for all channels: S5, LRU and their kin.

    x_t = A_bar_t * x_{t-1} + gamma_t * (B u_t),    y_t = s Re(C x_t) + D u_t

A model file says where A_bar and gamma come from; everything else about running them stands here.
The projections are real matrix products on the real and imaginary halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.models._auto import (
    check_planned,
    chunk_length,
    in_chunks,
    prefers_convolution,
    resolve_mode,
)
from lrnnx_core.models._common import (
    check_directions,
    check_discrete,
    check_input,
    check_kernel,
    check_lti_run,
    check_state,
    check_steady,
    compute_dtype,
    full_precision,
    pair,
)
from lrnnx_core.ops import causal_convolution, linear_scan, projected_convolution
from lrnnx_core.ops.powers import powers
from lrnnx_core.sequences import Layout, align_right, at_length
from lrnnx_core.types import Discrete, Mode, Params


class Recurrence(NamedTuple):
    """A discretized model.

    A_bar is (P,), or (..., L, P) under irregular time; gamma (P,) or (..., L, P), None where B (P,
    H) is B_bar already; z (P,) is log A_bar where the scheme gives it.
    """

    A_bar: Tensor
    gamma: Tensor | None
    B: Tensor
    z: Tensor | None = None

    def B_bar(self) -> Tensor:
        """Return gamma * B, (P, H) or (..., L, P, H)."""
        return self.B if self.gamma is None else self.gamma.unsqueeze(-1) * self.B

    def drive(self, u: Tensor) -> Tensor:
        """Return gamma_t * (B u_t), (..., L, P), by two real products."""
        varying = self.gamma is not None and self.gamma.ndim > 1
        B = self.B if varying else self.B_bar()
        if B.ndim > 2:  # a precomputed B_bar of irregular time, a matrix a sample
            column = u.unsqueeze(-1)
            return torch.complex(B.real @ column, B.imag @ column).squeeze(-1)
        b = torch.complex(u @ B.real.mT, u @ B.imag.mT)
        return self.gamma * b if varying and self.gamma is not None else b

    def table(self, length: int) -> Tensor:
        """Return A_bar^t for t = 0 ... length - 1, (length, P)."""
        p = powers(length, a=self.A_bar, z=self.z)
        return (p.coarse.unsqueeze(1) * p.fine).flatten(0, 1)[:length]


def scan(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    recurrence: Callable[[torch.dtype, Tensor | None], Recurrence],
    *,
    layout: Layout,
    mode: Mode,
    scale: float,
    bidirectional: bool,
    kernel: Tensor | None,
    chunk_size: int | None = None,
    max_bytes: int | None = None,
    flipped: Callable[[torch.dtype, Tensor | None], Recurrence] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a model over u (..., L, H); return y (..., L, H_out) and the final state (..., P).

    ``recurrence(dtype, timesteps)`` discretizes. Backwards, a bidirectional model runs the same
    recurrence over the flipped sequence and reads it with C2; where it depends on the input,
    ``flipped`` is the recurrence of the flipped input.
    """
    length = u.shape[-2]
    size = chunk_length(where, chunk_size, u)
    _check(where, params, u, state, layout, mode, bidirectional, kernel, size)
    with full_precision(u.device):
        dtype = compute_dtype(params, u, state)
        x = u.to(dtype)
        valid = layout.valid(length)
        if valid is not None:
            x = torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))
        r = recurrence(dtype, layout.timesteps)
        if layout.timesteps is None and r.A_bar.ndim > 1 and flipped is None:
            convolves = mode == "conv" or kernel is not None
            check_steady(where, r.A_bar, backwards=bidirectional, convolves=convolves)
        check_planned(where, max_bytes, kernel)
        mode = resolve_mode(
            where, mode, steady=layout.uniform and r.A_bar.ndim == 1, kernel=kernel,
            prefers=prefers_convolution("mimo", u, r.A_bar.shape[-1]),
            chunk_size=chunk_size, max_bytes=max_bytes,
        )  # fmt: skip
        if mode == "conv":
            K = None if kernel is None else kernel.to(dtype)
            forward, backward = (K, None) if K is None or not bidirectional else K
            factors = Factors(r.table(size + 1), r.B_bar(), scale, max_bytes)
            y, last = _convolve(params, "C", factors, x, state, layout, forward, size)
            if bidirectional:
                # flipped, right padding is on the left: its zeros leave the zero state untouched
                whole = layout._replace(lengths=None)
                y2, _ = _convolve(params, "C2", factors, x.flip(-2), None, whole, backward, size)
                y = y + y2.flip(-2)
        else:
            b = r.drive(x)
            if state is None:
                state = torch.zeros_like(b[..., 0, :]) if length else b.sum(-2)
            h, last = _states(r, b, state.to(b.dtype), layout, mode)
            y = readout(params, "C", h, scale)
            if bidirectional:
                h = _backward_states(r, recurrence, flipped, x, layout, mode)
                y = y + readout(params, "C2", h, scale)
        y = y + feedthrough(params, x)
        if valid is not None:
            y = torch.where(valid.unsqueeze(-1), y, torch.zeros_like(y))
        return y.to(u.dtype), last


def step(
    where: str,
    params: Params,
    u_t: Tensor,
    state: Tensor,
    recurrence: Callable[[torch.dtype, Tensor | None], Recurrence],
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Take one step: u_t (..., H), state (..., P); return y_t (..., H_out) and the new state."""
    B = params["B_re"]
    check_input(where, u_t, B.shape[1], B, rank=1, shape="(..., H)")
    check_state(where, state, u_t.shape[:-1], B.shape[:1], u_t)
    with full_precision(u_t.device):
        dtype = compute_dtype(params, u_t, state)
        x = u_t.to(dtype)
        r = recurrence(dtype, None)
        b = r.drive(x)
        state = r.A_bar * state.to(b.dtype) + b
        y = readout(params, "C", state, scale) + feedthrough(params, x)
        return y.to(u_t.dtype), state


def kernel(
    where: str,
    params: Params,
    length: int,
    r: Recurrence,
    *,
    scale: float,
    bidirectional: bool,
) -> Tensor:
    """Return K_t = s Re(C A_bar^t B_bar), (L, H_out, H), or both directions stacked in front."""
    if length < 1:
        raise ValueError(f"{where}: length = {length}, expected >= 1")
    table, B_bar = r.table(length), r.B_bar()

    def one(key: str) -> Tensor:
        C = torch.complex(
            params[key + "_re"].to(B_bar.real.dtype), params[key + "_im"].to(B_bar.real.dtype)
        )
        left = C * table.unsqueeze(-2)
        return scale * (left.real @ B_bar.real - left.imag @ B_bar.imag)

    if not bidirectional:
        return one("C")
    check_directions(where, params)
    return torch.stack([one("C"), one("C2")])


def readout(params: Params, key: str, h: Tensor, scale: float) -> Tensor:
    """Return s Re(C h) for C stored as key_re, key_im."""
    re, im = (params[key + part].to(h.real.dtype) for part in ("_re", "_im"))
    return scale * (h.real @ re.mT - h.imag @ im.mT)


def feedthrough(params: Params, x: Tensor) -> Tensor:
    """Return D x for D (H,), or a matrix (H_out, H)."""
    D = params["D"].to(x.dtype)
    return D * x if D.ndim == 1 else x @ D.mT


def given(
    discrete: Discrete, where: str, params: Params, dtype: torch.dtype, timesteps: Tensor | None
) -> Recurrence:
    """Return the recurrence of a precomputed (A_bar, B_bar)."""
    if timesteps is not None:
        raise ValueError(f"{where}: give discrete or integration_timesteps, not both")
    check_discrete(where, discrete, params["B_re"].shape[:1], params["B_re"].shape)
    A_bar, B_bar = (t.to(torch.promote_types(dtype, torch.complex64)) for t in discrete)
    return Recurrence(A_bar, None, B_bar)


def _check(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    layout: Layout,
    mode: Mode,
    bidirectional: bool,
    kernel: Tensor | None,
    at_least: int,
) -> None:
    check_lti_run(
        where, params, u, state, params["B_re"].shape[:1], layout, mode, bidirectional, kernel
    )
    tail = (params["C_re"].shape[0], params["B_re"].shape[1])
    check_kernel(where, kernel, (2,) * bidirectional, at_least, tail)


def _states(
    r: Recurrence, b: Tensor, state: Tensor, layout: Layout, mode: Mode
) -> tuple[Tensor, Tensor]:
    """Return all states (..., L, P) and the final one (..., P)."""
    length = b.shape[-2]
    a = r.A_bar.unsqueeze(-2) if r.A_bar.ndim == 1 else r.A_bar
    if layout.mask is not None:
        a = torch.where(layout.mask.unsqueeze(-1), a, torch.ones_like(a))
    backend = "reference" if mode == "recurrent" else "auto"
    h, last = linear_scan(a, b, state, reset=layout.resets(length), backend=backend)
    if layout.lengths is not None:
        last = at_length(h, layout.lengths, state)
    return h, last


def _backward_states(
    r: Recurrence,
    recurrence: Callable[[torch.dtype, Tensor | None], Recurrence],
    flipped: Callable[[torch.dtype, Tensor | None], Recurrence] | None,
    x: Tensor,
    layout: Layout,
    mode: Mode,
) -> Tensor:
    backwards = layout.backwards(x.shape[-2])
    if flipped is not None:
        r = flipped(x.dtype, backwards.timesteps)
    elif backwards.timesteps is not None:
        r = recurrence(x.dtype, backwards.timesteps)
    b = r.drive(x.flip(-2))
    zero = torch.zeros_like(b[..., 0, :]) if b.shape[-2] else b.sum(-2)
    return _states(r, b, zero, backwards, mode)[0].flip(-2)


class Factors(NamedTuple):
    """What both directions of a convolution share: A_bar^t (size + 1, P), B_bar, s and the cap."""

    table: Tensor
    B_bar: Tensor
    scale: float
    max_bytes: int | None


def _convolve(
    params: Params,
    key: str,
    factors: Factors,
    x: Tensor,
    state: Tensor | None,
    layout: Layout,
    kernel: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Return y without D and the final state of one direction, by convolution.

    Without a kernel C (A_bar^t * (B u)) is contracted in the cheapest order. Nothing of size L P a
    row is built here. A convolution takes ``size`` samples at once.
    """
    table, B_bar, scale, max_bytes = factors
    C = scale * pair(params, key, x.dtype)

    def run(x: Tensor, state: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        length = x.shape[-2]
        responses = table[:length]
        if kernel is None:
            y = projected_convolution(x, responses, B_bar, C, max_bytes=max_bytes)
        else:
            y = causal_convolution(x, kernel, mimo=True)
        input_, decay = x, table[length]
        if layout.lengths is not None:
            input_, decay = align_right(x, layout.lengths), table[layout.lengths]
        late = responses.flip(0).mT
        last = (torch.complex(late.real @ input_, late.imag @ input_) * B_bar).sum(-1)
        if state is not None:
            state = state.to(last.dtype)
            y = y + readout(params, key, table[1 : length + 1] * state.unsqueeze(-2), scale)
            last = last + decay * state
        return y, last

    return in_chunks(run, x, state, layout, size)
