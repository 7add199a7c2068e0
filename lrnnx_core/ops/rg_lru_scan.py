# SPDX-License-Identifier: MIT
"""The RG-LRU's gates and recurrence in one operator.

Built like `selective_scan`: one forward and one backward leaf, the latter a first derivative only.
Where more is asked for (two levels of torch.func, or any forward mode) the public function runs a
composite of differentiable pieces, and a second derivative of an eager graph goes through the
derivative of that composite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_rg_lru, cpu, cuda_rg_lru, library, reference
from lrnnx_core.backends.transforms import (
    allow_in_graph,
    differentiation_depth,
    dual_level_active,
    forward_mode_depth,
    full_precision,
    positional_only,
)
from lrnnx_core.ops.guarded_sqrt import guarded_sqrt
from lrnnx_core.ops.linear_scan import linear_scan
from lrnnx_core.types import Backend, TimestepMode


class Arguments(NamedTuple):
    """The tensors of the leaf operator, in its order; ranks as `blocked_rg_lru` states them."""

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


TENSORS = len(Arguments._fields)


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
    dtype, state_only = x.dtype, timestep_mode == "state_only"
    with full_precision(x.device):
        arguments = _prepare(
            Arguments(
                x, input_gate, recurrent_gate, rate, input_bias, recurrent_bias, h0,
                integration_timesteps, reset, mask,
            )
        )  # fmt: skip
        if backend == "reference":
            h, last = _composite(arguments, state_only, start_rule, backend)
        else:
            h, last = _rg_lru_scan(*arguments, state_only, start_rule)
    return h.to(dtype), last


def _prepare(x: Arguments) -> Arguments:
    """Check the arguments and bring them to the ranks and dtypes of the leaf operator."""
    if x.x.ndim < 2:
        raise ValueError(f"rg_lru_scan: x {tuple(x.x.shape)}, expected (..., L, W)")
    length, width = x.x.shape[-2:]
    ends = dict.fromkeys(("x", "input_gate", "recurrent_gate"), (length, width))
    ends |= {"h0": (width,)} | dict.fromkeys(("timesteps", "reset", "mask"), (length,))
    batches: dict[str, torch.Size] = {}
    for name, value in zip(Arguments._fields, x, strict=True):
        if value is None:
            continue
        if value.device != x.x.device:
            raise ValueError(f"rg_lru_scan: {name} is on {value.device} and x on {x.x.device}")
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
    dtype = torch.promote_types(x.x.dtype, x.input_gate.dtype)
    dtype = torch.promote_types(dtype, x.recurrent_gate.dtype)
    wide = torch.promote_types(reference.state_dtype(dtype), x.rate.dtype)
    if wide != reference.state_dtype(dtype):
        dtype = wide

    def ready(name: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if name not in ("reset", "mask"):
            value = value.to(dtype if len(ends.get(name, ())) == 2 else wide)
        lead = batches.get(name)
        return value if lead is None or lead == batch else value.expand(*batch, *ends[name])

    return Arguments(*(ready(n, v) for n, v in zip(Arguments._fields, x, strict=True)))  # pyright: ignore[reportArgumentType]


def _composite(
    arguments: Arguments, state_only: bool, start_rule: bool, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Compose the operator of differentiable pieces: right to any order."""
    x, input_gate, recurrent_gate, rate, input_bias, recurrent_bias, h0, tau, reset, mask = (
        arguments
    )
    wide = reference.state_dtype(x.dtype)
    i, r = (
        torch.sigmoid(g.to(wide) if bias is None else g.to(wide) + bias)
        for g, bias in ((input_gate, input_bias), (recurrent_gate, recurrent_bias))
    )
    log_a = -rate * r
    timed = log_a if tau is None else tau.unsqueeze(-1) * log_a
    m = guarded_sqrt(-torch.expm1(2 * (log_a if state_only else timed)))
    a = torch.exp(timed)
    if start_rule:
        starts = torch.zeros(x.shape[-2], dtype=torch.bool, device=x.device)
        if h0 is None:
            starts = torch.arange(x.shape[-2], device=x.device) == 0
        starts = starts if reset is None else starts | reset
        m = torch.where(starts.unsqueeze(-1), torch.ones_like(m), m)
    b = m * (i * x.to(wide))
    if mask is not None:
        # a = 1 with no input leaves the state alone
        kept = mask.unsqueeze(-1)
        a = torch.where(kept, a, torch.ones_like(a))
        b = torch.where(kept, b, torch.zeros_like(b))
    h, last = linear_scan(a, b, h0, reset=reset, backend=backend)
    return h.to(x.dtype), last


