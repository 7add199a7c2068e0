# SPDX-License-Identifier: MIT
"""The specification: plain loops over time in differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrnnx_core.types import Scheme


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype states are kept in: ``dtype``, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Run h_t = a_t h_{t-1} + b_t step by step; arguments as in the leaf operator."""
    dtype = state_dtype(b.dtype)
    length = b.shape[-2]
    h = b.new_zeros(b.shape[:-2] + b.shape[-1:], dtype=dtype) if h0 is None else h0.to(dtype)
    steps = [h] * length
    for t in reversed(range(length)) if reverse else range(length):
        if reset is not None:
            h = torch.where(reset.select(-1, t).unsqueeze(-1), torch.zeros_like(h), h)
        h = a.select(-2, min(t, a.shape[-2] - 1)).to(dtype) * h + b.select(-2, t).to(dtype)
        steps[t] = h
    hs = torch.stack(steps, dim=-2) if length else b.to(dtype)
    return hs.to(b.dtype), h


def state_scan(
    advance: Callable[[int, Tensor, Tensor], Tensor],
    read: Callable[[Tensor], Tensor],
    u: Tensor,
    h: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run any recurrence h_t = advance(t, h_{t-1}, u_t), y_t = read(h_t), step by step.

    u (..., L, H) with L >= 1, h (..., *S); reset and mask (..., L): cleared before, passed over.
    """
    outputs: list[Tensor] = []

    def at(flags: Tensor, t: int) -> Tensor:
        flags = flags.select(-1, t)
        return flags.reshape(flags.shape + (1,) * (h.ndim - u.ndim + 2))

    for t, u_t in enumerate(u.unbind(-2)):
        start = h if reset is None else torch.where(at(reset, t), torch.zeros_like(h), h)
        new = advance(t, start, u_t)
        h = new if mask is None else torch.where(at(mask, t), new, start)
        outputs.append(read(h))
    return torch.stack(outputs, dim=u.ndim - 2), h


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    decay_dt: Tensor | None,
    timesteps: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
    state_only: bool,
    scheme: Scheme,
) -> tuple[Tensor, Tensor]:
    """Run the selective scan step by step; arguments as in the leaf operator, A (E, N).

    h_t = A_bar_t h_{t-1} + gamma_t B_t u_t,  y_t = (sum_n C_t h_t + D u_t) silu(z_t).
    """
    real = torch.promote_types(state_dtype(u.dtype), A.real.dtype if A.is_complex() else A.dtype)
    kind = torch.promote_types(real, A.dtype)
    h = u.new_zeros(*u.shape[:-2], *A.shape, dtype=kind) if h0 is None else h0.to(kind)
    outputs: list[Tensor] = []

    def at(x: Tensor, t: int, axis: int) -> Tensor:
        x = x.select(axis, min(t, x.shape[axis] - 1))
        return x.to(torch.promote_types(x.dtype, real))

    for t in range(u.shape[-2]):
        x, delta = at(u, t, -2), at(dt, t, -2)
        delta = delta if dt_bias is None else delta + dt_bias
        delta = torch.nn.functional.softplus(delta) if softplus else delta
        decay = delta if decay_dt is None else at(decay_dt, t, -2)
        if timesteps is not None:
            tau = at(timesteps, t, -1).unsqueeze(-1)
            decay, delta = tau * decay, delta if state_only else tau * delta
        A_bar, gamma = scheme(A.to(kind), decay.unsqueeze(-1), delta.unsqueeze(-1))
        per = u.shape[-1] // B.shape[-2], u.shape[-1] // C.shape[-2]
        B_t, C_t = (at(m, t, -3).repeat_interleave(k, -2) for m, k in zip((B, C), per, strict=True))
        if reset is not None:
            h = torch.where(reset.select(-1, t)[..., None, None], torch.zeros_like(h), h)
        h = A_bar * h + gamma * B_t * x.unsqueeze(-1)
        y = (C_t * h).sum(-1)
        y = 2 * y.real if y.is_complex() else y
        y = y if D is None else y + D * x
        outputs.append(y if z is None else y * torch.nn.functional.silu(at(z, t, -2)))
    y = torch.stack(outputs, dim=-2) if outputs else u.to(real)
    return y.to(u.dtype), h
