# SPDX-License-Identifier: MIT
"""The RG-LRU's gates and recurrence as leaf operators in pure PyTorch.

The arguments are those of `lrnnx_core.ops.rg_lru_scan`, brought to fixed ranks and dtypes:

    x, input_gate, recurrent_gate (*batch, L, W), one dtype
    rate, input_bias, recurrent_bias (*shared, W); h0 (*batch, W); timesteps (*batch, L):
        that dtype, but at least float32
    reset, mask (*batch, L)

Under ``start_rule`` a document starts where ``reset``, and at the first step if there is no h0;
``shared`` is a leading part of ``batch`` (what a vmap over parameters adds). The forward keeps
nothing but its output; the backward recomputes gates and decays. With lam the cotangent of h and
P = lam_t h_{t-1}, q = lam_t i_t x_t,

    d log a = P a - q a^2 / max(m, 5e-4)          (the slope of the root is at most 1000)
    d r = -rate d log a,  d rate = -sum r d log a,  d i = lam m x,  d x = lam m i

Compiled backends keep the same contract.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends.reference import state_dtype
from lrnnx_core.backends.transforms import full_precision

LEAST_ROOT = 5e-4  # where 1 / (2 m) is the largest slope, 1000


class Arguments(NamedTuple):
    """The arguments of the leaf operator, in its order."""

    x: Tensor
    input_gate: Tensor
    recurrent_gate: Tensor
    rate: Tensor
    input_bias: Tensor | None
    recurrent_bias: Tensor | None
    h0: Tensor | None
    timesteps: Tensor | None
    reset: Tensor | None
    mask: Tensor | None
    state_only: bool
    start_rule: bool

    @property
    def tensors(self) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """All but the choices."""
        return self[:-2]

    @property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        """The input and both gates."""
        return self[:3]

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The rate and both biases: one number a channel."""
        return self[3:6]

    @property
    def steps(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Timesteps, reset and mask: one number a step."""
        return self[7:10]

    @property
    def choices(self) -> tuple[bool, bool]:
        """``state_only`` and ``start_rule``."""
        return self[-2:]


class Gradients(NamedTuple):
    """What the backward leaf returns; None where the input was None."""

    x: Tensor
    input_gate: Tensor
    recurrent_gate: Tensor
    rate: Tensor
    input_bias: Tensor | None
    recurrent_bias: Tensor | None
    h0: Tensor
    timesteps: Tensor | None


class _Terms(NamedTuple):
    """Everything of a step but the recurrence, (*batch, L, W) each, in the dtype of states."""

    i: Tensor
    r: Tensor
    log_a: Tensor  # untimed
    a: Tensor  # 1 at padding
    gain: Tensor  # log of the decay in the multiplier
    m: Tensor  # the multiplier, starts of documents left out


def rg_lru_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Leaf: all states h (*batch, L, W) and the last one (*batch, W)."""
    p = Arguments(*arguments)
    t = _terms(p)
    b = t.m
    if p.start_rule:
        _fill_starts(b, 1, p)
    b.mul_(t.i).mul_(p.x)
    if p.mask is not None:
        b.masked_fill_(~p.mask.unsqueeze(-1), 0)
    h, last = torch.ops.lrnnx_core.linear_scan.default(t.a, b, p.h0, p.reset, False)
    return h.to(p.x.dtype), last


def rg_lru_scan_backward(
    h: Tensor, grad_h: Tensor, grad_last: Tensor, *arguments: Any
) -> Gradients:
    """Leaf: the gradients of `rg_lru_scan`."""
    p = Arguments(*arguments)
    x, wide = p.x, state_dtype(p.x.dtype)
    t = _terms(p)
    da, lam, dh0 = torch.ops.lrnnx_core.linear_scan_backward.default(
        t.a, h.to(wide), p.h0, p.reset, grad_h.to(wide), grad_last, False
    )
    if p.mask is not None:
        padding = ~p.mask.unsqueeze(-1)
        lam.masked_fill_(padding, 0)
        da.masked_fill_(padding, 0)
    minus_slope = torch.exp(2 * t.gain).div_(t.m.clamp(min=LEAST_ROOT))
    if p.start_rule:
        _fill_starts(minus_slope, 0, p)
        _fill_starts(t.m, 1, p)
    moved = (lam * x).mul_(t.i)
    dlog = minus_slope.mul_(moved).neg_()
    di = moved.mul_(t.m).mul_(1 - t.i)
    dx = lam.mul_(t.m).mul_(t.i)
    dtimed = da.mul_(t.a)
    dtau = None
    if p.timesteps is None:
        dlog.add_(dtimed)
    else:
        tau = p.timesteps.unsqueeze(-1)
        through = dtimed if p.state_only else dtimed.add_(dlog)
        dtau = (through * t.log_a).sum(-1)
        dlog = dlog.addcmul_(through, tau) if p.state_only else through.mul_(tau)
    drate = -_over_rows(dlog * t.r, p.rate)
    dr = dlog.mul_(-_beside(p.rate, x)).mul_(t.r).mul_(1 - t.r)
    return Gradients(
        dx.to(x.dtype),
        di.to(x.dtype),
        dr.to(x.dtype),
        drate,
        None if p.input_bias is None else _over_rows(di, p.input_bias),
        None if p.recurrent_bias is None else _over_rows(dr, p.recurrent_bias),
        dh0,
        dtau,
    )


def gradients(h: Tensor, grad_h: Tensor, grad_last: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Leaf: `rg_lru_scan_backward` with an empty tensor in the place of None."""
    with full_precision(h.device):  # a backward pass may be run inside of an autocast region
        found = rg_lru_scan_backward(h, grad_h, grad_last, *arguments)
    return tuple(grad_last.new_empty(0) if g is None else g for g in found)


def _terms(p: Arguments) -> _Terms:
    i, r = _gate(p.input_gate, p.input_bias), _gate(p.recurrent_gate, p.recurrent_bias)
    log_a = r * -_beside(p.rate, r)
    timed = log_a if p.timesteps is None else log_a * p.timesteps.unsqueeze(-1)
    gain = log_a if p.state_only else timed
    a = torch.exp(timed)
    if p.mask is not None:
        a.masked_fill_(~p.mask.unsqueeze(-1), 1)
    return _Terms(i, r, log_a, a, gain, torch.expm1(2 * gain).neg_().sqrt_())


def _fill_starts(t: Tensor, value: float, p: Arguments) -> None:
    """Write ``value`` to t (*batch, L, W) where documents start."""
    if p.reset is not None:
        t.masked_fill_(p.reset.unsqueeze(-1), value)
    if p.h0 is None and t.shape[-2]:
        t.select(-2, 0).fill_(value)


def _gate(logits: Tensor, bias: Tensor | None) -> Tensor:
    logits = logits.to(state_dtype(logits.dtype))
    return torch.sigmoid(logits) if bias is None else (logits + _beside(bias, logits)).sigmoid_()


def _beside(parameter: Tensor, x: Tensor) -> Tensor:
    """(*shared, W) -> (*shared, 1, ..., 1, W), which broadcasts with x (*batch, L, W)."""
    if parameter.ndim == 1:
        return parameter
    return parameter.view(*parameter.shape[:-1], *(1,) * (x.ndim - parameter.ndim), -1)


def _over_rows(x: Tensor, parameter: Tensor) -> Tensor:
    """Sum x (*batch, L, W) to the shape of a parameter."""
    return x.sum(dim=tuple(range(parameter.ndim - 1, x.ndim - 1)))
