# SPDX-License-Identifier: MIT
"""The machinery of models with one diagonal state for all channels: S5, LRU and their kin.

    x_t = A_bar_t * x_{t-1} + gamma_t * (B u_t),    y_t = s Re(C x_t) + D u_t

A model file says where A_bar and gamma come from; everything else about running them stands here.
States lie in [re | im] halves, so that a scan stands between two real matrix products; under
irregular time or a step of each sample's own it forms A_bar_t and gamma_t itself (`Flow`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.discretize import EXPONENTIAL, FUSED
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
from lrnnx_core.ops import (
    causal_convolution,
    diagonal_scan,
    linear_scan,
    projected_convolution,
)
from lrnnx_core.ops.discretize_diagonal import apply_scheme
from lrnnx_core.ops.powers import powers
from lrnnx_core.ops.projected_scan import Backwards, projected_scan
from lrnnx_core.ops.steps import diagonal_step, flow_step
from lrnnx_core.sequences import Layout, align_right, at_length
from lrnnx_core.types import Discrete, Discretization, Mode, Params, TimestepMode

Halves = tuple[Tensor, Tensor]
"""Real and imaginary part."""


class Recurrence(NamedTuple):
    """A discretized model.

    A_bar is (P,), or (..., L, P) under irregular time; gamma (P,) or (..., L, P), None where B (P,
    H) is B_bar already. ``exponent`` returns z = log A_bar, (P,), where the scheme gives it: not
    every run asks for it. ``parts`` are what B was put together from, if it was.
    """

    A_bar: Tensor
    gamma: Tensor | None
    B: Tensor
    exponent: Callable[[], Tensor] | None = None
    parts: Halves | None = None

    @property
    def z(self) -> Tensor | None:
        """Return log A_bar where it is known."""
        return None if self.exponent is None else self.exponent()

    def B_bar(self) -> Tensor:
        """Return gamma * B, (P, H) or (..., L, P, H)."""
        return self.B if self.gamma is None else self.gamma.unsqueeze(-1) * self.B

    def steady_flow(self) -> Flow:
        """Return what a scan runs where gamma does not vary in time.

        torch.compile runs complex arithmetic kernel by kernel and fuses real arithmetic, of which
        there are more operations: too many to be launched one by one.
        """
        parts = self.parts
        if self.gamma is not None and parts is not None:
            compiling = torch.compiler.is_compiling()
            parts = _times(self.gamma, parts) if compiling else None
        return Flow(self.A_bar, None, None, "none", "both", self.B_bar(), parts)

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


def _times(gain: Tensor, parts: Halves) -> Halves:
    """Return the parts of gain (P,), real or complex, times a matrix (P, H)."""
    re, im = parts
    if not gain.is_complex():
        return gain.unsqueeze(-1) * re, gain.unsqueeze(-1) * im
    a, b = torch.view_as_real(gain).unsqueeze(-2).unbind(-1)
    return a * re - b * im, a * im + b * re


class Flow(NamedTuple):
    """A model before A_bar and gamma are formed: where they vary in time, (..., L, P) never is.

    A (P,) is the continuous state matrix, dt the step, (P,), (..., L, P) or None for 1; timesteps
    (..., L) or None; B (P, H), and its ``parts`` where they are known. The scheme is one of
    `FUSED`.
    """

    A: Tensor
    dt: Tensor | None
    timesteps: Tensor | None
    scheme: str
    timestep_mode: TimestepMode
    B: Tensor
    parts: Halves | None = None

    @classmethod
    def of(
        cls,
        A: Tensor,
        dt: Tensor,
        timesteps: Tensor | None,
        discretization: Discretization,
        timestep_mode: TimestepMode,
        B: Tensor,
        parts: Halves,
    ) -> Flow | None:
        """Return the flow of a checked choice, or None where it must be composed."""
        if discretization == "async":
            discretization, timestep_mode = "zoh", "state_only"
        if not isinstance(discretization, str) or discretization not in FUSED:
            return None
        return cls(A, dt, timesteps, discretization, timestep_mode, B, parts)

    @property
    def drive_weight(self) -> Tensor:
        """Return B in halves, (2P, H), real."""
        return torch.cat((self.B.real, self.B.imag) if self.parts is None else self.parts)

    def discretized(self) -> Recurrence:
        """Return A_bar and gamma in full."""
        d = torch.ones_like(self.A.real) if self.dt is None else self.dt
        dd = d if self.timesteps is None else self.timesteps.unsqueeze(-1) * d
        drive = d if self.timestep_mode == "state_only" and self.timesteps is not None else None
        A_bar, gamma = apply_scheme(self.A, dd, drive, scheme=self.scheme)
        exponent = (lambda: dd * self.A) if self.steady and self.scheme in EXPONENTIAL else None
        return Recurrence(A_bar, gamma, self.B, exponent, self.parts)

    @property
    def steady(self) -> bool:
        """Return whether nothing varies in time."""
        return self.timesteps is None and (self.dt is None or self.dt.ndim == 1)

    def folded(self) -> Flow:
        """Return the same with a gain that is constant in time moved into B, where that can be."""
        steady = self.timestep_mode == "state_only" and (self.dt is None or self.dt.ndim == 1)
        if not steady or self.scheme not in EXPONENTIAL or self.scheme == "dirac":
            return self
        steady = self._replace(timesteps=None).discretized().steady_flow()
        return self._replace(scheme="dirac", B=steady.B, parts=steady.parts)


Source = Callable[[torch.dtype, Tensor | None], Recurrence | Flow]
"""(dtype, timesteps) -> the recurrence of a sequence."""


def scan(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    recurrence: Source,
    *,
    layout: Layout,
    mode: Mode,
    scale: float,
    bidirectional: bool,
    kernel: Tensor | None,
    chunk_size: int | None = None,
    max_bytes: int | None = None,
    flipped: Source | None = None,
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
        steady = r.steady if isinstance(r, Flow) else r.A_bar.ndim == 1
        if (
            flipped is None
            and isinstance(r, Recurrence)
            and not steady
            and layout.timesteps is None
        ):
            convolves = mode == "conv" or kernel is not None
            check_steady(where, r.A_bar, backwards=bidirectional, convolves=convolves)
        check_planned(where, max_bytes, kernel)
        mode = resolve_mode(
            where, mode, steady=layout.uniform and steady, kernel=kernel,
            prefers=prefers_convolution("mimo", u, params["B_re"].shape[0]),
            chunk_size=chunk_size, max_bytes=max_bytes,
        )  # fmt: skip
        D = params["D"].to(dtype)
        if mode == "conv":
            r = r.discretized() if isinstance(r, Flow) else r
            K = None if kernel is None else kernel.to(dtype)
            forward, backward = (K, None) if K is None or not bidirectional else K
            factors = Factors(r.table(size + 1), r.B_bar(), scale, max_bytes)
            y, last = _convolve(params, "C", factors, x, state, layout, forward, size)
            if bidirectional:
                # flipped, right padding is on the left: its zeros leave the zero state untouched
                whole = layout._replace(lengths=None)
                y2, _ = _convolve(params, "C2", factors, x.flip(-2), None, whole, backward, size)
                y = y + y2.flip(-2)
        elif mode == "scan" and _flows(r):
            back = None
            if bidirectional:
                back = _backwards(_readout(params, "C2", dtype, scale), x, layout)
            direct = D if D.ndim == 1 else None
            y, last = _projected(r, params, x, state, direct, layout, scale, back)
            D = None if D.ndim == 1 else D
        else:
            loop = mode == "recurrent"
            h, last = states(r, x, state, layout, loop=loop)
            y = read(params, "C", h, scale)
            if bidirectional:
                h = _backward_states(r, recurrence, flipped, x, layout, loop)
                y = y + read(params, "C2", h, scale)
        if D is not None:
            y = torch.addcmul(y, D, x) if D.ndim == 1 else y + x @ D.mT
        if valid is not None:
            y = torch.where(valid.unsqueeze(-1), y, torch.zeros_like(y))
        return y.to(u.dtype), last


def step(
    where: str,
    params: Params,
    u_t: Tensor,
    state: Tensor,
    recurrence: Source,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Take one step: u_t (..., H), state (..., P); return y_t (..., H_out) and the new state."""
    B = params["B_re"]
    check_input(where, u_t, B.shape[1], B, rank=1, shape="(..., H)")
    check_state(where, state, u_t.shape[:-1], B.shape[:1], u_t)
    with full_precision(u_t.device):
        dtype = compute_dtype(params, u_t, state)
        r = recurrence(dtype, None)
        if isinstance(r, Flow):
            timesteps = None if r.timesteps is None else r.timesteps.expand(u_t.shape[:-1])
            dt = torch.ones_like(r.A.real) if r.dt is None else r.dt
            return flow_step(
                u_t, state, r.A, dt, timesteps, r.B, params["C_re"], params["C_im"], params["D"],
                scale, r.timestep_mode == "state_only", r.scheme,
            )  # fmt: skip
        if r.B.ndim > 2:  # a precomputed B_bar of irregular time, a matrix a row
            x = u_t.to(dtype)
            b = r.drive(x)
            state = r.A_bar * state.to(b.dtype) + b
            y = readout(params, "C", state, scale) + feedthrough(params, x)
            return y.to(u_t.dtype), state
        varying = r.gamma is not None and r.gamma.ndim > 1
        gain, B = (r.gamma, r.B) if varying else (None, r.B_bar())
        return diagonal_step(
            u_t, state, r.A_bar, gain, B, params["C_re"], params["C_im"], params["D"], scale
        )


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


