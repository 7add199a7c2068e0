# SPDX-License-Identifier: MIT
"""How S4 runs over sequences: as a convolution, by blocks of time, or step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import reference
from lrnnx_core.models import _dense_blocks, _dense_resets, _dplr, _dplr_kernel, _s4
from lrnnx_core.models._auto import in_chunks
from lrnnx_core.models._dplr import Transition
from lrnnx_core.models._siso import complex_of
from lrnnx_core.models._transforms import RealTransform, StepTransform
from lrnnx_core.ops import causal_convolution
from lrnnx_core.ops.steps import siso_step
from lrnnx_core.sequences import Compaction, Layout
from lrnnx_core.types import Discrete, Number, Params, TimestepMode

# Samples whose transitions are made at once where they vary in time.
TIMED_BLOCK = 64


class Choices(NamedTuple):
    """The choices and numbers of one call."""

    dt_transform: StepTransform
    A_transform: RealTransform
    dt_scale: Number
    l_kernel: int | None
    timestep_mode: TimestepMode = "both"

    @property
    def stored(self) -> bool:
        """Whether C~ is stored and was made for this dt."""
        scaled = isinstance(self.dt_scale, Tensor) or self.dt_scale != 1.0
        return self.l_kernel is not None and not scaled


def system(params: Params, dtype: torch.dtype, choices: Choices) -> _dplr.System:
    """Return the continuous system at the scaled step."""
    return _s4.system(params, dtype, choices.dt_transform, choices.A_transform, choices.dt_scale)


def transition(
    params: Params, dtype: torch.dtype, choices: Choices, elapsed: Tensor | None = None
) -> Transition:
    """Return the discrete system, or one for each of the times ``elapsed`` (...)."""
    if elapsed is None:  # few numbers, many powers: they are rounded once
        exact = _dplr.transition(system(params, torch.float64, choices))
        return Transition(*(t.to(complex_of(dtype)) for t in exact))
    decay = elapsed.to(dtype)[..., None, None]
    drive = decay if choices.timestep_mode == "both" else None
    return _dplr.transition(system(params, dtype, choices), decay, drive)


def dense(params: Params, choices: Choices) -> Discrete:
    """Return (A_bar (H, N, N), B_bar (H, N)) of the real form, float64."""
    return _dplr.transition(system(params, torch.float64, choices)).dense()


def true_readout(params: Params, key: str, choices: Choices) -> Tensor:
    """Return the rows (H, Ch, N) of the true C in float64."""
    return _s4.true_readout(
        params, key, choices.l_kernel, choices.dt_transform, choices.A_transform
    )


def kernel(params: Params, key: str, length: int, choices: Choices, dtype: torch.dtype) -> Tensor:
    """Return the kernel (Ch, length, H) of one direction."""
    if choices.l_kernel is None or not choices.stored:
        return dense_kernel(params, key, length, choices, dtype, dense(params, choices))
    C = _s4.readout(params, key, dtype)
    return _dplr_kernel.kernel(C, system(params, dtype, choices), choices.l_kernel)[:, :length]


def dense_kernel(
    params: Params, key: str, length: int, choices: Choices, dtype: torch.dtype, discrete: Discrete
) -> Tensor:
    """Return the kernel (Ch, length, H) of the true C and a dense discrete system."""
    A, b = discrete
    C = true_readout(params, key, choices).to(A.dtype)
    return (
        _dense_blocks.kernel(C, A, b.unsqueeze(-1), length).squeeze(-1).permute(1, 2, 0).to(dtype)
    )


def reader(
    params: Params, key: str, choices: Choices, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return the map from a state (..., H, M) to y (..., Ch, H)."""
    if choices.l_kernel is None:
        C = 2 * _s4.readout(params, key, dtype)
    else:
        C = 2 * _s4.from_rows(true_readout(params, key, choices)).to(complex_of(dtype))
    return lambda h: (C * h.unsqueeze(-3)).sum(-1).real


