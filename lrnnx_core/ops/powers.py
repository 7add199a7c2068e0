# SPDX-License-Identifier: MIT
"""Sums over powers a^t of a diagonal, without a table of all of them.

t = Q i + j splits a^t into ``coarse[i] * fine[j]`` with Q near sqrt(L), so a kernel of length L
over N states is one real batched matrix product, and the (N, L) table is never built.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Powers(NamedTuple):
    """fine (Q, *S) = a^j, coarse (M, *S) = a^(Q i), for every exponent 0 ... length."""

    fine: Tensor
    coarse: Tensor

    def at(self, exponent: Tensor) -> Tensor:
        """Return a^exponent, (*exponent.shape, *S), for exponents 0 ... length."""
        q = self.fine.shape[0]
        coarse = torch.div(exponent, q, rounding_mode="floor")
        return _rows(self.fine, exponent % q) * _rows(self.coarse, coarse)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Return table[index]; the plain form reads a 0-d index on the host: a synchronisation."""
    rows = table.index_select(0, index.reshape(-1))
    return rows.reshape(index.shape + table.shape[1:])


def powers(length: int, *, a: Tensor | None = None, z: Tensor | None = None) -> Powers:
    """Tabulate the powers of a (*S), or of exp(z), which is an order of magnitude more exact."""
    q = max(1, math.isqrt(length))
    count = length // q + 1
    if z is not None:
        steps = torch.arange(max(q, count), device=z.device).to(
            z.real.dtype if z.is_complex() else z.dtype
        )
        steps = steps.reshape((-1,) + (1,) * z.ndim)
        return Powers(torch.exp(z * steps[:q]), torch.exp(z * (q * steps[:count])))
    if a is None:
        raise ValueError("powers: give a or z")
    fine, big = _successive(a, q)
    return Powers(fine, _successive(big, count)[0])


def _successive(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (a^0 ... a^(count-1), a^count) by doubling; exact and differentiable at a = 0."""
    table, square, result = torch.ones_like(a)[None], a, torch.ones_like(a)
    left = count
    while left:
        if left & 1:
            result = result * square
        left >>= 1
        if table.shape[0] < count:
            table = torch.cat([table, table * square])
        square = square * square
    return table[:count], result


def evaluate(v: Tensor, p: Powers, length: int) -> Tensor:
    """Return Re sum_n v_n a_n^t for t = 0 ... length - 1: (..., H, N) -> (..., length, H)."""
    left = v.unsqueeze(-3) * p.coarse
    if left.is_complex():
        left = torch.cat([left.real, -left.imag], dim=-1)
        right = torch.cat([p.fine.real, p.fine.imag], dim=-1)
    else:
        right = p.fine
    K = torch.einsum("...chn,qhn->...cqh", left, right)
    return K.flatten(-3, -2)[..., :length, :]


def accumulate(x: Tensor, p: Powers) -> Tensor:
    """Return sum_t a_n^(L-1-t) x_t: real (..., L, H) -> (..., H, N), the state an input leaves."""
    length, (q, count) = x.shape[-2], (p.fine.shape[0], p.coarse.shape[0])
    late = torch.constant_pad_nd(x.flip(-2), (0, 0, 0, q * count - length))
    late = late.unflatten(-2, (count, q))
    if not p.fine.is_complex():
        inner = torch.einsum("...cqh,qhn->...chn", late, p.fine)
    else:
        parts = torch.view_as_real(p.fine).flatten(-2)
        inner = torch.einsum("...cqh,qhn->...chn", late, parts).unflatten(-1, (-1, 2))
        inner = torch.complex(inner[..., 0], inner[..., 1])
    return (inner * p.coarse).sum(-3)
