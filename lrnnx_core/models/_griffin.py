# SPDX-License-Identifier: MIT
"""The inner part of a Griffin recurrent block, between its projections: convolution and RG-LRU."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lrnnx_core.backends.transforms import autocasting
from lrnnx_core.models._common import check_choice, full_precision
from lrnnx_core.models._projected import check_parts, in_directions
from lrnnx_core.ops.causal_conv1d import causal_conv1d
from lrnnx_core.ops.guarded_sqrt import guarded_sqrt
from lrnnx_core.ops.rg_lru_scan import rg_lru_scan
from lrnnx_core.ops.steps import griffin_step
from lrnnx_core.sequences import Layout
from lrnnx_core.types import Mode, Number, Params, TimestepMode

DISCRETIZATIONS = ("none",)
MODES = ("auto", "scan", "recurrent")
TIMESTEP_MODES = ("both", "state_only")
GATES = ("input_gate", "recurrent_gate")
Gelu = Literal["tanh", "erf"]


class State(NamedTuple):
    """What a Griffin block remembers.

    conv (..., K - 1, W), the last inputs of the convolution, oldest first, in the activations'
    dtype; h (..., W), at least float32; started (...) bool, whether a document has begun.
    """

    conv: Tensor
    h: Tensor
    started: Tensor


class Options(NamedTuple):
    """The choices and numbers that `inner` and its callers share."""

    timestep_mode: TimestepMode = "both"
    c: Number = 8.0
    dt_scale: Number = 1.0
    start_rule: bool = True
    recurrent: bool = False
    bidirectional: bool = False
    gelu: Gelu = "tanh"


def options_of(
    where: str,
    discretization: str | None,
    timestep_mode: TimestepMode,
    c: Number,
    dt_scale: Number,
    start_rule: bool,
    mode: Mode,
    bidirectional: bool = False,
    gelu: Gelu = "tanh",
) -> Options:
    """Check the choices of a call and bundle them."""
    check_choice(where, "discretization", discretization or "none", DISCRETIZATIONS)
    check_choice(where, "timestep_mode", timestep_mode, TIMESTEP_MODES)
    check_choice(where, "mode", mode, MODES)
    check_choice(where, "gelu", gelu, get_args(Gelu))
    return Options(timestep_mode, c, dt_scale, start_rule, mode == "recurrent", bidirectional, gelu)


def inner(
    where: str,
    params: Params,
    x: Tensor,
    y: Tensor,
    state: State | None,
    layout: Layout,
    options: Options,
) -> tuple[Tensor, State]:
    """Run the block on what linear_x and linear_y give, padding on the right.

    Args:
        where: who asks, for the messages of errors.
        params: conv_1d.* and rg_lru.*, see `rglru.init`.
        x: (..., L, W), from linear_x.
        y: (..., L, W), from linear_y; the gate before its gelu.
        state: before the first sample; zeros if None.
        layout: lengths, reset and timesteps; no mask.
        options: see `Options`.

    Returns:
        What linear_out takes, (..., L, W) in x's dtype, and the new state, of the forward direction
        if there are two.
    """

    def run(params: Params, parts: tuple[Tensor, ...], layout: Layout) -> tuple[Tensor, State]:
        x, y = parts
        return _one_way(where, params, x, y, state, layout, options)

    return in_directions(
        where, params, (x, y), state, layout, run, bidirectional=options.bidirectional
    )


def _one_way(
    where: str,
    params: Params,
    x: Tensor,
    y: Tensor,
    state: State | None,
    layout: Layout,
    options: Options,
) -> tuple[Tensor, State]:
    _check(where, params, x, y, state, x.shape[:-2])
    length = x.shape[-2]
    reset = None if layout.reset is None else layout.reset.expand(x.shape[:-1])
    v, tail = causal_conv1d(
        x, params["conv_1d.weight"], params.get("conv_1d.bias"),
        None if state is None else state.conv, reset=reset, lengths=layout.lengths,
    )  # fmt: skip
    gates = gate_logits(params, v)
    resets = layout.resets(length)
    with full_precision(x.device):
        if options.start_rule and state is not None:
            resets = _starts(state, resets, length)
        h, last = rg_lru_scan(
            v, *gates, rate_of(params, gates[0], options), *biases(params, gates[0]),
            None if state is None else state.h, integration_timesteps=layout.timesteps,
            timestep_mode=options.timestep_mode, reset=resets, start_rule=options.start_rule,
            mask=layout.valid(length), backend="reference" if options.recurrent else "auto",
        )  # fmt: skip
        form = "tanh" if options.gelu == "tanh" else "none"
        out = torch.nn.functional.gelu(y, approximate=form) * h
    return out.to(x.dtype), State(tail, last, _has_started(x, state, layout))


def step(
    where: str,
    params: Params,
    x: Tensor,
    y: Tensor,
    state: State,
    timestep: Tensor | None,
    options: Options,
    rate: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Take one step on what linear_x and linear_y give, (..., W); rate as of `rate_of`.

    Returns:
        What linear_out takes, (..., W) in x's dtype, and the new state.
    """
    known = x.is_cpu or x.is_cuda
    if not known or options.recurrent or type(state) is not State or autocasting(x.device):
        gaps = None if timestep is None else timestep.unsqueeze(-1)
        x, y = x.unsqueeze(-2), y.unsqueeze(-2)
        out, new = inner(where, params, x, y, state, Layout(None, None, None, gaps), options)
        return out.squeeze(-2), new
    batch = x.shape[:-1]
    _check(where, params, x, y, state, batch)
    rate = rate_of(params, x, options) if rate is None else rate
    if rate.dtype is not x.dtype or rate.dtype is not state.h.dtype:
        rate = rate.to(torch.promote_types(torch.promote_types(rate.dtype, x.dtype), state.h.dtype))
    out, *new = griffin_step(
        x, y, state.conv, state.h, state.started, params["conv_1d.weight"],
        params.get("conv_1d.bias"), params["rg_lru.input_gate_weight"],
        params["rg_lru.input_gate_bias"].flatten(), params["rg_lru.recurrent_gate_weight"],
        params["rg_lru.recurrent_gate_bias"].flatten(), rate,
        None if timestep is None else timestep.expand(batch),
        options.timestep_mode == "state_only", options.start_rule, options.gelu == "tanh",
    )  # fmt: skip
    return out, State(*new)