def states(
    r: Recurrence | Flow, x: Tensor, state: Tensor | None, layout: Layout, *, loop: bool = False
) -> tuple[Tensor, Tensor]:
    """Return all states (..., L, 2P) in [re | im] halves and the final one (..., P), complex.

    ``loop`` runs the specification, step by step.
    """
    reset, kind = layout.resets(x.shape[-2]), r.B.dtype
    if loop or not _flows(r):
        h, last = _composed(r, x, state, layout, reset, loop)
    else:
        flow = _flow(r)
        h, last = diagonal_scan(
            torch.nn.functional.linear(x, flow.drive_weight), flow.A, flow.dt,
            None if state is None else state.to(kind), discretization=flow.scheme,
            integration_timesteps=flow.timesteps, timestep_mode=flow.timestep_mode, reset=reset,
            mask=layout.mask,
        )  # fmt: skip
    if layout.lengths is not None:
        before = torch.zeros_like(last) if state is None else state.to(kind)
        ends = at_length(h, layout.lengths, torch.cat([before.real, before.imag], dim=-1))
        last = torch.complex(*ends.chunk(2, dim=-1))
    return h, last


def _flows(r: Recurrence | Flow) -> bool:
    """Return whether the scan can form decay and gain itself, or they do not vary in time."""
    if isinstance(r, Flow):
        return True
    return r.A_bar.ndim == 1 and r.B.ndim == 2 and (r.gamma is None or r.gamma.ndim == 1)


