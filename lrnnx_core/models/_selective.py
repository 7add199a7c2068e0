# SPDX-License-Identifier: MIT
"""The inner part of a Mamba block, between its two projections; STREAM shares it.

(x, z) = split(in_proj(u));  v = silu(conv(x));  (r, B, C) = split(x_proj(v))
y = selective_scan(v, dt_proj(r), -exp(A_log), B, C, D, z)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends.transforms import autocasting
from lrnnx_core.discretize import FUSED
from lrnnx_core.models._common import check_choice, check_keys
from lrnnx_core.models._projected import check_parts, in_directions, linear, rms_norm
from lrnnx_core.ops.causal_conv1d import causal_conv1d
from lrnnx_core.ops.mamba_inner import mamba_inner
from lrnnx_core.ops.selective_scan import selective_scan
from lrnnx_core.ops.steps import mamba_step
from lrnnx_core.sequences import Layout, layout
from lrnnx_core.types import Discretization, Number, Params, TimestepMode

DISCRETIZATIONS = ("mamba", "zoh", "bilinear", "gbt", "euler", "dirac", "async")
MODES = ("auto", "scan", "recurrent")
InnerNorm = Literal["none", "rms", "learned"]
INNER_NORMS = ("dt_layernorm.weight", "b_layernorm.weight", "c_layernorm.weight")


class State(NamedTuple):
    """What a Mamba block remembers.

    conv (..., K - 1, E): the last inputs of the convolution, oldest first, in the activations'
    dtype. h (..., E, N): the recurrence, at least float32.
    """

    conv: Tensor
    h: Tensor


class Options(NamedTuple):
    """The choices and numbers that `inner` and its callers share."""

    discretization: Discretization
    timestep_mode: TimestepMode
    alpha: Number | None
    dt_scale: Number
    inner_norm: InnerNorm
    recurrent: bool = False
    bidirectional: bool = False


def inner(
    where: str, params: Params, xz: Tensor, state: State | None, seq: Layout, options: Options
) -> tuple[Tensor, State]:
    """Run the block on in_proj's output xz (..., L, 2 E), padding on the right and zero.

    Returns:
        What out_proj takes, (..., L, E), and the new state, of the forward direction if there are
        two.
    """

    def run(params: Params, parts: tuple[Tensor, ...], layout: Layout) -> tuple[Tensor, State]:
        return _one_way(where, params, parts[0], state, layout, options)

    return in_directions(where, params, (xz,), state, seq, run, bidirectional=options.bidirectional)


def _one_way(
    where: str, params: Params, xz: Tensor, state: State | None, layout: Layout, options: Options
) -> tuple[Tensor, State]:
    x, z = xz.chunk(2, dim=-1)
    A = rates(params)
    batch, length = x.shape[:-2], x.shape[-2]
    taps, width = params["conv1d.weight"].shape[-1], x.shape[-1]
    if state is not None:
        shapes = {"conv": (*batch, taps - 1, width), "h": (*batch, *A.shape)}
        check_parts(where, state, State, shapes, x)
    if _plain(params, xz, layout, options):
        return _at_once(params, xz, state, layout, options, A)
    v, tail = causal_conv1d(
        x, params["conv1d.weight"], params.get("conv1d.bias"),
        None if state is None else state.conv,
        activation="silu", reset=layout.reset, lengths=layout.lengths,
    )  # fmt: skip
    dt, B, C = steps_and_matrices(params, v, options.inner_norm)
    bias, softplus = _wide(params["dt_proj.bias"]), True
    if isinstance(options.dt_scale, Tensor) or options.dt_scale != 1.0:
        dt = torch.nn.functional.softplus(_wide(dt) + bias) * options.dt_scale
        bias, softplus = None, False
    decay_dt = _decay_steps(params, options)
    timesteps = layout.timesteps
    valid = layout.valid(length)
    if valid is not None:
        # A step of zero with no input leaves the state alone: the last state is that at the length.
        ones = torch.ones((), dtype=A.dtype, device=x.device)
        timesteps = torch.where(valid, ones if timesteps is None else timesteps, 0 * ones)
        v = torch.where(valid.unsqueeze(-1), v, torch.zeros_like(v))
    y, h = selective_scan(
        v, dt, A, B, C, _wide(params["D"]), z, bias, None if state is None else state.h,
        decay_dt=decay_dt, softplus=softplus, discretization=options.discretization,
        alpha=options.alpha, integration_timesteps=timesteps,
        timestep_mode=options.timestep_mode, reset=layout.resets(length),
        backend="reference" if options.recurrent else "auto",
    )  # fmt: skip
    return y, State(tail, h)


def _plain(params: Params, xz: Tensor, layout: Layout, options: Options) -> bool:
    """Return whether `mamba_inner` does this: no padding, nothing after x_proj or in the step.

    Parameters that do not fit each other are left to the operators, which say what is wrong.
    """
    if (
        _scheme(options) is None
        or isinstance(options.dt_scale, Tensor)
        or options.dt_scale != 1.0
        or options.inner_norm != "none"
        or options.recurrent
        or layout.lengths is not None
        or layout.mask is not None
        or "x_proj.bias" in params
        or autocasting(xz.device)
    ):
        return False
    width, states = params["A_log"].shape
    rank = params["dt_proj.weight"].shape[-1]
    taps = params["conv1d.weight"].shape[-1]
    shapes = {
        "conv1d.weight": (width, 1, taps), "conv1d.bias": (width,), "D": (width,),
        "x_proj.weight": (rank + 2 * states, width), "dt_proj.weight": (width, rank),
        "dt_proj.bias": (width,), "dtA_bias": (width,),
    }  # fmt: skip
    found = {n: params[n] for n in shapes if n in params}
    return (
        taps > 0
        and xz.shape[-1] == 2 * width
        and all(t.shape == shapes[n] and t.device == xz.device for n, t in found.items())
        and all(found[n].dtype is xz.dtype for n in ("x_proj.weight", "dt_proj.weight"))
        and all(t.is_floating_point() for t in found.values())
    )


def _at_once(
    params: Params,
    xz: Tensor,
    state: State | None,
    layout: Layout,
    options: Options,
    A: Tensor,
) -> tuple[Tensor, State]:
    batch, length = xz.shape[:-2], xz.shape[-2]

    def along(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(*batch, length)

    decay_dt = _decay_steps(params, options)
    y, tail, h = mamba_inner(
        xz, params["conv1d.weight"], params.get("conv1d.bias"), params["x_proj.weight"],
        params["dt_proj.weight"], A, _wide(params["D"]), _wide(params["dt_proj.bias"]),
        None if state is None else state.conv.to(xz.dtype), None if state is None else state.h,
        None if decay_dt is None else decay_dt.expand(*batch, 1, -1),
        along(layout.timesteps), along(layout.reset),
        options.timestep_mode == "state_only" or options.discretization == "async",
        _scheme(options) or "",
    )  # fmt: skip
    return y, State(tail, h)


def _scheme(options: Options) -> str | None:
    """Return the fused discretization that options name, None if there is none."""
    name = options.discretization
    name = "zoh" if name == "async" else name
    return name if isinstance(name, str) and name in FUSED else None


def _decay_steps(params: Params, options: Options) -> Tensor | None:
    """Return STREAM's step of the decay (E,)."""
    if "dtA_bias" not in params:
        return None
    return torch.nn.functional.softplus(_wide(params["dtA_bias"])) * options.dt_scale


