# SPDX-License-Identifier: MIT
"""The selective scan as leaf operators in pure PyTorch.

Time runs in chunks of `CHUNK` steps. Only one chunk's coefficients and states (T, E, N) exist at a
time: the forward keeps the state before every chunk, and the backward recomputes a chunk from it.
Compiled backends keep the same contract.

The arguments are those of `lrnnx_core.ops.selective_scan`, brought to fixed ranks:

    u, dt, z   (*batch, L, E)             A          (*shared, E, N)
    B, C       (*batch, L or 1, G, N)     D, dt_bias (*shared, E)
    decay_dt   (*batch, L or 1, E)        h0         (*batch, E, N)
    timesteps, reset (*batch, L)

where ``shared`` is a leading part of ``batch`` (what a vmap over parameters adds), and channel d
belongs to group d // (E/G). Inside, batch is (P, R): the shared axes and the others.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.discretize import FUSED

CHUNK = 32


class Arguments(NamedTuple):
    """The arguments of the leaf operator, in its order; the forward has one more, see there."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    h0: Tensor | None
    decay_dt: Tensor | None
    timesteps: Tensor | None
    reset: Tensor | None
    softplus: bool
    state_only: bool
    scheme: str


class Gradients(NamedTuple):
    """What the backward leaf returns; None where the input was None."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    h0: Tensor
    decay_dt: Tensor | None
    timesteps: Tensor | None


class _Problem:
    """The arguments as (P, R, L, ...) in the dtype of the computation, cut into chunks."""

    def __init__(self, x: Arguments) -> None:
        u, A = x.u, x.A
        batch, shared = u.shape[:-2], A.ndim - 2
        self.P, self.R = math.prod(batch[:shared]), math.prod(batch[shared:])
        (self.L, self.E), self.N = u.shape[-2:], A.shape[-1]
        self.real = torch.promote_types(torch.promote_types(u.dtype, A.real.dtype), torch.float32)
        self.state = torch.promote_types(self.real, A.dtype)
        self.softplus, self.state_only, self.scheme = x.softplus, x.state_only, FUSED[x.scheme]
        self.u, self.dt, self.z = self.rows(u, 2), self.rows(x.dt, 2), self.maybe_rows(x.z, 2)
        self.B, self.C = self.rows(x.B, 3), self.rows(x.C, 3)
        self.decay_dt = self.maybe_rows(x.decay_dt, 2)
        self.timesteps = self.maybe_rows(x.timesteps, 1)
        self.reset = self.maybe_rows(x.reset, 1)
        self.A = A.to(self.state).reshape(self.P, 1, 1, self.E, self.N)
        self.D, self.bias = self.parameter(x.D), self.parameter(x.dt_bias)
        zeros = u.new_zeros(self.P, self.R, self.E, self.N, dtype=self.state)
        self.h0 = zeros if x.h0 is None else x.h0.to(self.state).reshape(zeros.shape)

    def rows(self, t: Tensor, tail: int) -> Tensor:
        return t.reshape(self.P, self.R, *t.shape[t.ndim - tail :])

    def maybe_rows(self, t: Tensor | None, tail: int) -> Tensor | None:
        return None if t is None else self.rows(t, tail)

    def parameter(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(self.real).reshape(self.P, 1, 1, self.E)

    def cut(self, t: Tensor, c: slice) -> Tensor:
        """Return the steps of a chunk (all of them where constant), in the dtype to compute in."""
        t = t[:, :, c] if t.shape[2] == self.L else t
        return t.to(torch.promote_types(t.dtype, self.real))

    def chunks(self) -> list[slice]:
        return [slice(t, min(t + CHUNK, self.L)) for t in range(0, self.L, CHUNK)]


class _Chunk:
    """The coefficients of one chunk."""

    def __init__(self, p: _Problem, c: slice) -> None:
        self.u, raw = p.cut(p.u, c), p.cut(p.dt, c)
        self.B, self.C = p.cut(p.B, c), p.cut(p.C, c)
        self.raw = raw if p.bias is None else raw + p.bias
        self.delta = torch.nn.functional.softplus(self.raw) if p.softplus else self.raw
        self.decay_step = self.delta if p.decay_dt is None else p.cut(p.decay_dt, c)
        self.tau = None if p.timesteps is None else p.cut(p.timesteps, c).unsqueeze(-1)
        dd, di = self.decay_step, self.delta
        if self.tau is not None:
            dd = self.tau * dd
            di = di if p.state_only else self.tau * di
        self.dd, self.di = dd.unsqueeze(-1), di.unsqueeze(-1)
        self.x = self.dd * p.A
        self.a = p.scheme.decay(self.x).expand(*self.u.shape, p.N)
        self.y = None if p.scheme.gain is None else self.di * p.A
        if p.scheme.gain is not None and self.y is not None:
            self.gamma = self.di * p.scheme.gain(self.y)
        else:
            self.gamma = self.di if p.scheme.scaled else torch.ones_like(self.di)
        self.reset = None if p.reset is None else p.reset[:, :, c, None, None]
        self.z = None if p.z is None else p.cut(p.z, c)

    def spread(self, t: Tensor) -> Tensor:
        """Bring B or C to every channel: (..., T, G, N) -> (..., T, E, N), a view for one group."""
        per = self.u.shape[-1] // t.shape[-2]
        wide = t.unsqueeze(-2).expand(*t.shape[:-1], per, t.shape[-1])
        return wide.flatten(-3, -2)

    def states(self, p: _Problem, h: Tensor) -> Tensor:
        """Return the states (P, R, T, E, N) of this chunk from the one before it."""
        hs = (self.gamma * self.u.unsqueeze(-1) * self.spread(self.B)).to(p.state)
        hs = hs.clone() if hs.stride(2) == 0 else hs
        for t in range(hs.shape[2]):
            if self.reset is not None:
                h = h.masked_fill(self.reset[:, :, t], 0)
            h = torch.addcmul(hs[:, :, t], self.a[:, :, t], h, out=hs[:, :, t])
        return hs

    def read(self, p: _Problem, hs: Tensor) -> Tensor:
        """Return sum_n C h (2 Re of it for complex states) + D u, (P, R, T, E)."""
        grouped = hs.unflatten(-2, (self.C.shape[3], -1))
        out = torch.matmul(grouped, self.C.to(p.state).unsqueeze(-1)).squeeze(-1).flatten(-2)
        out = 2 * out.real if out.is_complex() else out
        return out if p.D is None else out + p.D * self.u


def selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: y (*batch, L, E), h_last (*batch, E, N), and the state before every chunk, flat.

    The last argument says whether these states are kept for a backward; none are if not.
    """
    x, keep = Arguments(*arguments[:-1]), arguments[-1]
    p, u = _Problem(x), x.u
    y = torch.empty((p.P, p.R, p.L, p.E), dtype=u.dtype, device=u.device)
    spans = p.chunks()
    kept = p.h0.new_empty(p.P, p.R, len(spans) if keep else 0, p.E, p.N)
    h = p.h0
    for i, c in enumerate(spans):
        if keep:
            kept[:, :, i] = h
        k = _Chunk(p, c)
        hs = k.states(p, h)
        h = hs[:, :, -1]
        out = k.read(p, hs)
        y[:, :, c] = out if k.z is None else out * torch.nn.functional.silu(k.z)
    batch = u.shape[:-2]
    return (
        y.reshape(u.shape),
        h.reshape(*batch, p.E, p.N).clone(),
        kept.reshape(*batch, kept.shape[2] * p.E * p.N),
    )


