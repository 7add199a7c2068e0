# SPDX-License-Identifier: MIT
"""A diagonal scan between its two projections, in one operator: what S5 and LRU run.

    y = C scan(B u) + C2 scan_backwards(B u) + D u

on real halves, `diagonal_scan` in the middle; the second term is a bidirectional model's. It is one
operator for its gradients: both directions share the drive B u and its gradient, and those of u
through B and through D meet in one pass over memory, with that of D. The leaves are matrix products
around the leaves of `diagonal_scan`, whose backends they share.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrnnx_core.backends import blocked_diagonal, cuda_feedthrough, library
from lrnnx_core.backends.transforms import allow_in_graph, full_precision
from lrnnx_core.ops._fused import Signature, fused
from lrnnx_core.ops.diagonal_scan import diagonal_scan


class Arguments(NamedTuple):
    """The arguments of the leaf operator, in its order; ``C2``, ``later``, ``ends``: `Backwards`'.

    The leaf takes what `projected_scan` says, and each of B, C, C2, D, A and steps with a leading
    part of the batch axes in front (what a vmap over parameters adds).
    """

    u: Tensor
    B: Tensor
    C: Tensor
    C2: Tensor | None
    D: Tensor | None
    A: Tensor
    steps: Tensor | None
    dt: Tensor | None
    h0: Tensor | None
    timesteps: Tensor | None
    later: Tensor | None
    reset: Tensor | None
    ends: Tensor | None
    mask: Tensor | None
    state_only: bool
    scheme: str

    @property
    def wants_drive(self) -> bool:
        """Whether the backward reads the drive."""
        return self.scheme not in ("none", "dirac")

    def scan(self, x: Tensor, reverse: bool) -> blocked_diagonal.Arguments:
        """Return the arguments of the scan of the drive x in one direction."""
        own = (None, self.later, self.ends) if reverse else (self.h0, self.timesteps, self.reset)
        return blocked_diagonal.Arguments(
            x, self.A, self.steps, self.dt, *own, self.mask, self.state_only, self.scheme, reverse
        )


class Backwards(NamedTuple):
    """The direction against time; it begins with a zero state after the last sample.

    Attributes:
        C: (H_out, 2S), its readout.
        integration_timesteps: (..., L), from each sample to the next one, in time's order.
        reset: (..., L), where a document ends: the state is cleared before that sample is taken in.
    """

    C: Tensor
    integration_timesteps: Tensor | None = None
    reset: Tensor | None = None


def projected_scan(
    u: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    A: Tensor,
    dt: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    discretization: str = "none",
    integration_timesteps: Tensor | None = None,
    timestep_mode: str = "both",
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backwards: Backwards | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y_t = C h_t + D u_t over h_t = a_t h_{t-1} + gamma_t B u_t in halves.

    The arguments are taken as they are: one real dtype, float32 or float64, one complex one, and
    equal batch axes.

    Args:
        u: (..., L, H).
        B: (2S, H), the real rows and then the imaginary ones.
        C: (H_out, 2S).
        D: (H,) with H_out = H, or None.
        A: (S,), complex; as dt and what follows in `diagonal_scan`.
        dt: (S,) or (..., L, S).
        h0: (..., S).
        discretization: the scheme.
        integration_timesteps: (..., L).
        timestep_mode: ``both`` or ``state_only``.
        reset: (..., L).
        mask: (..., L), of both directions.
        backwards: what a second direction has of its own, whose C h is added; timesteps where
            `integration_timesteps` are given.

    Returns:
        y (..., L, H_out) and the last state (..., S), of the direction of time.
    """
    varying = dt is not None and dt.ndim > 1
    steps, dt = (None, dt) if varying else (dt, None)
    C2, later, ends = (None, None, None) if backwards is None else backwards
    return _projected_scan(
        u, B, C, C2, D, A, steps, dt, h0, integration_timesteps, later, reset, ends, mask,
        timestep_mode == "state_only", discretization,
    )  # fmt: skip


