# SPDX-License-Identifier: MIT
# pyright: basic
"""How kernels see tensors: a flat array over the storage, and the strides of its outer axes.

A kernel's inner loop then runs over neighbours whatever the outer strides are, so that a slice such
as ``xz[..., :E]`` or an expanded batch is read in place. Complex tensors show as [re, im] pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class Rows(NamedTuple):
    """A tensor as rows of neighbours.

    Attributes:
        data: 1-D, from the tensor's first element to its last one.
        strides: of the outer axes, in elements of ``data``.
    """

    data: Any
    strides: tuple[int, ...]


def rows(x: Tensor, outer: int = 2, dtype: torch.dtype | None = None) -> Rows:
    """Show a tensor (*batch, ..., S) as ``outer`` axes of rows of S neighbours.

    The batch axes become the first outer axis, of any stride, 0 included; a copy is made only where
    they cannot, where S is not dense, and where the dtype is another one.

    Args:
        x: with at least ``outer`` dimensions; the last one is the row.
        outer: 2 for sequences (*batch, L, S), 1 for states (*batch, S) and flags (*batch, L).
        dtype: to convert to; None keeps it. bfloat16 and float16, which NumPy or kernels lack,
            become float32.
    """
    x = x.detach()
    if dtype is None:
        dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    x = x.to(dtype).resolve_conj().resolve_neg()
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    if x.is_complex():
        x = torch.view_as_real(x).flatten(-2)
    x = x.reshape(-1, *x.shape[-outer:]) if x.numel() else x.new_zeros((1,) * (outer + 1))
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return Rows(x.as_strided((extent,), (1,)).numpy(), x.stride()[:-1])


def flat(x: Tensor) -> Any:
    """Return a contiguous tensor as a 1-D array, complex numbers as pairs; for outputs."""
    x = x.detach()
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.view(-1).numpy()


def absent(dtype: torch.dtype, outer: int = 2) -> Rows:
    """Return rows that stand for an argument which is None: one zero, that strides never leave."""
    return Rows(torch.zeros(1, dtype=REAL.get(dtype, dtype)).numpy(), (0,) * outer)


def optional(
    x: Tensor | None, dtype: torch.dtype, outer: int = 2, convert: torch.dtype | None = None
) -> Rows:
    """Return `rows`, or `absent` of this dtype for None."""
    return absent(convert or dtype, outer) if x is None else rows(x, outer, convert)
