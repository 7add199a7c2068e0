# SPDX-License-Identifier: MIT
"""The machinery of models with a diagonal state for each channel: S4D and its kin.

    x_t = A_bar_t * x_{t-1} + B_bar_t u_t,    y_t = s Re(sum_n C_n x_{t,n}) + D u_t

for every channel; s = 2 for complex states (halves of conjugate pairs), 1 for real ones. A model
file says where A_bar and B_bar come from; everything else about running them stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.models._auto import chunk_length, in_chunks, prefers_convolution, resolve_mode
from lrnnx_core.models._common import (
    check_directions,
    check_discrete,
    check_input,
    check_kernel,
    check_lti_run,
    check_real,
    check_state,
    check_steady,
    compute_dtype,
    full_precision,
    read_next,
)
from lrnnx_core.ops import causal_convolution, linear_scan, s4d_scan, vandermonde
from lrnnx_core.ops.powers import Powers, accumulate, evaluate, powers
from lrnnx_core.ops.s4d_bidirectional import s4d_bidirectional
from lrnnx_core.ops.steps import siso_step
from lrnnx_core.sequences import Compaction, Layout, align_right, at_length
from lrnnx_core.types import Discrete, Mode, Params


class Recurrence(NamedTuple):
    """A discretized model: A_bar and B_bar (H, M) or (..., L, H, M).

    ``exponent`` returns z = log A_bar where the scheme gives it: not every run asks for it.
    """

    A_bar: Tensor
    B_bar: Tensor
    exponent: Callable[[], Tensor] | None = None

    @property
    def z(self) -> Tensor | None:
        """Return log A_bar where it is known."""
        return None if self.exponent is None else self.exponent()

    def powers(self, length: int) -> Powers:
        """Return the powers of A_bar up to ``length``."""
        return powers(length, a=self.A_bar, z=self.z)

    def response(self, v: Tensor, length: int, p: Powers | None = None) -> Tensor:
        """Return Re sum_n v_n A_bar_n^t, t = 0 ... length - 1: (..., H, M) -> (..., length, H)."""
        z = self.z
        if z is not None:
            return vandermonde(v, z, length)
        return evaluate(v, self.powers(length) if p is None else p, length)


def scan(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    recurrence: Callable[[torch.dtype, Tensor | None], Recurrence],
    *,
    layout: Layout,
    mode: Mode,
    bidirectional: bool,
    kernel: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Run a model over u (..., L, H); return y (..., L, [Ch] H) and the final state (..., H, M).

    ``recurrence(dtype, timesteps)`` discretizes. Backwards, a bidirectional model runs the same
    recurrence over the flipped sequence, reads it with C2 and moves the result one sample on, so
    that the current sample counts once.
    """
    length = u.shape[-2]
    size = chunk_length(where, chunk_size, u)
    _check(where, params, u, state, layout, mode, bidirectional, kernel, size)
    with full_precision(u.device):
        dtype = compute_dtype(params, u, state)
        valid = layout.valid(length)
        x = u if valid is None else torch.where(valid.unsqueeze(-1), u, torch.zeros_like(u))
        r = recurrence(dtype, layout.timesteps)
        steady = layout.uniform and r.A_bar.ndim == 2
        if layout.uniform and not steady:
            convolves = mode == "conv" or kernel is not None
            check_steady(where, r.A_bar, backwards=bidirectional, convolves=convolves)
        prefers = prefers_convolution("siso", u, r.A_bar.shape[-1])
        mode = resolve_mode(
            where, mode, steady=steady, prefers=prefers, kernel=kernel, chunk_size=chunk_size
        )
        h0 = None if state is None else state.to(r.B_bar.dtype)
        K = None if kernel is None else kernel.to(dtype)
        forward = K if K is None or not bidirectional else K[0]
        D = params["D"].to(dtype)
        D = D.unsqueeze(0) if D.ndim == 1 else D
        C = _readout(params, "C", dtype)
        fuses = mode == "scan" and r.A_bar.ndim == r.B_bar.ndim == 2
        if not fuses or bidirectional or h0 is not None:  # else all is one operator, which widens
            x = x.to(dtype)
        if fuses and layout.mask is not None and valid is not None:
            # padding on the right is all that the operators take: the holes are closed
            holes = Compaction.of(valid.expand(x.shape[:-1]))
            reset = layout.resets(length)
            reset = None if reset is None else holes.close(reset.expand(x.shape[:-1]))
            x, layout = holes.close(x), Layout(holes.lengths, None, reset, None)
        else:
            holes = None
        if fuses and bidirectional:
            y, last = _fused(r, C, D, x, None, layout, _readout(params, "C2", dtype))
        else:
            y, last = _run(r, C, D, x, h0, layout, mode, forward, size)
        if holes is not None:
            return holes.open(y).to(u.dtype), last
        if bidirectional and not fuses:
            flipped = layout.backwards(length)
            if flipped.timesteps is not None:
                r = recurrence(dtype, flipped.timesteps)
            C2 = _readout(params, "C2", dtype)
            back = None if K is None else K[1]
            y2, _ = _run(r, C2, None, x.flip(-2), None, flipped, mode, back, size)
            y = y + read_next(y2, flipped)
        if valid is not None and not (fuses and h0 is None):  # else the operators have done it
            y = torch.where(valid.unsqueeze(-1), y, torch.zeros_like(y))
        return y.to(u.dtype), last