def _composite(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Compose the operator of differentiable pieces: right to any order."""
    p = Arguments(*arguments)
    x = linear(p.u, p.B)

    def scan(reverse: bool) -> tuple[Tensor, Tensor]:
        q = p.scan(x, reverse)
        return diagonal_scan(
            x, q.A, q.dt if q.steps is None else q.steps, q.h0, discretization=q.scheme,
            integration_timesteps=q.timesteps, reset=q.reset, mask=q.mask, reverse=reverse,
            timestep_mode="state_only" if q.state_only else "both",
        )  # fmt: skip

    h, last = scan(False)
    y = linear(h, p.C)
    if p.C2 is not None:
        y = y + linear(scan(True)[0], p.C2)
    return y if p.D is None else torch.addcmul(y, p.D, p.u), last


def _default(*arguments: Any) -> tuple[Tensor, ...]:
    """Leaf: y, the last state; and for the backward both h and, if that wants it, the drive."""
    p = Arguments(*arguments)
    with full_precision(p.u.device):
        x = _project(p.u, p.B)
        h, last = torch.ops.lrnnx_core.diagonal_scan.default(*p.scan(x, False))
        y, h2 = _project(h, p.C), x.new_empty((*x.shape[:-2], 0))
        if p.C2 is not None:
            h2, _ = torch.ops.lrnnx_core.diagonal_scan.default(*p.scan(x, True))
            _add_projected(y, h2, p.C2)
        if p.D is not None:
            y.addcmul_(_beside(p.D, p.u), p.u)
        return y, last, h, h2, x if p.wants_drive else x.new_empty((*x.shape[:-2], 0))


def _default_backward(
    h: Tensor, h2: Tensor, x: Tensor, grad_y: Tensor, grad_last: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    p = Arguments(*arguments)
    u, B, C, C2, D, *_ = p
    scan_backward = torch.ops.lrnnx_core.diagonal_scan_backward.default
    with full_precision(u.device):
        dx, dA, dsteps, ddt, dh0, dtimesteps = scan_backward(
            h, _project(grad_y, C.mT), grad_last, *p.scan(x if p.wants_drive else h, False)
        )
        dC, dC2, dlater = _outer(grad_y, h, C), u.new_empty(0), u.new_empty(0)
        if C2 is not None:
            # no one asks for the state before the first sample: a zero of its own dtype
            end = torch.zeros_like(grad_last)
            found = scan_backward(
                h2, _project(grad_y, C2.mT), end, *p.scan(x if p.wants_drive else h2, True)
            )
            dC2, dlater = _outer(grad_y, h2, C2), found[5]
            for total, more in zip((dx, dA, dsteps, ddt), found, strict=False):
                total.add_(more)
        dB, du = _outer(dx, u, B), _project(dx, B.mT)
        if D is None:
            dD = du.new_empty(0)
        elif cuda_feedthrough.usable(du):
            dD = cuda_feedthrough.add_gradients(du, grad_y, u, D)
        else:
            du.addcmul_(_beside(D, u), grad_y)
            dD = (grad_y * u).sum(tuple(range(D.ndim - 1, u.ndim - 1)))
        return du, dB, dC, dC2, dD, dA, dsteps, ddt, dh0, dtimesteps, dlater


def _project(x: Tensor, W: Tensor) -> Tensor:
    """Multiply x (*shared, ..., L, I) by W (*shared, O, I)."""
    if W.ndim == 2:
        return linear(x, W)
    return torch.matmul(x, W.view(*W.shape[:-2], *(1,) * (x.ndim - W.ndim), *W.shape[-2:]).mT)


def _add_projected(y: Tensor, x: Tensor, W: Tensor) -> None:
    """Add `_project` to y, which is contiguous, in place."""
    if W.ndim == 2:
        y.view(-1, y.shape[-1]).addmm_(x.view(-1, x.shape[-1]), W.mT)
    else:
        y.add_(_project(x, W))


def _outer(g: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """Sum g x^T (*shared, O, I) over everything else."""
    rows = math.prod(W.shape[:-2])
    g, x = (t.reshape(rows, t.numel() // max(rows * t.shape[-1], 1), t.shape[-1]) for t in (g, x))
    return torch.bmm(g.mT, x).view(W.shape) if rows > 1 else (g[0].mT @ x[0]).view(W.shape)


def _beside(parameter: Tensor, x: Tensor) -> Tensor:
    """(*shared, H) -> (*shared, 1, ..., 1, H), which broadcasts with x (*batch, L, H)."""
    return parameter.view(
        *parameter.shape[:-1], *(1,) * (x.ndim - parameter.ndim), parameter.shape[-1]
    )


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    p = Arguments(*arguments)
    u, batch, width = p.u, p.u.shape[:-2], p.B.shape[-2]

    def states(wanted: bool) -> Tensor:
        return u.new_empty((*u.shape[:-1], width) if wanted else (*batch, 0))

    return (
        u.new_empty((*u.shape[:-1], p.C.shape[-2])),
        p.A.new_empty((*batch, p.A.shape[-1])),
        states(True),
        states(p.C2 is not None),
        states(p.wants_drive),
    )


def _fake_backward(
    h: Tensor, h2: Tensor, x: Tensor, grad_y: Tensor, grad_last: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    like = [grad_y.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest[:11]]
    like[8] = grad_last.new_empty(grad_last.shape)
    return tuple(like)


_ARGUMENTS = library.parameters(Arguments)
_leaf = library.define(
    f"projected_scan({_ARGUMENTS}) -> ({', '.join(['Tensor'] * 5)})",
    default=_default,
    fake=_fake,
)
_leaf_backward = library.define(
    "projected_scan_backward(Tensor h, Tensor h2, Tensor x, Tensor grad_y, Tensor grad_last, "
    f"{_ARGUMENTS}) -> ({', '.join(['Tensor'] * 11)})",
    default=_default_backward,
    fake=_fake_backward,
)
_apply = fused(
    _leaf,
    _leaf_backward,
    _composite,
    Signature(tensors=14, differentiable=11, choices=2, outputs=2, remembered=(2, 3, 4)),
)


def _projected_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, last = _apply(*arguments)
    return y, last


allow_in_graph(_projected_scan)
cuda_feedthrough.implement()