def low_rank_step(
    params: Params, u: Tensor, state: Tensor, at: Transition, choices: Choices
) -> tuple[Tensor, Tensor]:
    """Take one step: u (..., H), state (..., H, M); return y (..., Ch H) and the new state."""
    if choices.l_kernel is None:
        C_re, C_im = params["C_re"], params["C_im"]
    else:
        C = _s4.from_rows(true_readout(params, "C", choices)).to(at.a.dtype)
        C_re, C_im = C.real, C.imag
    return siso_step(u, state, at.a, at.B, at.U, at.V, C_re, C_im, params["D"], 2.0)


def dense_step(discrete: Discrete, h: Tensor, u: Tensor) -> Tensor:
    """Take one step with a dense A_bar (..., H, N, N), B_bar (..., H, N)."""
    A, b = discrete
    return _dplr.halves((A @ _dplr.column(h).unsqueeze(-1)).squeeze(-1) + b * u.unsqueeze(-1))


class Direction(NamedTuple):
    """One direction of a run: params and choices, the readout's key, and a discrete given."""

    params: Params
    key: str
    choices: Choices
    dtype: torch.dtype
    discrete: Discrete | None

    @property
    def stored(self) -> bool:
        """Whether C~ is stored and fits the discrete system that is run."""
        return self.discrete is None and self.choices.stored

    def dense(self) -> Discrete:
        """Return the dense discrete system in float64: its powers are taken."""
        if self.discrete is None:
            return dense(self.params, self.choices)
        A, b = self.discrete
        return A.double(), b.double()

    def convolve(
        self, x: Tensor, h: Tensor | None, K: Tensor | None, layout: Layout, size: int
    ) -> tuple[Tensor, Tensor]:
        """Return y (..., L, Ch, H) and the final state; h None is zero. Takes ``size`` at once."""
        A, b = self.dense()
        rows = x.shape[:-2].numel()
        taps = self._taps(size, (A, b)) if K is None else K
        lengths = {min(size, x.shape[-2]), x.shape[-2] % size or size}  # of chunks, and the last
        tables = {n: _dense_blocks.krylov(A, b, n, rows, self.dtype) for n in lengths}

        def run(x: Tensor, h: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
            length, batch = x.shape[-2], x.shape[:-2]
            y = causal_convolution(x.unsqueeze(-3), taps).movedim(-3, -2)
            h0 = x.new_zeros(*batch, *b.shape) if h is None else _dplr.column(h)
            if h is not None and h.numel():  # MKL refuses an empty batch
                y = y + self._response(A, h0, h, length)
            last = _dense_blocks.final_state(tables[length], x, h0, layout.lengths)
            return y.flatten(-2), _dplr.halves(last)

        y, last = in_chunks(run, x, h, layout, size)
        return y.unflatten(-1, (-1, x.shape[-1])), last

    def _taps(self, length: int, discrete: Discrete) -> Tensor:
        """Return the kernel (Ch, length, H)."""
        of = (self.params, self.key, length, self.choices, self.dtype)
        return kernel(*of) if self.stored else dense_kernel(*of, discrete)

    def _response(self, A: Tensor, column: Tensor, h: Tensor, length: int) -> Tensor:
        """Return the response (..., L, Ch, H) to an initial state."""
        l_kernel = self.choices.l_kernel
        if self.stored and l_kernel is not None and length <= l_kernel:
            # a kernel whose B makes B_bar = A_bar h: then C~ will do
            s = system(self.params, self.dtype, self.choices)
            C = _s4.readout(self.params, self.key, self.dtype)
            K = _dplr_kernel.kernel(C, s, l_kernel, _dplr.before_the_first_step(s, h))
            return K[..., :length, :].movedim(-3, -2)
        C = true_readout(self.params, self.key, self.choices).to(A.dtype)
        first = A @ _dense_blocks.columns(column).to(A.dtype)
        K = _dense_blocks.kernel(C, A, first, length)  # (H, Ch, L, B)
        return K.permute(3, 2, 1, 0).reshape(*h.shape[:-2], length, *K.shape[1::-1]).to(self.dtype)

    def blocks(
        self, x: Tensor, h: Tensor, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run by blocks of time."""
        A, b = self.dense()
        C = true_readout(self.params, self.key, self.choices).to(self.dtype)
        if reset is not None:
            table = _dense_resets.krylov(A, b, x.shape[-2], self.dtype)
            y, last = _dense_resets.scan(table, C, x, _dplr.column(h), lengths, reset)
            return y, _dplr.halves(last)
        table = _dense_blocks.krylov(A, b, x.shape[-2], x.shape[:-2].numel(), self.dtype)
        y, last = _dense_blocks.scan(table, C, x, _dplr.column(h), lengths)
        return y, _dplr.halves(last)

    def loop(self, x: Tensor, h: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Run step by step."""
        length = x.shape[-2]
        read = reader(self.params, self.key, self.choices, self.dtype)
        reset, mask = layout.resets(length), layout.valid(length)
        if layout.timesteps is None:
            return reference.state_scan(self._advance(), read, x, h, reset, mask)
        parts: list[Tensor] = []
        for start in range(0, length, TIMED_BLOCK):
            cut = slice(start, start + TIMED_BLOCK)
            at = transition(self.params, self.dtype, self.choices, layout.timesteps[..., cut])
            y, h = reference.state_scan(
                _timed(at), read, x[..., cut, :], h,
                None if reset is None else reset[..., cut],
                None if mask is None else mask[..., cut],
            )  # fmt: skip
            parts.append(y)
        return torch.cat(parts, dim=-3), h

    def _advance(self) -> Callable[[int, Tensor, Tensor], Tensor]:
        if self.discrete is None:
            at = transition(self.params, self.dtype, self.choices)
            return lambda t, h, u: at.advance(h, u)
        A, b = (t.to(self.dtype) for t in self.discrete)
        As = A.unbind(-4) if A.ndim > 3 else None
        bs = b.unbind(-3) if b.ndim > 2 else None

        def advance(t: int, h: Tensor, u: Tensor) -> Tensor:
            return dense_step((A if As is None else As[t], b if bs is None else bs[t]), h, u)

        return advance


def _timed(at: Transition) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Return the step of transitions (..., L, [R,] H, M); B may be the same at all times."""
    # unbind, for the derivative of a select is as large as what it was taken from
    a, U, V = at.a.unbind(-3), at.U.unbind(-4), at.V.unbind(-4)
    B = at.B.unbind(-3) if at.B.ndim > 2 else None

    def advance(t: int, h: Tensor, u: Tensor) -> Tensor:
        return Transition(a[t], U[t], V[t], at.B if B is None else B[t]).advance(h, u)

    return advance


def run(
    direction: Direction,
    x: Tensor,
    state: Tensor | None,
    layout: Layout,
    mode: str,
    K: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Return y (..., L, Ch, H) without D, and the final state (..., H, M), in one direction.

    A convolution takes ``size`` samples at once.
    """
    length, D = x.shape[-2], direction.params["D"]
    shape = x.shape[:-2] + direction.params["C_re"].shape[-2:]
    h = x.new_zeros(shape, dtype=complex_of(x.dtype)) if state is None else state
    h = h.to(complex_of(x.dtype))
    if not length:
        return x.new_zeros(*x.shape[:-1], D.numel() // D.shape[-1], D.shape[-1]), h
    if mode == "conv":
        return direction.convolve(x, None if state is None else h, K, layout, size)
    given = direction.discrete is not None and direction.discrete[0].ndim > 3
    if mode == "recurrent" or layout.timesteps is not None or given:
        return direction.loop(x, h, layout)
    reset = layout.resets(length)
    if layout.mask is None:
        return direction.blocks(x, h, layout.lengths, reset)
    valid = layout.valid(length)
    closed = Compaction.of((layout.mask if valid is None else valid).expand(x.shape[:-1]))
    if reset is not None:
        reset = closed.close(reset.expand(x.shape[:-1]))
    y, last = direction.blocks(closed.close(x), h, closed.lengths, reset)
    # at padding the state of the last sample is read again: the other direction moves it on by one
    closed = closed._replace(mask=closed.mask.cumsum(-1) > 0)
    return closed.open(y.flatten(-2)).unflatten(-1, y.shape[-2:]), last
