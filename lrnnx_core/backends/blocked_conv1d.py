# SPDX-License-Identifier: MIT
"""The short causal convolution as leaf operators in pure PyTorch.

The arguments are those of `lrnnx_core.ops.causal_conv1d`, brought to fixed ranks:

    x, grad_y          (*batch, L, C)         weight (*shared, C, 1, K)
    tail, grad_last    (*batch, K - 1, C)     bias   (*shared, C)
    reset              (*batch, L)

where ``shared`` is a leading part of ``batch`` (what a vmap over parameters adds); tail has x's
dtype. Inside, batch is (P, R): the shared axes and the others. Tap k meets the sample ``lag`` =
K - 1 - k steps back. Compiled backends keep the same contract.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrnnx_core.backends.reference import state_dtype


class _Problem:
    """The arguments as (P, R, L, C), sums in the dtype of the computation."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tail: Tensor | None,
        reset: Tensor | None,
    ) -> None:
        batch, shared = x.shape[:-2], weight.ndim - 3
        self.P, self.R = math.prod(batch[:shared]), math.prod(batch[shared:])
        self.L, self.C, self.K = *x.shape[-2:], weight.shape[-1]
        self.dtype = state_dtype(torch.promote_types(x.dtype, weight.dtype))
        if tail is None:
            tail = x.new_zeros(*batch, self.K - 1, self.C)
        self.past = self.rows(torch.cat([tail, x], dim=-2))
        self.wide = self.past.to(self.dtype)
        taps_last = weight.to(self.dtype).reshape(self.P, 1, 1, self.C, self.K)
        self.weight = taps_last.movedim(-1, 0).contiguous()  # (K, P, 1, 1, C)
        self.bias = None if bias is None else bias.to(self.dtype).reshape(self.P, 1, 1, self.C)
        self.hidden = None if reset is None else self._hidden(reset)

    def rows(self, t: Tensor) -> Tensor:
        return t.reshape(self.P, self.R, *t.shape[-2:])

    def _hidden(self, reset: Tensor) -> list[Tensor]:
        """Return for every lag (P, R, L, 1): a reset keeps that sample from the step."""
        flags = reset.reshape(self.P, self.R, self.L, 1)
        found = [torch.zeros_like(flags)]
        for lag in range(1, self.K):
            further = found[-1].clone()
            further[:, :, lag - 1 :] |= flags[:, :, : max(self.L - lag + 1, 0)]
            found.append(further)
        return found

    def seen(self, t: Tensor, k: int) -> Tensor:
        """Return t (P, R, L, C), zero where a step does not see the sample that tap k meets."""
        if self.hidden is None or k == self.K - 1:
            return t
        return t.masked_fill(self.hidden[self.K - 1 - k], 0)

    def met(self, k: int) -> Tensor:
        """Return the samples that tap k meets."""
        return self.seen(self.wide[:, :, k : k + self.L], k)

    def handed_on(self, t: Tensor) -> Tensor:
        """Return t (P, R, K - 1, C), zero where a reset keeps the new tail from the sample."""
        if self.hidden is None or self.L == 0 or self.K == 1:
            return t
        hidden = torch.cat([h[:, :, -1:] for h in self.hidden[-2::-1]], dim=2)
        return t.masked_fill(hidden, 0)

    def convolve(self) -> Tensor:
        """Return bias + sum_k w_k x_{t-K+1+k}, (P, R, L, C)."""
        y = self.wide.new_zeros(self.P, self.R, self.L, self.C)
        if self.bias is not None:
            y += self.bias
        for k in range(self.K):
            y.addcmul_(self.met(k), self.weight[k])
        return y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Leaf: y (*batch, L, C) and the tail after x (*batch, K - 1, C), in x's dtype."""
    if x.shape[-2] == 1:
        return _one_step(x, weight, bias, tail, reset, silu)
    p = _Problem(x, weight, bias, tail, reset)
    y = p.convolve()
    y = torch.nn.functional.silu(y, inplace=True) if silu else y
    last = p.handed_on(p.past[:, :, p.L :])
    return (
        y.to(x.dtype).reshape(x.shape),
        last.clone().reshape(*x.shape[:-2], p.K - 1, p.C),
    )


def _one_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The same for L = 1, where the number of operations is what takes time."""
    taps, width = weight.shape[-1], x.shape[-1]
    if tail is None:
        tail = x.new_zeros(*x.shape[:-2], taps - 1, width)
    elif reset is not None:
        tail = tail.masked_fill(reset.unsqueeze(-1), 0)
    past = torch.cat([tail, x], dim=-2)
    w = weight.to(state_dtype(torch.promote_types(x.dtype, weight.dtype))).squeeze(-2).mT
    others = (1,) * (x.ndim + 1 - weight.ndim)
    y = (past * w.contiguous().reshape(*weight.shape[:-3], *others, taps, width)).sum(
        -2, keepdim=True
    )
    if bias is not None:
        y += bias.reshape(*bias.shape[:-1], *others, 1, width)
    y = torch.nn.functional.silu(y, inplace=True) if silu else y
    return y.to(x.dtype), past.narrow(-2, 1, taps - 1).clone()


def causal_conv1d_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf: (dx, dweight, dbias, dtail); shape (0,) stands for what has no gradient."""
    p = _Problem(x, weight, bias, tail, reset)
    g = p.rows(grad_y).to(p.dtype)
    if silu:
        g = torch.ops.aten.silu_backward(g, p.convolve())
    to_past = torch.zeros_like(p.wide)
    grad_weight = torch.empty_like(p.weight)
    for k in range(p.K):
        received = p.seen(g, k)
        to_past[:, :, k : k + p.L].addcmul_(received, p.weight[k])
        grad_weight[k] = (received * p.met(k)).sum((1, 2), keepdim=True)
    to_past[:, :, p.L :] += p.handed_on(p.rows(grad_last))
    dx, dtail = to_past[:, :, p.K - 1 :], to_past[:, :, : p.K - 1]
    return (
        dx.to(x.dtype, copy=True).reshape(x.shape),
        grad_weight.movedim(0, -1).to(weight.dtype).reshape(weight.shape).contiguous(),
        x.new_empty(0) if bias is None else g.sum((1, 2)).to(bias.dtype).reshape(bias.shape),
        x.new_empty(0) if tail is None else dtail.to(x.dtype, copy=True).reshape(tail.shape),
    )
