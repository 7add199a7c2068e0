# SPDX-License-Identifier: MIT
"""The RG-LRU's gates and recurrence in one operator, by `lrnnx_core.ops._fused`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_rg_lru, cpu, cuda_rg_lru, library, reference
from lrnnx_core.backends.blocked_rg_lru import Arguments
from lrnnx_core.backends.transforms import allow_in_graph, full_precision
from lrnnx_core.ops._fused import Signature, fused
from lrnnx_core.ops.guarded_sqrt import guarded_sqrt
from lrnnx_core.ops.linear_scan import linear_scan
from lrnnx_core.types import Backend, TimestepMode


def rg_lru_scan(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    rate: Tensor,
    input_bias: Tensor | None = None,
    recurrent_bias: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    reset: Tensor | None = None,
    start_rule: bool = False,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(input_gate_t) x_t.

    With r_t = sigmoid(recurrent_gate_t) and the elapsed time tau_t, log a_t = -rate tau_t r_t. The
    root's slope is at most 1000 (`guarded_sqrt`).

    Args:
        x: (..., L, W), real, the input of the recurrence.
        input_gate: (..., L, W), before the sigmoid.
        recurrent_gate: (..., L, W), before the sigmoid.
        rate: (W,), >= 0, the decay of log h at an open recurrence gate: c softplus(Lambda).
        input_bias: (W,), added to input_gate.
        recurrent_bias: (W,), added to recurrent_gate.
        h0: (..., W), the state before the first step; zeros if None.
        integration_timesteps: (..., L), time elapsed before each sample, a factor of log a.
        timestep_mode: whether the root takes the timed a (``both``) or the untimed one
            (``state_only``).
        reset: (..., L) bool, clear the state before that step.
        start_rule: whether the root's place is taken by 1 where a document starts: where ``reset``,
            and at the first step if there is no ``h0``.
        mask: (..., L) bool, False is padding: h_t = h_{t-1}.
        backend: ``"auto"``, or ``"reference"`` for the plain differentiable loop.

    Returns:
        h (..., L, W) in x's dtype, and the last state (..., W), at least float32.

    Raises:
        ValueError: shapes that do not fit, a wrong dtype, tensors on different devices, an unknown
            choice.

    Source: De et al. 2024 (Griffin), arXiv:2402.19427, section 2.4; the elapsed time is ours.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"rg_lru_scan: backend {backend!r}, expected 'auto' or 'reference'")
    if timestep_mode not in ("both", "state_only"):
        raise ValueError(
            f"rg_lru_scan: timestep_mode {timestep_mode!r}, expected 'both' or 'state_only'"
        )
    with full_precision(x.device):
        arguments = _prepare(
            Arguments(
                x, input_gate, recurrent_gate, rate, input_bias, recurrent_bias, h0,
                integration_timesteps, reset, mask, timestep_mode == "state_only", start_rule,
            )
        )  # fmt: skip
        if backend == "reference":
            h, last = _composite(*arguments, backend=backend)
        else:
            h, last = _rg_lru_scan(*arguments)
    return h.to(x.dtype), last


def _prepare(p: Arguments) -> Arguments:
    """Check the arguments and bring them to the ranks and dtypes of the leaf operator."""
    if p.x.ndim < 2:
        raise ValueError(f"rg_lru_scan: x {tuple(p.x.shape)}, expected (..., L, W)")
    length, width = p.x.shape[-2:]
    ends = dict.fromkeys(("x", "input_gate", "recurrent_gate"), (length, width))
    ends |= {"h0": (width,)} | dict.fromkeys(("timesteps", "reset", "mask"), (length,))
    batches: dict[str, torch.Size] = {}
    for name, value in zip(Arguments._fields, p, strict=True):
        if not isinstance(value, Tensor):
            continue
        if value.device != p.x.device:
            raise ValueError(f"rg_lru_scan: {name} is on {value.device} and x on {p.x.device}")
        flags = name in ("reset", "mask")
        if value.dtype != torch.bool if flags else not value.is_floating_point():
            expected = "bool" if flags else "a real floating one"
            raise ValueError(f"rg_lru_scan: {name} has dtype {value.dtype}, expected {expected}")
        end = ends.get(name, (width,))
        lead = value.shape[: max(value.ndim - len(end), 0)]
        if tuple(value.shape[len(lead) :]) != end or (name not in ends and lead):
            shape = end if name not in ends else ("...", *end)
            raise ValueError(
                f"rg_lru_scan: {name} {tuple(value.shape)}, expected "
                f"{str(shape).replace(chr(39), '')}"
            )
        if name in ends:
            batches[name] = lead
    try:  # torch.broadcast_shapes takes as long as the rest of this function
        same = len(set(batches.values())) == 1
        batch = batches["x"] if same else torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        got = ", ".join(f"{n} {tuple(s)}" for n, s in batches.items())
        raise ValueError(f"rg_lru_scan: batch axes do not broadcast: {got}") from None
    dtype = torch.promote_types(p.x.dtype, p.input_gate.dtype)
    dtype = torch.promote_types(dtype, p.recurrent_gate.dtype)
    wide = torch.promote_types(reference.state_dtype(dtype), p.rate.dtype)
    if wide != reference.state_dtype(dtype):
        dtype = wide

    def ready(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name not in ("reset", "mask"):
            value = value.to(dtype if len(ends.get(name, ())) == 2 else wide)
        lead = batches.get(name)
        return value if lead is None or lead == batch else value.expand(*batch, *ends[name])

    return Arguments(*(ready(n, v) for n, v in zip(Arguments._fields, p, strict=True)))


def _composite(*arguments: Any, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Compose the operator of differentiable pieces: right to any order."""
    p = Arguments(*arguments)
    x, tau, reset, mask = p.x, p.timesteps, p.reset, p.mask
    wide = reference.state_dtype(x.dtype)
    i, r = (
        torch.sigmoid(g.to(wide) if bias is None else g.to(wide) + bias)
        for g, bias in ((p.input_gate, p.input_bias), (p.recurrent_gate, p.recurrent_bias))
    )
    log_a = -p.rate * r
    timed = log_a if tau is None else tau.unsqueeze(-1) * log_a
    m = guarded_sqrt(-torch.expm1(2 * (log_a if p.state_only else timed)))
    a = torch.exp(timed)
    if p.start_rule:
        starts = torch.zeros(x.shape[-2], dtype=torch.bool, device=x.device)
        if p.h0 is None:
            starts = torch.arange(x.shape[-2], device=x.device) == 0
        starts = starts if reset is None else starts | reset
        m = torch.where(starts.unsqueeze(-1), torch.ones_like(m), m)
    b = m * (i * x.to(wide))
    if mask is not None:
        # a = 1 with no input leaves the state alone
        kept = mask.unsqueeze(-1)
        a = torch.where(kept, a, torch.ones_like(a))
        b = torch.where(kept, b, torch.zeros_like(b))
    h, last = linear_scan(a, b, p.h0, reset=reset, backend=backend)
    return h.to(x.dtype), last


