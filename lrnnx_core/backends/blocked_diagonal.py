# SPDX-License-Identifier: MIT
"""The diagonal scan h_t = decay_t h_{t-1} + gain_t x_t as leaf operators in pure PyTorch.

The arguments are those of `lrnnx_core.ops.diagonal_scan`, brought to fixed ranks and dtypes:

    x         (*batch, L, 2S)  real, [re | im] halves of the drive
    A         (*shared, S)     complex, at least complex64, complex128 where x is float64
    steps     (*shared, S)     the step where it is constant in time
    dt        (*batch, L, S)   the step where it varies (at most one of the two)
    h0        (*batch, S)      in A's dtype
    timesteps (*batch, L)      tau
    reset, mask (*batch, L)    bool

steps, dt and timesteps have the dtype of A's parts; ``shared`` is a leading part of ``batch`` (what
a vmap over parameters adds). ``scheme`` is ``none`` (decay A, gain 1; no steps, no timesteps) or of
`FUSED`: with d = steps or dt (1 if neither is given), decay_t = decay(A dd), dd = tau d, and gain_t
= di gain(A di), di = d if ``state_only`` else tau d. ``reverse`` runs from the last step to the
first, with h_{t+1} for h_{t-1}. The forward keeps nothing but its output, and
the backward forms the coefficients again. With lam the cotangent of h and PyTorch's complex
convention,

    w = lam_t conj(h_{t-1} decay'(A dd)),  d dd = Re(w conj(A)),      dA += w dd
    q = lam_t conj(x_t),  d di = Re(q conj(d gain_t / d di)),         dA += q conj(d gain_t / d A)
    d x_t = lam_t conj(gain_t)

A compiled backend keeps the same contract, and makes nothing else of the size of h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends.transforms import full_precision
from lrnnx_core.discretize import FUSED


class Arguments(NamedTuple):
    """The arguments of the leaf operator, in its order."""

    x: Tensor
    A: Tensor
    steps: Tensor | None
    dt: Tensor | None
    h0: Tensor | None
    timesteps: Tensor | None
    reset: Tensor | None
    mask: Tensor | None
    state_only: bool
    scheme: str
    reverse: bool = False

    @property
    def tensors(self) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """All but the choices."""
        return self[:-3]

    @property
    def marks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Timesteps, reset and mask: one number a step."""
        return self[5:8]


class Gradients(NamedTuple):
    """What the backward leaf returns; None where the input was None."""

    x: Tensor
    A: Tensor
    steps: Tensor | None
    dt: Tensor | None
    h0: Tensor
    timesteps: Tensor | None


class _Coefficients(NamedTuple):
    """(*batch, L or 1, S) each, or broadcasting to it; the padding of a mask is not in them."""

    A: Tensor
    d: Tensor
    tau: Tensor | None
    dd: Tensor
    di: Tensor
    decay: Tensor
    gain: Tensor | None  # None stands for 1


def diagonal_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Leaf: all states h (*batch, L, 2S) as [re | im] halves, and the last one (*batch, S)."""
    p = Arguments(*arguments)
    k = _coefficients(p)
    b = _pairs(p.x, p.A)
    if k.gain is not None:
        b.mul_(k.gain)
    if p.mask is not None:
        b.masked_fill_(~p.mask.unsqueeze(-1), 0)
    a = _kept(k.decay, b, p.mask)
    h, last = torch.ops.lrnnx_core.linear_scan.default(a, b, p.h0, p.reset, p.reverse)
    return _halves(h).to(p.x.dtype), last


def diagonal_scan_backward(
    h: Tensor, grad_h: Tensor, grad_last: Tensor, *arguments: Any
) -> Gradients:
    """Leaf: the gradients of `diagonal_scan`."""
    p = Arguments(*arguments)
    x, A, mask, scheme = p.x, p.A, p.mask, p.scheme
    k = _coefficients(p)
    states = _pairs(h, A)
    da, lam, dh0 = torch.ops.lrnnx_core.linear_scan_backward.default(
        _kept(k.decay, states, mask), states, p.h0, p.reset, _pairs(grad_h, A), grad_last, p.reverse
    )
    padding = None if mask is None else ~mask.unsqueeze(-1)
    if padding is not None:
        lam.masked_fill_(padding, 0)
        da = da.masked_fill_(padding, 0)
    dx = lam if k.gain is None else lam * k.gain.conj_physical()
    dx = _halves(dx).to(x.dtype)
    if scheme == "none":
        return Gradients(dx, _summed(da, A), None, None, dh0, None)
    w = da.mul_(FUSED[scheme].decay_slope(k.dd * k.A, k.decay).conj_physical())
    d_dd = (w * k.A.conj_physical()).real
    dA = _summed(w * k.dd, A)
    d_di = None
    if FUSED[scheme].scaled:
        q = lam.mul_(_pairs(x, A).conj_physical())
        if padding is not None:
            q.masked_fill_(padding, 0)
        d_di, more = _gain_gradients(q, k, scheme)
        dA = dA if more is None else dA.add_(_summed(more, A))
    through, dtau = d_dd if k.tau is None else d_dd * k.tau, None
    if k.tau is not None:
        elapsed = d_dd * k.d
        if d_di is not None and not p.state_only:
            elapsed, d_di = elapsed + d_di * k.d, d_di * k.tau
        dtau = elapsed.sum(-1)
    dsteps = None if p.steps is None else _summed(through, p.steps)
    if dsteps is not None and p.steps is not None and d_di is not None:
        dsteps = dsteps + _summed(d_di, p.steps)  # not always of the shape of the other
    ddt = None if p.dt is None else through if d_di is None else through + d_di
    return Gradients(dx, dA, dsteps, ddt, dh0, dtau)


def gradients(h: Tensor, grad_h: Tensor, grad_last: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Leaf: `diagonal_scan_backward` with an empty tensor in the place of None."""
    with full_precision(h.device):  # a backward pass may be run inside of an autocast region
        found = diagonal_scan_backward(h, grad_h, grad_last, *arguments)
    # contiguous: real parts of complex numbers are not, and fake results are
    return tuple(grad_last.real.new_empty(0) if g is None else g.contiguous() for g in found)


