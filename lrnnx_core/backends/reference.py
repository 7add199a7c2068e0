# SPDX-License-Identifier: MIT
"""The specification: plain loops over time in differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


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
