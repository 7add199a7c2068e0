# SPDX-License-Identifier: MIT
# pyright: basic
"""Division of rows by their root mean square, in one pass over each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu.compiling import jit
from lrnnx_core.backends.cpu.step_memory import LIKE, address, at, optional, put, ready, take


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.rms_norm`."""
    kind = x.dtype
    dtype = torch.float64 if kind is torch.float64 else torch.float32
    x, weight = ready(x, dtype), optional(weight, dtype)
    width, y = x.shape[-1], torch.empty_like(x)
    rows = x.numel() // width if width else 0
    pool.run(
        _rms_norm, pool.workers(rows, 0.15 * width * rows), rows, LIKE[dtype], width, x.data_ptr(),
        address(weight), eps, y.data_ptr(),
    )  # fmt: skip
    return y if kind is dtype else y.to(kind)


def warm() -> None:
    """Compile the kernels."""
    for dtype in LIKE:
        rms_norm(torch.zeros(1, 2, dtype=dtype), None, 1e-6)


@jit
def _rms_norm(begin, end, worker, like, width, x, weight, eps, y):
    one, scale = like.dtype.type(1), at(weight, 0, like)
    for b in range(begin, end):
        row, out, total = at(x, b * width, like), at(y, b * width, like), like.dtype.type(0)
        for i in range(width):
            total += take(row, i) * take(row, i)
        factor = one / like.dtype.type(math.sqrt(total / width + eps))
        if weight == 0:
            for i in range(width):
                put(out, i, factor * take(row, i))
        else:
            for i in range(width):
                put(out, i, factor * take(row, i) * take(scale, i))