def selective_scan_backward(
    checkpoints: Tensor, grad_y: Tensor, grad_last: Tensor, *arguments: Any
) -> Gradients:
    """Leaf: all gradients, by the formulas of the adjoint, chunk by chunk from the end.

    With P_t = lam_t conj(h_{t-1}) = dL/dA_bar and Q_t = lam_t conj(B_t u_t) = dL/dgamma, the chain
    through A_bar = decay(dd A) and gamma = di gain(di A) gives the steps and A; see `Fused`.
    """
    x = Arguments(*arguments)
    p = _Problem(x)
    kept = checkpoints.reshape(p.P, p.R, -(-p.L // CHUNK), p.E, p.N)
    gy_all = p.rows(grad_y, 2)
    s = grad_last.to(p.state).reshape(p.h0.shape)
    out = _Accumulator(p)
    spans = p.chunks()
    for i in reversed(range(len(spans))):
        c = spans[i]
        k = _Chunk(p, c)
        hs = k.states(p, kept[:, :, i])
        gy = p.cut(gy_all, c)
        if k.z is not None:
            gate = torch.sigmoid(k.z)
            out.put("z", c, gy * k.read(p, hs) * gate * (1 + k.z * (1 - gate)))
            gy = gy * k.z * gate
        lam, s = _adjoint(p, k, gy, s)
        previous = torch.cat([kept[:, :, i].unsqueeze(2), hs[:, :, :-1]], dim=2)
        if k.reset is not None:
            previous = previous.masked_fill(k.reset, 0)
        _gradients(p, k, c, out, gy, hs, lam, previous)
    return out.finish(s, x)


def _adjoint(p: _Problem, k: _Chunk, gy: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return lam (P, R, T, E, N), and conj(a) lam of the first step, for the chunk before."""
    C = k.spread(k.C).to(p.state)
    lam = gy.unsqueeze(-1) * (2 * C.conj_physical() if C.is_complex() else C)
    lam = lam.to(p.state)
    a = k.a.conj_physical() if p.state.is_complex else k.a
    for t in reversed(range(lam.shape[2])):
        row = lam[:, :, t]
        row += s
        s = a[:, :, t] * row
        if k.reset is not None:
            s = s.masked_fill(k.reset[:, :, t], 0)
    return lam, s


def _gradients(
    p: _Problem,
    k: _Chunk,
    c: slice,
    out: _Accumulator,
    gy: Tensor,
    hs: Tensor,
    lam: Tensor,
    previous: Tensor,
) -> None:
    scheme, u = p.scheme, k.u.unsqueeze(-1)
    slope = scheme.decay_slope(k.x, k.a)
    w = lam * (previous * slope).conj_physical()
    g_dd = _real((w * p.A.conj_physical()).sum(-1))
    g_A = (w * k.dd).sum(2)
    lam_B = lam * k.spread(k.B).conj_physical()
    if scheme.gain_dt is not None and scheme.gain_slope is not None and k.y is not None:
        q = lam_B * u
        g_di = _real((q * scheme.gain_dt(k.y).conj_physical()).sum(-1))
        g_A = g_A + (q * (k.di**2 * scheme.gain_slope(k.y)).conj_physical()).sum(2)
        g_u = _real((lam_B * k.gamma.conj_physical()).sum(-1))
    else:
        total = _real(lam_B.sum(-1))
        g_di = total * k.u if scheme.scaled else torch.zeros_like(k.u)
        g_u = total * k.gamma.squeeze(-1)
    if p.D is not None:
        out.add("D", (gy * k.u).sum(2, keepdim=True))
        g_u = g_u + p.D * gy
    out.put("u", c, g_u)
    out.add("A", g_A.unsqueeze(2))
    out.put("B", c, _per_group(lam * k.gamma.conj_physical() * u, k.B))
    g_C = gy.unsqueeze(-1) * (2 * hs.conj_physical() if hs.is_complex() else hs)
    out.put("C", c, _per_group(g_C, k.C))
    g_delta = g_di
    if k.tau is not None:
        g_tau = (g_dd * k.decay_step).sum(-1)
        g_dd = k.tau * g_dd
        if not p.state_only:
            g_tau = g_tau + (g_di * k.delta).sum(-1)
            g_delta = k.tau * g_di
        out.put("timesteps", c, g_tau)
    if p.decay_dt is None:
        g_delta = g_delta + g_dd
    else:
        out.put("decay_dt", c, g_dd)
    if p.softplus:
        g_delta = g_delta * torch.sigmoid(k.raw)
    out.put("dt", c, g_delta)
    if p.bias is not None:
        out.add("dt_bias", g_delta.sum(2, keepdim=True))


class _Accumulator:
    """Collects gradients in the accumulation dtype: per step, or summed over steps."""

    def __init__(self, p: _Problem) -> None:
        self.p = p
        self.steps: dict[str, list[tuple[slice, Tensor]]] = {}
        self.sums: dict[str, Tensor] = {}

    def put(self, name: str, c: slice, value: Tensor) -> None:
        source: Tensor = getattr(self.p, name)
        if value.is_complex() and not source.is_complex():
            value = value.real
        if source.shape[2] != self.p.L:
            self.add(name, value.sum(2, keepdim=True))
        else:
            self.steps.setdefault(name, []).append((c, value.to(source.dtype)))

    def add(self, name: str, value: Tensor) -> None:
        if name in ("A", "D", "dt_bias"):
            value = value.sum(1, keepdim=True)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def finish(self, s: Tensor, x: Arguments) -> Gradients:
        done: dict[str, Tensor | None] = {}
        for name in Gradients._fields:
            like = getattr(x, name)
            if name == "h0":
                done[name] = s.reshape(*x.u.shape[:-2], self.p.E, self.p.N).clone()
            elif not isinstance(like, Tensor):
                done[name] = None
            elif name in self.steps:
                parts = [v for _, v in sorted(self.steps[name], key=lambda part: part[0].start)]
                done[name] = torch.cat(parts, dim=2).reshape(like.shape)
            elif name in self.sums:
                done[name] = _real_if(self.sums[name], like).to(like.dtype).reshape(like.shape)
            else:
                done[name] = torch.zeros_like(like)
        return Gradients(**done)  # pyright: ignore[reportArgumentType]


def _per_group(t: Tensor, like: Tensor) -> Tensor:
    """Sum (..., E, N) over the channels of each group of ``like`` (..., G, N)."""
    return t.unflatten(-2, (like.shape[-2], -1)).sum(-2)


def _real(t: Tensor) -> Tensor:
    return t.real if t.is_complex() else t


def _real_if(t: Tensor, like: Tensor) -> Tensor:
    return t if like.is_complex() else _real(t)
