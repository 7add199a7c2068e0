# SPDX-License-Identifier: MIT
# pyright: basic
"""Rows of numbers by their address, for kernels that choose among rows of several tensors.

An address is an int: it costs a call a tenth of what an array does, which counts for single steps
of a decoder, and 0 stands for None. The caller keeps the tensors alive while the kernel runs.
Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from lrnnx_core.backends.cpu.compiling import inline

ONES = {torch.float32: np.float32(1), torch.float64: np.float64(1)}
"""A number of the type that a kernel computes in: its last argument."""
BYTE = np.uint8(1)


def _at(typing_context: Any, address: Any, one: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(one)(address, one), generate


at: Any = intrinsic(_at)
"""A pointer to numbers of the type of ``one``: p[i] reads, p[i] = v writes."""


@inline
def flagged(flags, t):
    """Return flag t of a row of bool, False where its address is 0."""
    return flags != 0 and at(flags + t, BYTE)[0] != 0


@inline
def fill(y, n, one):
    """Write zeros to n numbers."""
    y = at(y, one)
    for i in range(n):
        y[i] = 0


@inline
def copy(y, x, n, one):
    """Copy n numbers."""
    y, x = at(y, one), at(x, one)
    for i in range(n):
        y[i] = x[i]


def address(t: Tensor | None) -> int:
    """Return where a tensor's first element lies, 0 for None."""
    return 0 if t is None else t.data_ptr()


def packed(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return t in this dtype, contiguous."""
    if t is None or (t.dtype is dtype and t.is_contiguous()):
        return t
    return t.detach().to(dtype).contiguous()


class Rows(NamedTuple):
    """A tensor (P, R, L, C) whose last axis is dense.

    Attributes:
        tensor: what has to be kept alive.
        layout: its address, and the strides of P, R and L.
    """

    tensor: Tensor
    layout: tuple[int, int, int, int]


def rows(t: Tensor, dtype: torch.dtype, P: int, R: int, L: int, C: int) -> Rows:
    """Show t (*batch, L, C), where batch is (P, R), without a copy if it can.

    A tensor that is expanded over its last axis too, as the gradient of a sum is, becomes one that
    is expanded over the others only.
    """
    size = dtype.itemsize
    if t.dtype is dtype and t.is_contiguous():
        step = C * size
        return Rows(t, (t.data_ptr(), R * L * step, L * step, step))
    t = t.detach().to(dtype)
    if C > 1 and t.stride(-1) == 0:
        shape = [1 if s == 0 else n for n, s in zip(t.shape, t.stride(), strict=True)]
        core = t.as_strided(shape, t.stride())
        t = core.expand(*core.shape[:-1], C).contiguous().expand(t.shape)
    t = t.reshape(P, R, L, C)
    t = t if C <= 1 or t.stride(-1) == 1 else t.contiguous()
    p, r, step, _ = t.stride()
    return Rows(t, (t.data_ptr(), p * size, r * size, step * size))
