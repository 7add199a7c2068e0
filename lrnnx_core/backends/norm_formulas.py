# SPDX-License-Identifier: MIT
"""The residual sum with its norm in plain PyTorch: values and all first derivatives.

x, the sum and what is normalized are (*shared, ..., H), weight and bias (*shared, H).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrnnx_core.backends.reference import state_dtype


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + branch, its norm in ``dtype``, and (..., 1 + layer) statistics for the gradient.

    The statistics are 1 / deviation, and after it the mean if ``layer``. Without a branch the sum
    is x itself, and an empty tensor stands in its place.
    """
    total = x if branch is None else x + branch.to(x.dtype)
    wide = total.to(state_dtype(x.dtype))
    mean = wide.mean(-1, keepdim=True) if layer else None
    centred = wide if mean is None else wide - mean
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * scale
    if weight is not None:
        y = y * _beside(weight, y)
    if bias is not None:
        y = y + _beside(bias, y)
    stats = scale if mean is None else torch.cat([scale, mean], -1)
    return x.new_empty(0) if branch is None else total, y.to(dtype), stats


def add_norm_backward(
    grad_sum: Tensor | None,
    grad_out: Tensor,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer: bool,
    branch: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dbranch, dweight, dbias; empty tensors for what is not there.

    dbranch is dx in the dtype ``branch``, and empty where that is dx's own.
    """
    g, scale = grad_out.to(stats.dtype), stats[..., :1]
    wide = total.to(stats.dtype)
    y = (wide - stats[..., 1:] if layer else wide) * scale
    none = total.new_empty(0)
    dweight = none if weight is None else _summed(g * y, weight)
    dbias = none if bias is None else _summed(g, bias)
    if weight is not None:
        g = g * _beside(weight, g)
    along = (g * y).mean(-1, keepdim=True)
    centred = g - g.mean(-1, keepdim=True) if layer else g
    found = (centred - y * along) * scale
    if grad_sum is not None:
        found = found + grad_sum
    same = branch == total.dtype
    dbranch = none.to(branch) if same else found.to(branch)
    return found.to(total.dtype), dbranch, dweight, dbias


def _beside(parameter: Tensor, y: Tensor) -> Tensor:
    """Bring (*shared, H) to y (*shared, ..., H)."""
    between = (1,) * (y.ndim - parameter.ndim)
    return parameter.to(y.dtype).reshape(*parameter.shape[:-1], *between, parameter.shape[-1])


def _summed(g: Tensor, parameter: Tensor) -> Tensor:
    """Sum (*shared, ..., H) to the parameter's (*shared, H)."""
    between = tuple(range(parameter.ndim - 1, g.ndim - 1))
    return (g.sum(between) if between else g.clone()).to(parameter.dtype)
