# SPDX-License-Identifier: MIT
"""A diagonal scan between its two projections, in one operator: what S5 and LRU run.

    y = C scan(B u) + D u

on real halves, `diagonal_scan` in the middle. It is one operator for its gradients: those of u
through B and through D meet in one pass over memory, with that of D. The leaves are matrix
products around the leaves of `diagonal_scan`, whose backends they share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrnnx_core.backends import cuda_feedthrough, library
from lrnnx_core.backends.transforms import allow_in_graph, full_precision
from lrnnx_core.ops._fused import Signature, fused
from lrnnx_core.ops.diagonal_scan import diagonal_scan

TENSORS = 11  # as the schema has them; the first nine have gradients


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
        mask: (..., L).

    Returns:
        y (..., L, H_out) and the last state (..., S).
    """
    varying = dt is not None and dt.ndim > 1
    steps, dt = (None, dt) if varying else (dt, None)
    return _projected_scan(
        u, B, C, D, A, steps, dt, h0, integration_timesteps, reset, mask,
        timestep_mode == "state_only", discretization,
    )  # fmt: skip


def _composite(
    u: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    A: Tensor,
    steps: Tensor | None,
    dt: Tensor | None,
    h0: Tensor | None,
    timesteps: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor]:
    """Compose the operator of differentiable pieces: right to any order."""
    h, last = diagonal_scan(
        linear(u, B), A, dt if steps is None else steps, h0, discretization=scheme,
        integration_timesteps=timesteps, timestep_mode="state_only" if state_only else "both",
        reset=reset, mask=mask,
    )  # fmt: skip
    y = linear(h, C)
    return y if D is None else torch.addcmul(y, D, u), last


def _default(
    u: Tensor, B: Tensor, C: Tensor, D: Tensor | None, A: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Leaf: y, the last state; and for the backward h and, if that wants it, the drive."""
    with full_precision(u.device):
        x = _project(u, B)
        h, last = torch.ops.lrnnx_core.diagonal_scan.default(x, A, *rest)
        y = _project(h, C)
        if D is not None:
            y.addcmul_(_beside(D, u), u)
        return y, last, h, x if _wants_drive(rest[-1]) else x.new_empty((*x.shape[:-2], 0))


def _default_backward(
    h: Tensor,
    x: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    A: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    with full_precision(u.device):
        dx, dA, dsteps, ddt, dh0, dtimesteps = torch.ops.lrnnx_core.diagonal_scan_backward.default(
            h, _project(grad_y, C.mT), grad_last, x if _wants_drive(rest[-1]) else h, A, *rest
        )
        dC, dB = _outer(grad_y, h, C), _outer(dx, u, B)
        du = _project(dx, B.mT)
        if D is None:
            dD = du.new_empty(0)
        elif cuda_feedthrough.usable(du):
            dD = cuda_feedthrough.add_gradients(du, grad_y, u, D)
        else:
            du.addcmul_(_beside(D, u), grad_y)
            dD = (grad_y * u).sum(tuple(range(D.ndim - 1, u.ndim - 1)))
        return du, dB, dC, dD, dA, dsteps, ddt, dh0, dtimesteps


def _wants_drive(scheme: str) -> bool:
    return scheme not in ("none", "dirac")


def _project(x: Tensor, W: Tensor) -> Tensor:
    """Multiply x (*shared, ..., L, I) by W (*shared, O, I)."""
    if W.ndim == 2:
        return linear(x, W)
    return torch.matmul(x, W.view(*W.shape[:-2], *(1,) * (x.ndim - W.ndim), *W.shape[-2:]).mT)


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


def _fake(u: Tensor, B: Tensor, C: Tensor, D: Any, A: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, width = u.shape[:-2], B.shape[-2]
    return (
        u.new_empty((*u.shape[:-1], C.shape[-2])),
        A.new_empty((*batch, A.shape[-1])),
        u.new_empty((*u.shape[:-1], width)),
        u.new_empty((*u.shape[:-1], width) if _wants_drive(rest[-1]) else (*batch, 0)),
    )


def _fake_backward(
    h: Tensor, x: Tensor, grad_y: Tensor, grad_last: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    like = [grad_y.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest[:9]]
    like[7] = grad_last.new_empty(grad_last.shape)
    return tuple(like)


_ARGUMENTS = (
    "Tensor u, Tensor B, Tensor C, Tensor? D, Tensor A, Tensor? steps, Tensor? dt, Tensor? h0, "
    "Tensor? timesteps, Tensor? reset, Tensor? mask, bool state_only, str scheme"
)
_leaf = library.define(
    f"projected_scan({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    default=_default,
    fake=_fake,
)
_leaf_backward = library.define(
    "projected_scan_backward(Tensor h, Tensor x, Tensor grad_y, Tensor grad_last, "
    f"{_ARGUMENTS}) -> ({', '.join(['Tensor'] * 9)})",
    default=_default_backward,
    fake=_fake_backward,
)
_apply = fused(
    _leaf,
    _leaf_backward,
    _composite,
    Signature(tensors=TENSORS, differentiable=9, choices=2, outputs=2, remembered=(2, 3)),
)


def _projected_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, last = _apply(*arguments)
    return y, last


allow_in_graph(_projected_scan)
cuda_feedthrough.implement()