def step(
    where: str,
    params: Params,
    u_t: Tensor,
    state: Tensor,
    recurrence: Callable[[torch.dtype, Tensor | None], Recurrence],
) -> tuple[Tensor, Tensor]:
    """Take one step: u_t (..., H), state (..., H, M); return y_t (..., [Ch] H) and a new state."""
    D = params["D"]
    check_input(where, u_t, D.shape[-1], D, rank=1, shape="(..., H)")
    check_state(
        where, state, u_t.shape[:-1], state_shape(params), u_t, real="C_im" not in params
    )  # fmt: skip
    with full_precision(u_t.device):
        r = recurrence(compute_dtype(params, u_t, state), None)
        C_im = params.get("C_im")
        return siso_step(
            u_t, state, r.A_bar, r.B_bar, None, None, params["C_re"], C_im, D,
            1.0 if C_im is None else 2.0,
        )  # fmt: skip


def kernel(
    where: str, params: Params, length: int, r: Recurrence, *, bidirectional: bool
) -> Tensor:
    """Return K_t = s Re(sum_n C_n A_bar_n^t B_bar_n): (L, H), (Ch, L, H), or with a leading 2."""
    if length < 1:
        raise ValueError(f"{where}: length = {length}, expected >= 1")
    p = r.powers(length) if r.exponent is None else None

    def one(key: str) -> Tensor:
        C = _readout(params, key, r.B_bar.real.dtype)
        return r.response(C * r.B_bar, length, p)

    if bidirectional:
        check_directions(where, params)
        K = torch.stack([one("C"), one("C2")])
    else:
        K = one("C")
    return K.squeeze(-3) if params["D"].ndim == 1 else K


def given(
    discrete: Discrete, where: str, params: Params, dtype: torch.dtype, timesteps: Tensor | None
) -> Recurrence:
    """Return the recurrence of a precomputed (A_bar, B_bar)."""
    if timesteps is not None:
        raise ValueError(f"{where}: give discrete or integration_timesteps, not both")
    check_discrete(where, discrete, *[state_shape(params)] * 2)
    A_bar, B_bar = (t.to(complex_of(dtype) if t.is_complex() else dtype) for t in discrete)
    return Recurrence(A_bar, B_bar)


def state_shape(params: Params) -> torch.Size:
    """Return (H, M)."""
    return params["C_re"].shape[-2:]


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """Return the complex dtype with parts of this real one."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def _readout(params: Params, key: str, dtype: torch.dtype) -> Tensor:
    """Return s C as (Ch, H, M): the factor of the conjugate halves is in it."""
    re = params[key + "_re"].to(dtype)
    C = re if key + "_im" not in params else 2 * torch.complex(re, params[key + "_im"].to(dtype))
    return C.unsqueeze(0) if C.ndim == 2 else C


def _flat(y: Tensor) -> Tensor:
    """(..., Ch, H) -> (..., Ch H)."""
    return y.flatten(-2)


def _each(x: Tensor) -> Sequence[Tensor]:
    """Return the rows of x; the gradient of a single one is no copy."""
    return [x.squeeze(0)] if len(x) == 1 else x.unbind(0)


def _run(
    r: Recurrence,
    C: Tensor,
    D: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    layout: Layout,
    mode: Mode,
    kernel: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Return y (..., L, Ch H) and the final state, in one direction."""
    if mode == "scan" and r.A_bar.ndim == r.B_bar.ndim == 2:
        return _fused(r, C, D, x, state, layout)
    if mode == "conv":
        y, last = _run_convolution(r, C, x, state, layout, kernel, size)
    else:
        h0 = r.B_bar.new_zeros(x.shape[:-2] + C.shape[-2:]) if state is None else state
        y, last = _recur(r, C, x, h0, layout, mode)
    if D is None:
        return y, last
    if len(D) == 1:
        return torch.addcmul(y, D[0], x), last  # one pass over memory
    return y + _flat(D * x.unsqueeze(-2)), last


