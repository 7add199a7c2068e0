# SPDX-License-Identifier: MIT
"""A Mamba block between its two projections, as one operator where it is differentiated.

    (x, z) = split(xz);  v = silu(conv(x));  (r, B, C) = split(x_proj v)
    y = selective_scan(v, dt_proj r, A, B, C, D, z)

The forward is the operators one after another. The backward is one leaf: on a GPU the gradients of
x and z are written side by side into that of xz, and the two of v, by way of the scan and of
x_proj, are added where the convolution reads them: no pass over memory only joins or adds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrnnx_core.backends import library
from lrnnx_core.backends import mamba_inner as backend
from lrnnx_core.backends.transforms import allow_in_graph, differentiation_depth
from lrnnx_core.ops._fused import Signature, fused
from lrnnx_core.ops.causal_conv1d import causal_conv1d
from lrnnx_core.ops.selective_scan import selective_scan


def mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    tail: Tensor | None,
    h0: Tensor | None,
    decay_dt: Tensor | None,
    timesteps: Tensor | None,
    reset: Tensor | None,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (*batch, L, E), the convolution's new tail, and the last state.

    Args:
        xz: (*batch, L, 2 E), what in_proj gives.
        conv_weight: (E, 1, K).
        conv_bias: (E,).
        x_proj: (R + 2 N, E), in xz's dtype.
        dt_proj: (E, R), in xz's dtype.
        A: (E, N), real.
        D: (E,).
        dt_bias: (E,), added before the softplus.
        tail: (*batch, K - 1, E), in xz's dtype; zeros if None.
        h0: (*batch, E, N); zeros if None.
        decay_dt: (*batch, 1, E), as in `selective_scan`.
        timesteps: (*batch, L).
        reset: (*batch, L) bool; for the convolution too.
        state_only: whether timesteps are in the decay alone.
        scheme: a fused discretization.
    """
    return _mamba_inner(
        xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, tail, h0, decay_dt, timesteps,
        reset, state_only, scheme,
    )  # fmt: skip


def _mamba_inner(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.is_grad_enabled() and not differentiation_depth():
        return _composite(*arguments)  # without a backward to come, nothing is kept for it
    y, last, h = _apply(*arguments)
    return y, last, h


def _composite(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compose the operator of differentiable ones: right to any order."""

    def convolve(*inputs: Any) -> tuple[Tensor, Tensor]:
        return causal_conv1d(*inputs[:4], activation="silu", reset=inputs[4])

    def scan(*inputs: Any) -> tuple[Tensor, Tensor]:
        decay_dt, timesteps, reset, state_only, scheme = inputs[9:]
        return selective_scan(
            *inputs[:9], decay_dt=decay_dt, softplus=True, discretization=scheme,
            integration_timesteps=timesteps,
            timestep_mode="state_only" if state_only else "both", reset=reset,
        )  # fmt: skip

    (y, h), last, *_ = _run(convolve, scan, *arguments)
    return y, last, h


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return y, the tail, the last state, and what the backward needs: v, x_proj v, dt, states."""
    leaves = torch.ops.lrnnx_core

    def convolve(*inputs: Any) -> tuple[Tensor, Tensor]:
        return leaves.causal_conv1d.default(*inputs, True)

    def scan(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return leaves.selective_scan.default(*inputs[:12], True, *inputs[12:], True)

    (y, h, kept), last, v, mixed, dt = _run(convolve, scan, *arguments)
    return y, last, h, v, mixed, dt, kept


def _run(convolve: Any, scan: Any, *arguments: Any) -> tuple[Any, ...]:
    """Return what the scan does, the new tail, v, x_proj v and dt."""
    p = backend.Arguments(*arguments)
    x, z = p.xz.chunk(2, -1)
    v, last = convolve(x, p.conv_weight, p.conv_bias, p.tail, p.seen)
    mixed = linear(v, p.x_proj)
    states = p.A.shape[-1]
    r, B, C = mixed.split([p.dt_proj.shape[-1], states, states], -1)
    dt = linear(r, p.dt_proj)
    found = scan(
        v, dt, p.A, B.unsqueeze(-2), C.unsqueeze(-2), p.D, z, p.dt_bias, p.h0, p.decay_dt,
        p.timesteps, p.reset, p.state_only, p.scheme,
    )  # fmt: skip
    return found, last, v, mixed, dt


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = arguments[7:19]
    absent = arguments[0]
    return tuple(absent.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


_leaf_backward = library.define(
    "mamba_inner_backward(Tensor v, Tensor mixed, Tensor dt, Tensor checkpoints, Tensor grad_y, "
    f"Tensor grad_tail, Tensor grad_last, {library.parameters(backend.Arguments)}) "
    f"-> ({', '.join(['Tensor'] * 12)})",
    default=backend.gradients,
    fake=_fake_backward,
)
_apply = fused(
    _forward,
    _leaf_backward,
    _composite,
    Signature(tensors=13, differentiable=12, choices=2, outputs=3, remembered=(3, 4, 5, 6)),
)
allow_in_graph(_mamba_inner)
_CUDA = backend.implement()