_ARGUMENTS = library.parameters(Arguments)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    last = x.new_empty((*x.shape[:-2], x.shape[-1]), dtype=reference.state_dtype(x.dtype))
    return x.new_empty(x.shape), last


def _fake_backward(h: Tensor, grad_h: Tensor, grad_last: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors = rest[:8]
    like = [grad_last.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]
    like[6] = grad_last.new_empty(grad_last.shape)
    return tuple(like)


_leaf = library.define(
    f"rg_lru_scan({_ARGUMENTS}) -> (Tensor, Tensor)",
    default=blocked_rg_lru.rg_lru_scan,
    fake=_fake,
)
_leaf_backward = library.define(
    f"rg_lru_scan_backward(Tensor h, Tensor grad_h, Tensor grad_last, {_ARGUMENTS}) "
    f"-> ({', '.join(['Tensor'] * 8)})",
    default=blocked_rg_lru.gradients,
    fake=_fake_backward,
)
_apply = fused(
    _leaf,
    _leaf_backward,
    _composite,
    Signature(tensors=10, differentiable=8, choices=2, outputs=2, remembered=(0,)),
)


def _rg_lru_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    h, last = _apply(*arguments)
    return h, last


allow_in_graph(_rg_lru_scan)
_CUDA = cuda_rg_lru.implement()
_CPU = cpu.implement("rg_lru", "rg_lru_scan", "rg_lru_scan_backward")
