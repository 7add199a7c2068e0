# SPDX-License-Identifier: MIT
"""The machinery of Centaurus: state channels of M sub-states each, read out by real weights.

    x_t = A_bar_t * x_{t-1} + gamma_t * v_t,    s_t = sum_m E_m Re(x_{t,m}),    y_t = mix(s_t)

A state channel has one drive v and one signal s; how channels of the input and of the output meet
state channels is the variant. Everything that is convolved is real.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lrnnx_core.models._auto import (
    check_planned,
    chooses_by_length,
    chunk_length,
    in_chunks,
    resolve_mode,
)
from lrnnx_core.models._common import (
    check_choice,
    check_input,
    check_kernel,
    check_keys,
    check_lti_run,
    check_state,
    check_steady,
    compute_dtype,
    full_precision,
)
from lrnnx_core.ops import causal_convolution, linear_scan, projected_convolution
from lrnnx_core.ops.powers import Powers, accumulate, evaluate, powers
from lrnnx_core.ops.steps import linear_step, siso_step
from lrnnx_core.ops.vandermonde import vandermonde
from lrnnx_core.sequences import Layout, align_right, at_length
from lrnnx_core.types import Discrete, Mode, Params

Variant = Literal["neck", "pointwise", "dws", "full"]
VARIANTS = get_args(Variant)
CONVOLVED = 1024
"""From this many sub-states times samples of a state channel on ``auto`` convolves.