def step(
    where: str,
    params: Params,
    xz: Tensor,
    state: State,
    timestep: Tensor | None,
    options: Options,
    A: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Take one step on in_proj's output xz (..., 2 E); A is -exp(A_log), if at hand.

    Returns:
        What out_proj takes, (..., E), and the new state.
    """
    scheme = _scheme(options)
    if (
        scheme is None
        or not (xz.is_cpu or xz.is_cuda)
        or isinstance(options.dt_scale, Tensor)
        or options.recurrent
        or type(state) is not State
        or "x_proj.bias" in params
        or autocasting(xz.device)
    ):
        gaps = None if timestep is None else timestep.unsqueeze(-1)
        x = xz.unsqueeze(-2)
        seq = layout(where, x, integration_timesteps=gaps)
        y, new = inner(where, params, x, state, seq, options)
        return y.squeeze(-2), new
    A = rates(params) if A is None else A
    if A.dtype is not xz.dtype or A.dtype is not state.h.dtype:
        A = A.to(torch.promote_types(torch.promote_types(A.dtype, xz.dtype), state.h.dtype))
    batch, taps = xz.shape[:-1], params["conv1d.weight"].shape[-1]
    conv_shape, h_shape = (*batch, taps - 1, A.shape[0]), (*batch, *A.shape)
    check_parts(where, state, State, {"conv": conv_shape, "h": h_shape}, xz)
    norms: tuple[Tensor | None, ...] = (None, None, None)
    if options.inner_norm == "learned":
        check_keys("mamba", params, INNER_NORMS, "make them with init(inner_norm='learned')")
        norms = tuple(params[n] for n in INNER_NORMS)
    decay_dt = _decay_steps(params, options)
    y, conv, h = mamba_step(
        xz, state.conv, state.h, params["conv1d.weight"], params.get("conv1d.bias"),
        params["x_proj.weight"], params["dt_proj.weight"], params["dt_proj.bias"], A, params["D"],
        decay_dt, None if timestep is None else timestep.expand(batch), *norms,
        float(options.dt_scale), options.inner_norm != "none",
        options.timestep_mode == "state_only" or options.discretization == "async", scheme,
    )  # fmt: skip
    return y, State(conv, h)


def steps_and_matrices(
    params: Params, v: Tensor, inner_norm: InnerNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dt before its bias (..., L, E), B and C (..., L, N) for the scan's input v."""
    check_choice("mamba", "inner_norm", inner_norm, ("none", "rms", "learned"))
    rank, states = params["dt_proj.weight"].shape[1], params["A_log"].shape[1]
    parts = linear(params, "x_proj", v).split([rank, states, states], dim=-1)
    if inner_norm != "none":
        if inner_norm == "learned":
            check_keys("mamba", params, INNER_NORMS, "make them with init(inner_norm='learned')")
        weights = [params[n] if inner_norm == "learned" else None for n in INNER_NORMS]
        parts = [rms_norm(p, w, 1e-6) for p, w in zip(parts, weights, strict=True)]
    r, B, C = parts
    # The bias is added in the scan, in float32.
    return linear({"dt_proj.weight": params["dt_proj.weight"]}, "dt_proj", r), B, C


def rates(params: Params) -> Tensor:
    """Return A (E, N), at least float32."""
    return -torch.exp(_wide(params["A_log"]))


def state_shapes(params: Params) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes (K - 1, E) and (E, N) of a state without batch axes."""
    width, _, taps = params["conv1d.weight"].shape
    states = params["A_log"].shape[1]
    return (taps - 1, width), (width, states)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
