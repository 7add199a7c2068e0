# SPDX-License-Identifier: MIT
"""Fourier transforms along an axis other than the last, also where torch.compile traces them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def along(transform: Callable[..., Tensor], x: Tensor, n: int, axis: int) -> Tensor:
    """Return ``transform(x, n, dim=axis)``, one of torch.fft.

    While torch.compile traces, x is laid out so that the axis is the last and contiguous: of other
    layouts torch 2.11 expects strides that a transform on a CPU does not give, and stops.
    """
    if not torch.compiler.is_compiling():
        return transform(x, n, dim=axis)
    return transform(x.movedim(axis, -1).contiguous(), n).movedim(-1, axis)