def _flow(r: Recurrence | Flow) -> Flow:
    """Return what the scan runs, with a gain that is constant in time in B where that is better."""
    if isinstance(r, Recurrence):
        return r.steady_flow()
    return r if r.steady else r.folded()


def _projected(
    r: Recurrence | Flow,
    params: Params,
    x: Tensor,
    state: Tensor | None,
    D: Tensor | None,
    layout: Layout,
    scale: float,
    back: Backwards | None,
) -> tuple[Tensor, Tensor]:
    """Run projections and scans as one operator; return y, with D x if given, and the state.

    Right padding is a mask here: the state stays what it was at the length of its row.
    """
    (length, _), batch = x.shape[-2:], x.shape[:-2]
    flow = _flow(r)
    timesteps, reset, mask = (
        None if t is None else t.expand(x.shape[:-1])
        for t in (flow.timesteps, layout.resets(length), layout.valid(length))
    )
    if state is not None:
        state = state.to(flow.B.dtype).expand(*batch, flow.A.shape[-1])
    return projected_scan(
        x, flow.drive_weight, _readout(params, "C", x.dtype, scale), D, flow.A,
        flow.dt, state, discretization=flow.scheme, integration_timesteps=timesteps,
        timestep_mode=flow.timestep_mode, reset=reset, mask=mask, backwards=back,
    )  # fmt: skip


def _backwards(C: Tensor, x: Tensor, layout: Layout) -> Backwards:
    """Return what the direction against time has of its own, in time's order.

    All else is that of the direction of time: a step that depends on a sample is the sample's.
    """
    flipped = layout.backwards(x.shape[-2])
    gaps, reset = (
        None if t is None else t.flip(-1).expand(x.shape[:-1])
        for t in (flipped.timesteps, flipped.reset)
    )
    return Backwards(C, None if gaps is None else gaps.to(x.dtype), reset)


def _composed(
    r: Recurrence | Flow,
    x: Tensor,
    state: Tensor | None,
    layout: Layout,
    reset: Tensor | None,
    loop: bool,
) -> tuple[Tensor, Tensor]:
    """Run `states` with A_bar and gamma formed in full."""
    r = r.discretized() if isinstance(r, Flow) else r
    b = r.drive(x)
    a = r.A_bar.unsqueeze(-2) if r.A_bar.ndim == 1 else r.A_bar
    if layout.mask is not None:
        a = torch.where(layout.mask.unsqueeze(-1), a, torch.ones_like(a))
    state = None if state is None else state.to(b.dtype)
    h, last = linear_scan(a, b, state, reset=reset, backend="reference" if loop else "auto")
    return torch.cat([h.real, h.imag], dim=-1), last


def read(params: Params, key: str, h: Tensor, scale: float) -> Tensor:
    """Return s Re(C h) of states h (..., L, 2P) in halves."""
    return torch.nn.functional.linear(h, _readout(params, key, h.dtype, scale))


def _readout(params: Params, key: str, dtype: torch.dtype, scale: float) -> Tensor:
    """Return s [C_re | -C_im], (H_out, 2P)."""
    re, im = (params[key + part].to(dtype) for part in ("_re", "_im"))
    return scale * torch.cat([re, -im], dim=-1)


def _backward_states(
    r: Recurrence | Flow,
    recurrence: Source,
    flipped: Source | None,
    x: Tensor,
    layout: Layout,
    loop: bool,
) -> Tensor:
    backwards = layout.backwards(x.shape[-2])
    if flipped is not None:
        r = flipped(x.dtype, backwards.timesteps)
    elif backwards.timesteps is not None:
        r = recurrence(x.dtype, backwards.timesteps)
    return states(r, x.flip(-2), None, backwards, loop=loop)[0].flip(-2)


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