def _gain_gradients(q: Tensor, k: _Coefficients, scheme: str) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of di and the terms of dA that come through the gain."""
    rule = FUSED[scheme]
    if rule.gain_dt is None or rule.gain_slope is None:
        return q.real, None
    y = k.di * k.A
    more = q * (k.di**2 * rule.gain_slope(y)).conj_physical()
    return (q * rule.gain_dt(y).conj_physical()).real, more


def _coefficients(p: Arguments) -> _Coefficients:
    A = _beside(p.A, p.x)
    if p.scheme == "none":
        one = A.real.new_ones(())
        return _Coefficients(A, one, None, one, one, A, None)
    dt, timesteps, mask = p.dt, p.timesteps, p.mask
    if mask is not None:  # whatever stands at padding, even NaN, reaches nothing
        dt = None if dt is None else dt.masked_fill(~mask.unsqueeze(-1), 1)
        timesteps = None if timesteps is None else timesteps.masked_fill(~mask, 1)
    d = dt
    if d is None:
        d = A.real.new_ones(()) if p.steps is None else _beside(p.steps, p.x)
    tau = None if timesteps is None else timesteps.unsqueeze(-1)
    dd = d if tau is None else tau * d
    di = d if p.state_only else dd
    rule = FUSED[p.scheme]
    gain = di * rule.gain(di * A) if rule.gain is not None else di if rule.scaled else None
    return _Coefficients(A, d, tau, dd, di, rule.decay(dd * A), gain)


def _kept(decay: Tensor, like: Tensor, mask: Tensor | None) -> Tensor:
    """Return the decay (*batch, L or 1, S), 1 where padding."""
    if mask is not None:
        return torch.where(mask.unsqueeze(-1), decay, torch.ones_like(decay)).expand(like.shape)
    length = decay.shape[-2] if decay.ndim > 1 else 1
    return decay.expand(*like.shape[:-2], length, like.shape[-1])


def _pairs(x: Tensor, A: Tensor) -> Tensor:
    """Turn [re | im] halves (..., 2S) into complex numbers (..., S) of A's dtype."""
    size = A.shape[-1]
    return torch.complex(*(half.to(A.real.dtype) for half in (x[..., :size], x[..., size:])))


def _halves(z: Tensor) -> Tensor:
    return torch.cat([z.real, z.imag], dim=-1)


def _beside(parameter: Tensor, x: Tensor) -> Tensor:
    """(*shared, S) -> (*shared, 1, ..., 1, S), which broadcasts with x (*batch, L, 2S)."""
    if parameter.ndim == 1:
        return parameter.unsqueeze(0)
    return parameter.view(*parameter.shape[:-1], *(1,) * (x.ndim - parameter.ndim), -1)


def _summed(g: Tensor, parameter: Tensor) -> Tensor:
    """Sum g (*batch, L or 1, S) to the shape of a parameter (*shared, S)."""
    return g.sum(dim=tuple(range(parameter.ndim - 1, g.ndim - 1)))