def _run_convolution(
    r: Recurrence,
    C: Tensor,
    x: Tensor,
    state: Tensor | None,
    layout: Layout,
    kernel: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Return y (..., L, Ch H) without D, and the final state."""
    p = r.powers(size)
    K = r.response(C * r.B_bar, size, p) if kernel is None else kernel[..., :size, :]
    K = K.unsqueeze(0) if K.ndim == 2 else K

    def run(x: Tensor, state: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        return _convolve(r, C, x, state, layout, p, K)

    return in_chunks(run, x, state, layout, size)


def _convolve(
    r: Recurrence, C: Tensor, x: Tensor, state: Tensor | None, layout: Layout, p: Powers, K: Tensor
) -> tuple[Tensor, Tensor]:
    length = x.shape[-2]
    late = x if layout.lengths is None else align_right(x, layout.lengths)
    last = r.B_bar * accumulate(late, p)
    y = causal_convolution(x.unsqueeze(-3), K)
    if state is not None:
        # the response to the initial state is a kernel too, with coefficients C A_bar x_0
        y = y + evaluate(C * (r.A_bar * state).unsqueeze(-3), p, length)
        every = torch.tensor(length, device=x.device)
        last = p.at(every if layout.lengths is None else layout.lengths) * state + last
    return _flat(y.movedim(-3, -2)), last


def _fused(
    r: Recurrence,
    C: Tensor,
    D: Tensor | None,
    x: Tensor,
    state: Tensor | None,
    layout: Layout,
    C2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan with coefficients constant in time: B moves into the readout, s = B_bar s'.

    With C2 the direction against time is added, moved on by one sample.
    """
    length, reset = x.shape[-2], layout.resets(x.shape[-2])
    lengths = layout.lengths
    gain = r.B_bar.unsqueeze(0)  # of one rank with C: gradients of other ranks are summed
    direct = [None] * len(C) if D is None else _each(D)
    second = [None] * len(C) if C2 is None else _each(C2 * gain)
    V = zip(_each(C * gain), second, direct, strict=True)
    runs = [
        s4d_scan(x, r.A_bar, v, d, lengths=lengths, reset=reset)
        if w is None
        else s4d_bidirectional(x, r.A_bar, v, w, d, lengths=lengths, reset=reset)
        for v, w, d in V
    ]
    y = torch.stack([y for y, _ in runs], -2) if len(runs) > 1 else runs[0][0].unsqueeze(-2)
    last = r.B_bar * runs[0][1]
    if state is not None:
        p = r.powers(length)
        free = evaluate(C * (r.A_bar * state).unsqueeze(-3), p, length).movedim(-3, -2)
        every = torch.tensor(length, device=x.device)
        onward = p.at(every if layout.lengths is None else layout.lengths) * state
        if reset is not None:
            first = (reset.cumsum(-1) == 0)[..., None, None]  # the document that the state is of
            free = torch.where(first, free, torch.zeros_like(free))
            through = ~reset.any(-1)[..., None, None]
            onward = torch.where(through, onward, torch.zeros_like(onward))
        y, last = y + free, last + onward
    return _flat(y), last


def _recur(
    r: Recurrence,
    C: Tensor,
    x: Tensor,
    state: Tensor,
    layout: Layout,
    mode: Mode,
) -> tuple[Tensor, Tensor]:
    length, (size, states) = x.shape[-2], C.shape[-2:]
    a = r.A_bar.flatten(-2)
    if a.ndim == 1:
        a = a.unsqueeze(0)
    if layout.mask is not None:
        a = torch.where(layout.mask.unsqueeze(-1), a, torch.ones_like(a))
    b = (r.B_bar * x.unsqueeze(-1)).flatten(-2)
    backend = "reference" if mode == "recurrent" else "auto"
    h, last = linear_scan(a, b, state.flatten(-2), reset=layout.resets(length), backend=backend)
    if layout.lengths is not None:
        last = at_length(h, layout.lengths, state.flatten(-2))
    h = h.unflatten(-1, (size, states))
    if h.is_complex():
        parts = torch.view_as_real(h).flatten(-2)
        weights = torch.view_as_real(C.conj().resolve_conj()).flatten(-2)
        y = torch.einsum("...hn,chn->...ch", parts, weights)
    else:
        y = torch.einsum("...hn,chn->...ch", h, C)
    return _flat(y), last.unflatten(-1, (size, states))


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
    check_lti_run(where, params, u, state, state_shape(params), layout, mode, bidirectional, kernel)
    if state is not None and "C_im" not in params:
        check_real(where, "state", state)
    D = params["D"]
    check_kernel(where, kernel, (2,) * bidirectional + D.shape[:-1], at_least, D.shape[-1:])