A scan works on every sub-state, a convolution on their sum. On a CPU (1 thread) they
cross at L = 512, 256, 128, 64 for M = 2, 4, 8, 16; of single sub-states a scan is the quicker one.
"""
KEYS: dict[str, tuple[str, ...]] = {
    "neck": ("A_raw", "A_im", "log_dt", "B", "C", "E"),
    "pointwise": ("A_raw", "A_im", "log_dt", "B", "C"),
    "dws": ("A_raw", "A_im", "log_dt", "E", "W"),
    "full": ("A_raw", "A_im", "log_dt", "E"),
}
"""The parameters of each variant. A_raw and A_im have the shape of a state."""
READOUT = {"neck": "C", "pointwise": "C", "dws": "E", "full": "E"}
"""Of which a bidirectional model has a second one, C2 or E2."""


class Recurrence(NamedTuple):
    """A discretized model: A_bar and gamma, each of a state's shape S or (..., L, *S).

    ``exponent`` returns z = log A_bar where the scheme gives it: not every run asks for it.
    """

    A_bar: Tensor
    gamma: Tensor
    exponent: Callable[[], Tensor] | None = None

    @property
    def z(self) -> Tensor | None:
        """Return log A_bar where it is known."""
        return None if self.exponent is None else self.exponent()


def check_variant(where: str, params: Params, variant: Variant, bidirectional: bool) -> None:
    """Raise unless params are those of the variant, with the second readout if that is needed."""
    check_choice(where, "variant", variant, VARIANTS)
    keys = KEYS[variant]
    extra = [k for k in params if k not in (*keys, READOUT[variant] + "2")]
    if extra:
        raise ValueError(
            f"{where}: variant {variant!r} has no parameter {', '.join(extra)}; "
            "give the variant that init had"
        )
    check_keys(where, params, keys, "give the variant that init had")
    if bidirectional:
        hint = "make them with init(bidirectional=True)"
        check_keys(where, params, (READOUT[variant] + "2",), hint)


def width(params: Params, variant: Variant) -> int:
    """Return the channels H of the input."""
    if variant in ("neck", "pointwise"):
        return params["B"].shape[1]
    return params["A_raw"].shape[-2]


def output_width(params: Params, variant: Variant) -> int:
    """Return the channels H_out of the output."""
    if variant == "full":
        return params["A_raw"].shape[0]
    return params["W" if variant == "dws" else "C"].shape[0]


class Connection(NamedTuple):
    """How one direction of a model is driven and read: B, E, C, real, None where there is none.

    C is W for ``dws``.
    """

    variant: Variant
    B: Tensor | None
    E: Tensor | None
    C: Tensor | None

    @classmethod
    def of(cls, params: Params, variant: Variant, dtype: torch.dtype, second: bool) -> Connection:
        """Return the connection of the first or the second direction."""

        def read(key: str) -> Tensor | None:
            if second and key == READOUT[variant]:
                key += "2"
            return params[key].to(dtype) if key in params else None

        return cls(variant, read("B"), read("E"), read("W" if variant == "dws" else "C"))

    def drive(self, u: Tensor, shape: torch.Size) -> Tensor:
        """Return what drives each state, u (..., H) -> something that broadcasts to (..., *S)."""
        if self.variant == "full":
            return u.unsqueeze(-1).unsqueeze(-3)
        v = u if self.B is None else u @ self.B.mT
        return v.unflatten(-1, shape) if self.variant == "pointwise" else v.unsqueeze(-1)

    def read(self, h: Tensor) -> Tensor:
        """Return y (..., H_out) of states h (..., *S)."""
        x = h.real
        s = x.flatten(-2) if self.E is None else (x * self.E).sum(-1)
        if self.variant == "full":
            return s.sum(-1)
        return s if self.C is None else s @ self.C.mT

    def rows(self, x: Tensor) -> Tensor:
        """Return a tensor of states (..., *S) as (..., J, M), a row for each state channel.

        J is J M, and M is 1, for ``pointwise``; J is H_out H for ``full``.
        """
        if self.variant == "pointwise":
            return x.flatten(-2).unsqueeze(-1)
        return x.flatten(-3, -2) if self.variant == "full" else x

    def coefficients(self, x: Tensor) -> Tensor:
        """Return E * x for a tensor of states (..., *S), in `rows`."""
        return self.rows(x if self.E is None else self.E * x)

    def mix(self, K: Tensor, shape: torch.Size) -> Tensor:
        """Return the kernel (..., H_out, H) of the kernels (..., J) of the state channels."""
        if self.variant == "full":
            return K.unflatten(-1, shape[:-1])
        left = K.unsqueeze(-2) if self.C is None else self.C * K.unsqueeze(-2)
        return left if self.B is None else left @ self.B.to(left.dtype)


def basis(c: Connection, r: Recurrence, length: int) -> Tensor:
    """Return the kernels of the state channels, (L, J), real. Nothing of size J M L is built."""
    v, z = c.coefficients(r.gamma), r.z
    if z is not None:
        return vandermonde(v, c.rows(z), length)
    return evaluate(v, powers(length, a=c.rows(r.A_bar)), length)


def scan(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    recurrence: Callable[[torch.dtype, Tensor | None], Recurrence],
    *,
    variant: Variant,
    layout: Layout,
    mode: Mode,
    bidirectional: bool,
    kernel: Tensor | None,
    chunk_size: int | None,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """Run a model over u (..., L, H); return y (..., L, H_out) and the final state (..., *S).

    ``recurrence(dtype, timesteps)`` discretizes. Backwards, a bidirectional model runs the same
    recurrence over the flipped sequence and reads it with its second readout.
    """
    size = chunk_length(where, chunk_size, u)
    if max_bytes is not None and variant in ("dws", "full"):
        raise ValueError(
            f"{where}: max_bytes is for neck and pointwise, which have an order to choose"
        )
    _check(where, params, u, state, variant, layout, mode, bidirectional, kernel, size)
    length, shape = u.shape[-2], params["A_raw"].shape
    with full_precision(u.device):
        dtype = compute_dtype(params, u, state)
        x = u.to(dtype)
        valid = layout.valid(length)
        if valid is not None:
            x = torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))
        r = recurrence(dtype, layout.timesteps)
        steady = layout.uniform and r.A_bar.ndim == len(shape)
        if layout.uniform and not steady:
            convolves = mode == "conv" or kernel is not None
            check_steady(where, r.A_bar, backwards=bidirectional, convolves=convolves)
        states = 1 if variant == "pointwise" else shape[-1]
        check_planned(where, max_bytes, kernel)
        long = chooses_by_length() and states * length >= CONVOLVED
        mode = resolve_mode(
            where, mode, steady=steady, prefers=states > 1 and long, kernel=kernel,
            chunk_size=chunk_size, max_bytes=max_bytes,
        )  # fmt: skip
        K = None if kernel is None else kernel.to(dtype)
        h0 = None if state is None else state.to(r.A_bar.dtype)
        c = Connection.of(params, variant, dtype, second=False)
        forward = K if K is None or not bidirectional else K[0]
        y, last = _run(c, r, x, h0, layout, mode, forward, size, max_bytes)
        if bidirectional:
            flipped = layout.backwards(length)
            if flipped.timesteps is not None:
                r = recurrence(dtype, flipped.timesteps)
            c = Connection.of(params, variant, dtype, second=True)
            back, x = None if K is None else K[1], x.flip(-2)
            y = y + _run(c, r, x, None, flipped, mode, back, size, max_bytes)[0].flip(-2)
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
    variant: Variant,
) -> tuple[Tensor, Tensor]:
    """Take one step: u_t (..., H), state (..., *S); return y_t (..., H_out) and the new state."""
    check_variant(where, params, variant, False)
    shape = params["A_raw"].shape
    check_input(where, u_t, width(params, variant), params["A_raw"], rank=1, shape="(..., H)")
    check_state(where, state, u_t.shape[:-1], shape, u_t)
    with full_precision(u_t.device):
        dtype = compute_dtype(params, u_t, state)
        r = recurrence(dtype, None)
        c = Connection.of(params, variant, dtype, second=False)
        if c.E is not None and variant in ("neck", "dws"):
            x = u_t.to(dtype)
            v = x if c.B is None else linear_step(x, c.B, None)
            s, new = siso_step(v, state, r.A_bar, r.gamma, None, None, c.E, None, None, 1.0)
            y = s if c.C is None else linear_step(s, c.C, None)
            return y.to(u_t.dtype), new
        drive = c.drive(u_t.to(dtype), shape)
        state = r.A_bar * state.to(r.A_bar.dtype) + r.gamma * drive
        return c.read(state).to(u_t.dtype), state


def kernel(
    where: str,
    params: Params,
    length: int,
    r: Recurrence,
    *,
    variant: Variant,
    bidirectional: bool,
) -> Tensor:
    """Return the kernel (L, H_out, H), or both directions stacked in front."""
    if length < 1:
        raise ValueError(f"{where}: length = {length}, expected >= 1")

    def one(second: bool) -> Tensor:
        c = Connection.of(params, variant, r.A_bar.real.dtype, second)
        return c.mix(basis(c, r, length), r.A_bar.shape)

    return torch.stack([one(False), one(True)]) if bidirectional else one(False)


def given(
    discrete: Discrete, where: str, params: Params, dtype: torch.dtype, timesteps: Tensor | None
) -> Recurrence:
    """Return the recurrence of a precomputed (A_bar, gamma)."""
    if timesteps is not None:
        raise ValueError(f"{where}: give discrete or integration_timesteps, not both")
    shape = params["A_raw"].shape
    if any(t.shape[-len(shape) :] != shape for t in discrete):
        got = " and ".join(str(tuple(t.shape)) for t in discrete)
        raise ValueError(
            f"{where}: discrete has shapes {got}, expected them to end in {tuple(shape)}"
        )
    wide = torch.promote_types(dtype, torch.complex64)
    return Recurrence(discrete[0].to(wide), discrete[1].to(wide))


def _check(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    variant: Variant,
    layout: Layout,
    mode: Mode,
    bidirectional: bool,
    kernel: Tensor | None,
    at_least: int,
) -> None:
    second = READOUT[variant] + "2"
    check_lti_run(
        where, params, u, state, params["A_raw"].shape, layout, mode, bidirectional, kernel,
        second=second,
    )  # fmt: skip
    tail = (output_width(params, variant), width(params, variant))
    check_kernel(where, kernel, (2,) * bidirectional, at_least, tail)


def _run(
    c: Connection,
    r: Recurrence,
    x: Tensor,
    state: Tensor | None,
    layout: Layout,
    mode: Mode,
    kernel: Tensor | None,
    size: int,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """Return y (..., L, H_out) and the final state (..., *S) of one direction."""
    if mode == "conv":
        return _convolve(c, r, x, state, layout, kernel, size, max_bytes)
    return _recur(c, r, x, state, layout, mode)


def _recur(
    c: Connection, r: Recurrence, x: Tensor, state: Tensor | None, layout: Layout, mode: Mode
) -> tuple[Tensor, Tensor]:
    length, rank = x.shape[-2], 3 if c.variant == "full" else 2
    shape = r.A_bar.shape[-rank:]
    a = r.A_bar.flatten(-rank)
    if a.ndim == 1:
        a = a.unsqueeze(0)
    if layout.mask is not None:
        a = torch.where(layout.mask.unsqueeze(-1), a, torch.ones_like(a))
    b = (r.gamma * c.drive(x, shape)).flatten(-rank)
    start = b.new_zeros(*x.shape[:-2], b.shape[-1]) if state is None else state.flatten(-rank)
    backend = "reference" if mode == "recurrent" else "auto"
    h, last = linear_scan(a, b, start, reset=layout.resets(length), backend=backend)
    if layout.lengths is not None:
        last = at_length(h, layout.lengths, start)
    return c.read(h.unflatten(-1, shape)), last.unflatten(-1, shape)


def _convolve(
    c: Connection,
    r: Recurrence,
    x: Tensor,
    state: Tensor | None,
    layout: Layout,
    kernel: Tensor | None,
    size: int,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """Convolve ``size`` samples at once."""
    shape = r.A_bar.shape
    z = r.z
    p = powers(size, a=c.rows(r.A_bar), z=None if z is None else c.rows(z))
    K = basis(c, r, size) if kernel is None else kernel
    if kernel is None and c.variant == "full":
        K = c.mix(K, shape)

    def run(x: Tensor, state: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        length = x.shape[-2]
        if kernel is not None or c.variant == "full":
            y = causal_convolution(x, K, mimo=True)
        elif c.B is not None and c.C is not None:
            y = projected_convolution(x, K[:length], c.B, c.C, max_bytes=max_bytes)
        else:
            y = causal_convolution(x, K)
            y = y if c.C is None else y @ c.C.mT
        late = x if layout.lengths is None else align_right(x, layout.lengths)
        last = r.gamma * _accumulate(c, late, p, shape)
        if state is not None:
            at = layout.lengths
            at = torch.tensor(length, device=x.device) if at is None else at
            last = last + p.at(at).reshape(at.shape + shape) * state
            y = y + _response(c, r, state, p, length)
        return y, last

    return in_chunks(run, x, state, layout, size)


def _accumulate(c: Connection, x: Tensor, p: Powers, shape: torch.Size) -> Tensor:
    """Return sum_t A_bar^(L-1-t) v_t, (..., *S), for the drive v of x (..., L, H)."""
    if c.variant != "full":
        sums = accumulate(x if c.B is None else x @ c.B.mT, p)
        return sums.flatten(-2).unflatten(-1, shape)

    def by_input(t: Tensor) -> Tensor:  # an input drives the sub-states of every output
        return t.unflatten(-2, shape[:-1]).movedim(-2, -3).flatten(-2)

    sums = accumulate(x, Powers(by_input(p.fine), by_input(p.coarse)))
    return sums.unflatten(-1, (shape[0], shape[-1])).movedim(-2, -3)


def _response(c: Connection, r: Recurrence, state: Tensor, p: Powers, length: int) -> Tensor:
    """Return what an initial state gives at the output: kernels with coefficients E A_bar x_0."""
    v = c.coefficients(r.A_bar * state)
    if c.variant != "full":
        s = evaluate(v, p, length)
        return s if c.C is None else s @ c.C.mT

    def by_output(t: Tensor) -> Tensor:  # an output sums the sub-states of every input
        return t.unflatten(-2, r.A_bar.shape[:-1]).flatten(-2)

    return evaluate(by_output(v), Powers(by_output(p.fine), by_output(p.coarse)), length)