def gate_logits(params: Params, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return what goes into the sigmoids of input and recurrence gate, (..., L, W), but the biases.

    Both come from one matrix product a block.
    """
    weights = torch.cat([params[f"rg_lru.{n}_weight"] for n in GATES], dim=-1)  # (heads, w, 2 w)
    heads, width, _ = weights.shape
    dtype = torch.promote_types(v.dtype, weights.dtype)
    logits = torch.einsum(
        "...hi,hij->...hj", v.unflatten(-1, (heads, width)).to(dtype), weights.to(dtype)
    )
    input_gate, recurrent_gate = logits.chunk(2, dim=-1)
    return input_gate.flatten(-2), recurrent_gate.flatten(-2)


def rate_of(params: Params, gate: Tensor, options: Options) -> Tensor:
    """Return c softplus(Lambda) dt_scale (W,), which is -log a at an open gate."""
    Lambda = params["rg_lru.recurrent_param"]
    wide = torch.promote_types(torch.promote_types(gate.dtype, Lambda.dtype), torch.float32)
    return torch.nn.functional.softplus(Lambda.to(wide)) * options.c * options.dt_scale


def biases(params: Params, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the biases of input and recurrence gate, (W,), at least float32."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    to_i, to_r = (params[f"rg_lru.{n}_bias"].flatten().to(wide) for n in GATES)
    return to_i, to_r


def logs(
    params: Params, v: Tensor, timesteps: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Return log a (..., L, W) in the decay and in the multiplier."""
    _, gate = gate_logits(params, v)
    with full_precision(v.device):
        rate = rate_of(params, gate, options)
        log_a = -rate * torch.sigmoid(gate.to(rate.dtype) + biases(params, gate)[1])
        if timesteps is None:
            return log_a, log_a
        timed = timesteps.to(rate.dtype).unsqueeze(-1) * log_a
        return timed, log_a if options.timestep_mode == "state_only" else timed


def multiplier(log_a: Tensor) -> Tensor:
    """Return sqrt(1 - a^2) without the cancellation near a = 1, its slope guarded."""
    return guarded_sqrt(-torch.expm1(2 * log_a))


def state_shapes(params: Params) -> tuple[tuple[int, int], tuple[int]]:
    """Return the shapes (K - 1, W) and (W,) of a state without batch axes."""
    width, _, taps = params["conv_1d.weight"].shape
    return (taps - 1, width), (width,)


def _starts(state: State, resets: Tensor | None, length: int) -> Tensor:
    """Return where a document starts: at resets, and at the first sample a fresh state meets."""
    first = torch.arange(length, device=state.started.device) == 0
    starts = first & ~state.started.unsqueeze(-1)
    return starts if resets is None else starts | resets


def _has_started(x: Tensor, state: State | None, layout: Layout) -> Tensor:
    """Return whether any sample has counted so far, (...) bool."""
    if layout.lengths is not None:
        now = layout.lengths > 0
    else:
        now = torch.full(x.shape[:-2], x.shape[-2] > 0, dtype=torch.bool, device=x.device)
    return now if state is None else now | state.started


def _check(
    where: str, params: Params, x: Tensor, y: Tensor, state: State | None, batch: torch.Size
) -> None:
    """Raise unless widths, blocks and state belong together."""
    width = params["rg_lru.recurrent_param"].shape[0]
    heads, block, _ = params["rg_lru.input_gate_weight"].shape
    if heads * block != width:
        raise ValueError(
            f"{where}: {heads} gate blocks of width {block} do not make up the width {width} of "
            "rg_lru.recurrent_param"
        )
    for name, value in (("linear_x", x), ("linear_y", y)):
        if value.shape != (*x.shape[:-1], width):
            raise ValueError(
                f"{where}: {name} gives {tuple(value.shape)}, expected {(*x.shape[:-1], width)}"
            )
    if state is None:
        return
    conv, h = state_shapes(params)
    shapes = {"conv": (*batch, *conv), "h": (*batch, *h), "started": tuple(batch)}
    check_parts(where, state, State, shapes, x)
    if state.started.dtype != torch.bool:
        raise ValueError(f"{where}: state.started has dtype {state.started.dtype}, expected bool")
