# SPDX-License-Identifier: MIT
# pyright: basic
"""The diagonal scan's leaf operators, compiled; `blocked_diagonal` states the contract.

Where decay and gain are constant in time their tables of channels are formed here in PyTorch, and
the kernel's sums over time are chained to A and the steps here as well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrnnx_core.backends import blocked_diagonal
from lrnnx_core.backends.blocked_diagonal import Arguments
from lrnnx_core.backends.cpu import diagonal_lines as k
from lrnnx_core.backends.cpu import diagonal_steady, diagonal_timed, pool
from lrnnx_core.backends.cpu import selective_schemes as schemes
from lrnnx_core.backends.cpu.mathematics import SINCOS_RANGE
from lrnnx_core.backends.cpu.pointers import ONES, address, packed, rows
from lrnnx_core.discretize import FUSED

LEAST = 64  # channels of a block
# nanoseconds a state on one thread
STEADY, TIMED = (0.8, 1.6), (3.0, 8.0)


class _Call:
    """A call's arguments as a table of integers, and how it is dealt out to workers."""

    def __init__(self, p: Arguments, *, backward: bool) -> None:
        x, A, dt, timesteps, scheme = p.x, p.A, p.dt, p.timesteps, p.scheme
        self.reverse = p.reverse
        self.batch, (self.L, self.S) = x.shape[:-2], (x.shape[-2], A.shape[-1])
        shared = A.ndim - 1
        self.P, self.R = math.prod(self.batch[:shared]), math.prod(self.batch[shared:])
        self.Q, self.dtype, self.real = self.P * self.R, A.dtype, A.real.dtype
        self.steady = scheme == "none" or (dt is None and timesteps is None)
        self.scheme = -1 if self.steady else schemes.SCHEMES[scheme]
        self.same = self.scheme == schemes.ZOH and (timesteps is None or not p.state_only)
        self.gained = self.steady and scheme in FUSED and scheme != "dirac"
        cost = (STEADY if self.steady else TIMED)[backward]
        self.workers = pool.workers(
            self.Q * max(1, self.S // LEAST), self.Q * self.L * self.S * cost
        )
        blocks = 1
        if 4 * self.workers > self.Q:
            most = max(1, self.S // LEAST)
            even = (n for n in range(1, most + 1) if self.Q * n % self.workers == 0)
            blocks = next(even, most)
        self.block = -(-self.S // (blocks * k.LANES)) * k.LANES
        self.blocks = -(-self.S // self.block)
        self.table: list[int] = [0] * (k.FIELDS * len(k.SEQUENCES) + len(k.VALUES))
        self.alive: list[Tensor] = []
        size = self.real.itemsize
        self.set(
            inner=self.R, batches=self.Q, length=self.L, channels=self.S, itemsize=size,
            blocks=self.blocks, block=self.block, gained=self.gained, state_only=p.state_only,
            scratch_step=k.LINES * self.block * size,
        )  # fmt: skip
        timesteps, reset, mask = p.marks
        if p.reverse:  # numbers of steps stand in the order in which those are run
            timesteps, reset, mask = (None if t is None else t.flip(-1) for t in p.marks)
        self.hold(
            tables=self.tables(A, p.steps, scheme),
            h0=None if p.h0 is None else halves(p.h0.to(self.dtype)),
            times=packed(timesteps, self.real), reset=packed(reset, torch.bool),
            mask=packed(mask, torch.bool),
            scratch=torch.empty(self.workers * k.LINES * self.block, dtype=self.real),
        )  # fmt: skip
        self.sequence("x", x, 2 * self.S)
        if dt is not None:
            self.sequence("dt", dt, self.S)

    def tables(self, A: Tensor, steps: Tensor | None, scheme: str) -> Tensor:
        """Return A or the decay, the step and the gain, (P, 5, S)."""
        self.A, self.decay, self.d = A, A, torch.empty(0)
        found = A.new_empty((*A.shape[:-1], k.TABLES_EACH, self.S), dtype=self.real)
        if self.steady and scheme != "none":
            rule = FUSED[scheme]
            d = torch.ones_like(A.real) if steps is None else steps
            self.d, self.decay = d, rule.decay(d * A)
            gain = d * rule.gain(d * A) if rule.gain is not None else d.to(A.dtype)
            found[..., k.GAIN_RE, :], found[..., k.GAIN_IM, :] = gain.real, gain.imag
        elif not self.steady:
            found[..., k.STEP, :] = 1 if steps is None else steps
        found[..., k.A_RE, :], found[..., k.A_IM, :] = self.decay.real, self.decay.imag
        return found

    def set(self, **values: int) -> None:
        for name, value in values.items():
            self.table[k.FIELDS * len(k.SEQUENCES) + k.VALUES.index(name)] = int(value)

    def hold(self, **tensors: Tensor | None) -> None:
        """Set addresses of dense tensors, and keep those alive."""
        self.set(**{name: address(t) for name, t in tensors.items()})
        self.alive += [t for t in tensors.values() if t is not None]

    def sequence(self, name: str, t: Tensor, width: int) -> None:
        """Set a sequence (*batch, L, width), read where it lies if it can be."""
        kept, layout = rows(t, self.real, self.P, self.R, self.L, width)
        if self.reverse:  # from the last step on, backwards
            start, outer, inner, time = layout
            layout = start + (self.L - 1) * time, outer, inner, -time
        place = k.FIELDS * k.SEQUENCES.index(name)
        self.table[place : place + k.FIELDS] = layout
        self.alive.append(kept)

    def run(self, kernel: Any) -> None:
        items = self.Q * self.blocks
        table = np.array(self.table, dtype=np.int64)
        pool.run(kernel, self.workers, items, table, ONES[self.real])

    def complex(self, state: Tensor) -> Tensor:
        return torch.complex(state[..., : self.S], state[..., self.S :])


def halves(z: Tensor) -> Tensor:
    """Return complex numbers as [re | im]."""
    return torch.cat([z.real, z.imag], dim=-1)


def diagonal_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Leaf: as `blocked_diagonal.diagonal_scan`."""
    p = Arguments(*arguments)
    x = p.x
    if x.numel() == 0 or _turns_too_far(p):
        return blocked_diagonal.diagonal_scan(*p)
    call = _Call(p, backward=False)
    h = torch.empty(x.shape, dtype=call.real)
    last = torch.empty((*x.shape[:-2], x.shape[-1]), dtype=call.real)
    call.sequence("h", h, 2 * call.S)
    call.hold(last=last)
    timed = diagonal_timed.forward
    call.run(diagonal_steady.forward if call.steady else timed(call.scheme, call.same))
    return h.to(x.dtype), call.complex(last)


def diagonal_scan_backward(
    h: Tensor, grad_h: Tensor, grad_last: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Leaf: as `blocked_diagonal.gradients`."""
    p = Arguments(*arguments)
    x, A, dt = p.x, p.A, p.dt
    if x.numel() == 0 or _turns_too_far(p):
        return blocked_diagonal.gradients(h, grad_h, grad_last, *p)
    call = _Call(p, backward=True)
    real = call.real
    dx = torch.empty(x.shape, dtype=real)
    dh0 = torch.empty((*x.shape[:-2], x.shape[-1]), dtype=real)
    sums = torch.zeros((call.Q, k.SUMS_EACH, call.S), dtype=torch.float64)
    call.hold(dh0=dh0, last=halves(grad_last.to(A.dtype)).contiguous(), sums=sums)
    call.sequence("h", h, 2 * call.S)
    call.sequence("g", grad_h, 2 * call.S)
    call.sequence("dx", dx, 2 * call.S)
    ddt = None if dt is None else torch.empty(dt.shape, dtype=real)
    if ddt is not None:
        call.sequence("ddt", ddt, call.S)
    dtimes = None
    if p.timesteps is not None:
        dtimes = torch.empty((call.blocks, call.Q, call.L), dtype=real)
        call.hold(dtimes=dtimes)
    timed = diagonal_timed.backward
    call.run(diagonal_steady.backward if call.steady else timed(call.scheme, call.same))
    dtimes = dtimes.flip(-1) if dtimes is not None and call.reverse else dtimes
    total = sums.view(call.P, call.R, k.SUMS_EACH, call.S).sum(1).reshape(*A.shape[:-1], -1, call.S)
    first = torch.complex(total[..., 0, :], total[..., 1, :])
    if call.steady:
        dA, dsteps = _chained(call, first, total, p.scheme)
    else:
        dA, dsteps = first, total[..., 2, :].contiguous()
    # each absent gradient is a tensor of its own: results of an operator must not alias
    return (
        dx.to(x.dtype),
        dA.to(A.dtype),
        torch.empty(0, dtype=real) if p.steps is None else dsteps.to(real, copy=True),
        torch.empty(0, dtype=real) if ddt is None else ddt,
        call.complex(dh0),
        torch.empty(0, dtype=real)
        if dtimes is None
        else dtimes.sum(0).reshape(call.batch + (call.L,)),
    )


def _chained(call: _Call, w: Tensor, total: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Chain the gradients of a constant decay and gain to A and the step."""
    if scheme == "none":
        return w, total[..., 2, :].contiguous()
    rule, A, d = FUSED[scheme], call.A.to(torch.complex128), call.d.double()
    w = w * rule.decay_slope(d * A, call.decay.to(torch.complex128)).conj_physical()
    dA, dd = w * d, (w * A.conj_physical()).real
    if not rule.scaled:
        return dA, dd
    q = torch.complex(total[..., 2, :], total[..., 3, :])
    if rule.gain_dt is None or rule.gain_slope is None:
        return dA, dd + q.real
    dA = dA + q * (d**2 * rule.gain_slope(d * A)).conj_physical()
    return dA, dd + (q * rule.gain_dt(d * A).conj_physical()).real


def _turns_too_far(p: Arguments) -> bool:
    """Return whether an angle may be beyond the range of the kernels' sine and cosine."""
    if p.scheme in ("none", "bilinear") or (p.dt is None and p.timesteps is None):
        return False
    most = float((p.A.imag if p.steps is None else p.A.imag * p.steps).abs().max())
    if p.dt is not None:
        most *= _largest(p.dt)
    if p.timesteps is not None:
        most *= max(1.0, _largest(p.timesteps))
    return most > SINCOS_RANGE


def _largest(t: Tensor) -> float:
    low, high = torch.aminmax(t)
    return max(abs(float(low)), abs(float(high)))


def warm() -> None:
    """Compile every kernel: float32 and float64, forward and backward, each scheme."""
    for real in ONES:
        x, A = torch.ones(1, 2, dtype=real), torch.ones(1, dtype=real) * (-1 + 1j)
        one = torch.ones(1, dtype=real)
        for scheme in ("none", *FUSED):
            for state_only in (False, True) if scheme == "zoh" else (False,):
                times = None if scheme == "none" else one
                rest = (A, None, None, None, times, None, None, state_only, scheme)
                h, last = diagonal_scan(x, *rest)
                diagonal_scan_backward(h, h, last, x, *rest)