def _rg_lru_scan(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    rate: Tensor,
    input_bias: Tensor | None,
    recurrent_bias: Tensor | None,
    h0: Tensor | None,
    timesteps: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
    state_only: bool,
    start_rule: bool,
) -> tuple[Tensor, Tensor]:
    arguments = Arguments(
        x, input_gate, recurrent_gate, rate, input_bias, recurrent_bias, h0, timesteps, reset, mask
    )
    if differentiation_depth() > 1 or forward_mode_depth() or dual_level_active():
        return _composite(arguments, state_only, start_rule)
    return _Gated.apply(*arguments, state_only, start_rule)


class _Gated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _leaf(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.choices = inputs[TENSORS:]
        ctx.save_for_backward(output[0], *inputs[:TENSORS])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, *inputs = ctx.saved_tensors
        results = _GatedBackward.apply(h, *grads, *inputs, *ctx.choices)
        gradients = [g if t is not None else None for g, t in zip(results, inputs, strict=False)]
        return (*gradients, None, None, *(None,) * len(ctx.choices))


class _GatedBackward(torch.autograd.Function):
    """(h, grad_h, grad_last, inputs) -> gradients; h counts as a function of the inputs here."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _leaf_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.choices = inputs[3 + TENSORS :]
        ctx.save_for_backward(*inputs[1 : 3 + TENSORS])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_last, *inputs = ctx.saved_tensors
        present = [i for i, t in enumerate(inputs[:-2]) if t is not None]

        def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            arguments = list(inputs)
            for i, t in zip(present, tensors, strict=True):
                arguments[i] = t
            return _composite(Arguments(*arguments), *ctx.choices)

        def gradient(grad_h: Tensor, grad_last: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            pull = torch.func.vjp(forward, *tensors)[1]
            return pull((grad_h, grad_last))

        pull = torch.func.vjp(gradient, grad_h, grad_last, *(inputs[i] for i in present))[1]
        g_h, g_last, *g_inputs = pull(tuple(grads[i] for i in present))
        result: list[Tensor | None] = [None] * (3 + TENSORS + len(ctx.choices))
        result[1], result[2] = g_h, g_last
        for i, g in zip(present, g_inputs, strict=True):
            result[3 + i] = g
        return tuple(result)


_ARGUMENTS = (
    "Tensor x, Tensor input_gate, Tensor recurrent_gate, Tensor rate, Tensor? input_bias, "
    "Tensor? recurrent_bias, Tensor? h0, Tensor? timesteps, Tensor? reset, Tensor? mask, "
    "bool state_only, bool start_rule"
)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    last = x.new_empty((*x.shape[:-2], x.shape[-1]), dtype=reference.state_dtype(x.dtype))
    return x.new_empty(x.shape), last


def _fake_backward(h: Tensor, grad_h: Tensor, grad_last: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors = rest[: TENSORS - 2]
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
    f"-> ({', '.join(['Tensor'] * (TENSORS - 2))})",
    default=blocked_rg_lru.gradients,
    fake=_fake_backward,
)
for _function in (_Gated.forward, _GatedBackward.forward):
    positional_only(_function)
allow_in_graph(_rg_lru_scan)
_CUDA = cuda_rg_lru.implement()
_CPU = cpu.implement("rg_lru", "rg_lru_scan", "rg_lru_scan_backward")
