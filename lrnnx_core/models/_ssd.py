# SPDX-License-Identifier: MIT
"""The inner part of a Mamba-2 block, between its two projections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends.transforms import autocasting, full_precision
from lrnnx_core.models._common import check_choice, check_sizes
from lrnnx_core.models._projected import check_parts, in_directions, rms_norm
from lrnnx_core.ops.causal_conv1d import causal_conv1d
from lrnnx_core.ops.linear_scan import linear_scan
from lrnnx_core.ops.ssd import ssd
from lrnnx_core.ops.steps import ssd_step
from lrnnx_core.sequences import Layout, layout
from lrnnx_core.types import Mode, Number, Params, TimestepMode

DISCRETIZATIONS = ("mamba",)
MODES = ("auto", "scan", "recurrent")
NORM_EPS = 1e-5


class State(NamedTuple):
    """What a Mamba-2 block remembers.

    conv (..., K - 1, E + 2 G N): the last inputs of the convolution, oldest first, in the
    activations' dtype. h (..., nh, P, N): the recurrence, at least float32.
    """

    conv: Tensor
    h: Tensor


class Options(NamedTuple):
    """The choices and numbers that `inner` and its callers share."""

    timestep_mode: TimestepMode
    dt_scale: Number
    dt_limit: tuple[float, float]
    n_groups: int
    norm_before_gate: bool
    chunk_size: int
    recurrent: bool
    bidirectional: bool = False


def options_of(
    where: str,
    discretization: str | None,
    timestep_mode: TimestepMode,
    dt_scale: Number,
    dt_limit: tuple[float, float],
    n_groups: int,
    norm_before_gate: bool,
    mode: Mode,
    chunk_size: int,
    bidirectional: bool = False,
) -> Options:
    """Check the choices of a call and bundle them."""
    check_choice(where, "discretization", discretization or "mamba", DISCRETIZATIONS)
    check_choice(where, "timestep_mode", timestep_mode, ("both", "state_only"))
    check_choice(where, "mode", mode, MODES)
    check_sizes(where, n_groups=n_groups, chunk_size=chunk_size)
    if not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{where}: dt_limit = {dt_limit}, expected 0 <= low <= high")
    return Options(
        timestep_mode, dt_scale, dt_limit, n_groups, norm_before_gate, chunk_size,
        mode == "recurrent", bidirectional,
    )  # fmt: skip


def state_shapes(
    params: Params, width: int, n_groups: int
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Return (K - 1, E + 2 G N) and (nh, P, N) for the inner width E."""
    mixed, _, taps = params["conv1d.weight"].shape
    heads = params["A_log"].shape[0]
    return (taps - 1, mixed), (heads, width // heads, (mixed - width) // (2 * n_groups))


def steps(
    params: Params, r: Tensor, timesteps: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the decay and the step of the input, each (..., L, nh)."""
    wide = torch.promote_types(torch.promote_types(r.dtype, params["A_log"].dtype), torch.float32)
    delta = torch.nn.functional.softplus(r.to(wide) + params["dt_bias"].to(wide))
    delta = delta.clamp(*options.dt_limit) * options.dt_scale
    decay = delta
    if timesteps is not None:
        decay = timesteps.to(wide).unsqueeze(-1) * delta
        delta = delta if options.timestep_mode == "state_only" else decay
    return -decay * torch.exp(params["A_log"].to(wide)), delta


def inner(
    where: str, params: Params, parts: Tensor, state: State | None, seq: Layout, options: Options
) -> tuple[Tensor, State]:
    """Run the block on in_proj's output (..., L, 2 E + 2 G N + nh), padding on the right and zero.

    Returns:
        What out_proj takes, (..., L, E), and the new state, of the forward direction if there are
        two.
    """

    def run(params: Params, given: tuple[Tensor, ...], layout: Layout) -> tuple[Tensor, State]:
        return _one_way(where, params, given[0], state, layout, options)

    return in_directions(
        where, params, (parts,), state, seq, run, bidirectional=options.bidirectional
    )


def _one_way(
    where: str, params: Params, parts: Tensor, state: State | None, seq: Layout, options: Options
) -> tuple[Tensor, State]:
    mixed, heads = params["conv1d.weight"].shape[0], params["A_log"].shape[0]
    batch, length = parts.shape[:-2], parts.shape[-2]
    groups = options.n_groups
    width = _width(where, params, parts.shape[-1], groups)
    conv, h_shape = state_shapes(params, width, groups)
    if state is not None:
        check_parts(where, state, State, {"conv": (*batch, *conv), "h": (*batch, *h_shape)}, parts)
    z, xBC, r = parts.split([width, mixed, heads], dim=-1)
    xBC, tail = causal_conv1d(
        xBC, params["conv1d.weight"], params.get("conv1d.bias"),
        None if state is None else state.conv,
        activation="silu", reset=seq.reset, lengths=seq.lengths,
    )  # fmt: skip
    with full_precision(parts.device):
        log_decay, delta = steps(params, r, seq.timesteps, options)
        v = xBC.to(log_decay.dtype)
        valid = seq.valid(length)
        if valid is not None:  # a step of zero leaves the state alone
            keep = valid.unsqueeze(-1)
            log_decay, delta, v = (
                torch.where(keep, t, torch.zeros_like(t)) for t in (log_decay, delta, v)
            )
        x, B, C = v.split([width, groups * h_shape[2], groups * h_shape[2]], dim=-1)
        x = x.unflatten(-1, (heads, -1))
        B, C = (t.unflatten(-1, (groups, -1)) for t in (B, C))
        h0 = x.new_zeros(*batch, *h_shape) if state is None else state.h.to(x.dtype)
        drive, reset = delta.unsqueeze(-1) * x, seq.resets(length)
        run = _loop if options.recurrent else ssd
        choices = {} if options.recurrent else {"chunk_size": options.chunk_size}
        y, h = run(drive, log_decay, B, C, h0, reset=reset, **choices)
        y = (y + params["D"].to(y.dtype).unsqueeze(-1) * x).flatten(-2)
        y = _gate(params, y, z.to(y.dtype), options)
    return y.to(parts.dtype), State(tail, h)


def step(
    where: str,
    params: Params,
    parts: Tensor,
    state: State,
    timestep: Tensor | None,
    options: Options,
    A: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Take one step on in_proj's output (..., 2 E + 2 G N + nh); A is -exp(A_log), if at hand.

    Returns:
        What out_proj takes, (..., E), and the new state.
    """
    if (
        not (parts.is_cpu or parts.is_cuda)
        or options.recurrent
        or isinstance(options.dt_scale, Tensor)
        or type(state) is not State
        or autocasting(parts.device)
    ):
        gaps = None if timestep is None else timestep.unsqueeze(-1)
        u = parts.unsqueeze(-2)
        seq = layout(where, u, integration_timesteps=gaps)
        y, new = inner(where, params, u, state, seq, options)
        return y.squeeze(-2), new
    batch, width = parts.shape[:-1], _width(where, params, parts.shape[-1], options.n_groups)
    conv, h_shape = state_shapes(params, width, options.n_groups)
    check_parts(where, state, State, {"conv": (*batch, *conv), "h": (*batch, *h_shape)}, parts)
    A = rates(params) if A is None else A
    if A.dtype is not parts.dtype or A.dtype is not state.h.dtype:
        A = A.to(torch.promote_types(torch.promote_types(A.dtype, parts.dtype), state.h.dtype))
    low, high = options.dt_limit
    y, tail, h = ssd_step(
        parts, state.conv, state.h, params["conv1d.weight"], params.get("conv1d.bias"),
        params["dt_bias"], A, params["D"], params.get("norm.weight"),
        None if timestep is None else timestep.expand(batch), options.n_groups, float(low),
        float(high), float(options.dt_scale), options.timestep_mode == "state_only",
        options.norm_before_gate,
    )  # fmt: skip
    return y, State(tail, h)


def rates(params: Params) -> Tensor:
    """Return A (nh,), at least float32."""
    A_log = params["A_log"]
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def _width(where: str, params: Params, total: int, groups: int) -> int:
    """Return E for ``total`` channels of in_proj's output, or raise where the groups do not fit."""
    mixed, heads = params["conv1d.weight"].shape[0], params["A_log"].shape[0]
    width = total - mixed - heads
    if width < 1 or width % heads or (mixed - width) % (2 * groups) or heads % groups:
        raise ValueError(
            f"{where}: n_groups = {groups} does not fit {heads} heads and "
            f"{mixed - width} channels of B and C"
        )
    return width


def _gate(params: Params, y: Tensor, z: Tensor, options: Options) -> Tensor:
    """Return RMSNorm(y silu(z)) by groups, or with the two the other way round."""
    opening = torch.nn.functional.silu(z)
    weight = params.get("norm.weight")
    if weight is None:
        return y * opening
    y = y if options.norm_before_gate else y * opening
    grouped = y.unflatten(-1, (options.n_groups, -1))
    y = rms_norm(grouped, None, NORM_EPS).flatten(-2) * weight.to(y.dtype)
    return y * opening if options.norm_before_gate else y


def _loop(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, h0: Tensor, *, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence step by step: the specification."""
    per_group = x.shape[-2] // B.shape[-2]
    B, C = (t.repeat_interleave(per_group, -2).unsqueeze(-2) for t in (B, C))
    drive = x.unsqueeze(-1) * B
    a = torch.exp(log_decay)[..., None, None].expand(drive.shape)
    h, last = linear_scan(
        a.flatten(-3), drive.flatten(-3), h0.flatten(-3), reset=reset, backend="reference"
    )
    h = h.unflatten(-1, drive.shape[-3:])
    return (h * C).sum(-1), last.unflatten(-1, drive.shape[-3:])
