# SPDX-License-Identifier: MIT
"""Mamba (S6): a gated block around a selective scan, whose step, B and C come from the input.

    (x, z) = in_proj(u);   v = silu(conv1d(x));   (r, B_t, C_t) = x_proj(v)
    delta_t = softplus(dt_proj(r));   A = -exp(A_log)
    h_t = A_bar_t h_{t-1} + gamma_t B_t v_t;   y = out_proj((C_t h_t + D v_t) silu(z_t))

Parameter names are those of published checkpoints.

Source: Gu & Dao 2023, arXiv:2312.00752, sections 3.2 to 3.4 and 3.6 (initialisation of delta).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.discretize import resolve
from lrnnx_core.models import _projected, _selective
from lrnnx_core.models._common import check_choice, check_input, check_sizes, check_timestep
from lrnnx_core.models._selective import DISCRETIZATIONS, MODES, InnerNorm, State
from lrnnx_core.sequences import Layout, layout
from lrnnx_core.types import Discrete, Discretization, Mode, Number, Params, Scheme, TimestepMode

__all__ = ["DISCRETIZATIONS", "MODES", "State", "discretize", "init", "init_state", "scan", "step"]

PROJECTIONS = ("in_proj", "out_proj")


def init(
    d_model: int,
    d_state: int = 16,
    *,
    d_conv: int = 4,
    expand: int = 2,
    dt_rank: int | None = None,
    dt_init: Literal["random", "constant"] = "random",
    dt_init_scale: Number = 1.0,
    dt_min: Number = 1e-3,
    dt_max: Number = 1e-1,
    dt_floor: Number = 1e-4,
    conv_bias: bool = True,
    bias: bool = False,
    inner_norm: InnerNorm = "none",
    bidirectional: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return fresh parameters.

    Args:
        d_model: channels H.
        d_state: states N a channel of the inner width E = expand H.
        d_conv: width K of the convolution.
        expand: E / H.
        dt_rank: rank R of the step's projection; ceil(H / 16) if None.
        dt_init: whether dt_proj's weight starts uniform (``random``) or ``constant``.
        dt_init_scale: multiplies that weight's bound 1/sqrt(R).
        dt_min: smallest initial step; log of the step is uniform up to log dt_max.
        dt_max: largest initial step.
        dt_floor: no initial step is smaller.
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out_proj have one.
        inner_norm: RMS norms of dt, B and C after x_proj: ``none``, ``rms`` (without weights, as
            FalconMamba), ``learned`` (as Jamba).
        bidirectional: add a second set of what stands between the projections, drawn alike, for
            the reverse direction.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Returns:
        in_proj.weight (2 E, H), conv1d.weight (E, 1, K), conv1d.bias (E,), x_proj.weight (R + 2 N,
        E), dt_proj.weight (E, R), dt_proj.bias (E,), A_log (E, N), D (E,), out_proj.weight (H, E);
        with ``bias`` in_proj.bias and out_proj.bias; with learned norms dt_layernorm.weight (R,),
        b_layernorm.weight and c_layernorm.weight (N,); with ``bidirectional`` all but in_proj and
        out_proj again, under ``reverse.``.

    Raises:
        ValueError: a size < 1, or an unknown choice.

    Source: Gu & Dao 2023, section 3.6; the reference implementation's defaults.
    """
    rank = rank_of("mamba.init", d_model, d_state, d_conv, expand, dt_rank, dt_init, inner_norm)
    width = expand * d_model
    draw = initialize.Drawer(generator, device, dtype).resolved()

    def one_way() -> Params:
        ones = torch.ones(width, rank, device=draw.device, dtype=draw.dtype)
        sign = 2 * draw.uniform(width, rank) - 1 if dt_init == "random" else ones
        bound = d_conv**-0.5
        states = torch.arange(1, d_state + 1, dtype=torch.float64, device="cpu")
        params: Params = {
            "in_proj.weight": _projected.linear_init(draw, 2 * width, d_model),
            "conv1d.weight": (2 * draw.uniform(width, 1, d_conv) - 1) * bound,
            "conv1d.bias": (2 * draw.uniform(width) - 1) * bound,
            "x_proj.weight": _projected.linear_init(draw, rank + 2 * d_state, width),
            "dt_proj.weight": sign * rank**-0.5 * dt_init_scale,
            "dt_proj.bias": _projected.dt_bias(draw, width, dt_min, dt_max, dt_floor),
            "A_log": draw.tensor(states.log()).repeat(width, 1),
            "D": torch.ones_like(ones[:, 0]),
            "out_proj.weight": _projected.linear_init(draw, d_model, width),
        }
        if not conv_bias:
            del params["conv1d.bias"]
        if bias:
            params["in_proj.bias"] = torch.zeros_like(params["in_proj.weight"][:, 0])
            params["out_proj.bias"] = torch.zeros_like(params["out_proj.weight"][:, 0])
        if inner_norm == "learned":
            sizes = {"dt": rank, "b": d_state, "c": d_state}
            for name, size in sizes.items():
                params[f"{name}_layernorm.weight"] = draw.tensor(torch.ones(size, device="cpu"))
        return params

    return _projected.with_reverse(one_way, PROJECTIONS) if bidirectional else one_way()


def init_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> State:
    """Return the zero state: conv (*batch_shape, K - 1, E) and h (*batch_shape, E, N).

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        dtype: of the activations, and so of conv; h is at least float32.
    """
    conv, h = _selective.state_shapes(params)
    like = params["conv1d.weight"]
    wide = torch.promote_types(params["A_log"].dtype, torch.float32)
    kind = like.dtype if dtype is None else dtype
    return State(
        like.new_zeros((*batch_shape, *conv), dtype=kind),
        like.new_zeros((*batch_shape, *h), dtype=torch.promote_types(kind, wide)),
    )


def discretize(
    params: Params,
    v: Tensor,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    inner_norm: InnerNorm = "none",
) -> Discrete:
    """Return (A_bar, B_bar), each (..., L, E, N), for the input v of the recurrence.

    `scan` never forms them for a whole sequence; this is for looking at what the model does.

    Args:
        params: from `init`.
        v: (..., L, E), what the convolution gives.
        integration_timesteps: (..., L), time elapsed before each sample: multiplies delta.
        timestep_mode: whether in decay and input gain, or in the decay alone.
        discretization: ``mamba`` (default), ``zoh``, ``bilinear``, ``gbt``, ``euler``, ``dirac``,
            ``async``, or a callable.
        alpha: the number of ``gbt``.
        dt_scale: multiplies delta.
        inner_norm: as in `init`.

    Raises:
        ValueError: an unknown choice.

    Source: Gu & Dao 2023, section 2 (discretization) and algorithm 2 (delta from the input).
    """
    function = scheme_of("mamba.discretize", discretization, timestep_mode, alpha)
    if discretization == "async":
        timestep_mode = "state_only"
    D = params["D"]
    check_input("mamba.discretize", v, len(D), D, rank=2, shape="v (..., L, E), E in place of H,")
    layout("mamba.discretize", v, integration_timesteps=integration_timesteps)
    raw, B, _ = _selective.steps_and_matrices(params, v, inner_norm)
    delta = torch.nn.functional.softplus(raw + params["dt_proj.bias"]) * dt_scale
    tau = 1.0 if integration_timesteps is None else integration_timesteps.unsqueeze(-1)
    decay, drive = tau * delta, delta if timestep_mode == "state_only" else tau * delta
    A = -torch.exp(params["A_log"])
    A_bar, gamma = function(A, decay.unsqueeze(-1), drive.unsqueeze(-1))
    return A_bar, gamma * B.unsqueeze(-2)


def scan(
    params: Params,
    u: Tensor,
    state: State | None = None,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    inner_norm: InnerNorm = "none",
    bidirectional: bool = False,
    mode: Mode = "auto",
) -> tuple[Tensor, State]:
    """Run the block over a sequence.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        state: before the first sample, from `init_state`, `scan` or `step`; zeros if None.
        integration_timesteps: (..., L), time elapsed before each sample: multiplies delta.
        timestep_mode: whether in decay and input gain (``both``: a gap of zero drops the sample's
            input except under ``dirac``) or in the decay alone (``state_only``).
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, forget everything, the convolution's tail too, before that sample.
        discretization: see `discretize`.
        alpha: the number of ``gbt``.
        dt_scale: multiplies delta.
        inner_norm: as in `init`.
        bidirectional: add the reverse direction, which has its own convolution and recurrence
            between the same projections; both count the current sample.
        mode: ``scan`` (chunked; ``auto`` is the same) or ``recurrent`` (a loop, the specification).

    Returns:
        y (..., L, H) in u's dtype, and the state after the last sample (of the forward direction
        where bidirectional).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state of another model or
            batch, or any with ``bidirectional``.

    Source: Gu & Dao 2023, section 3.4 and algorithm 2; for ``bidirectional`` Zhu et al. 2024
    (Vision Mamba), arXiv:2401.09417.
    """
    options = options_of(
        "mamba.scan", discretization, timestep_mode, alpha, dt_scale, inner_norm, mode,
        bidirectional,
    )  # fmt: skip
    sequence = {"lengths": lengths, "mask": mask, "reset": reset}
    return run(
        "mamba.scan", params, u, state, options, integration_timesteps=integration_timesteps,
        **sequence,
    )  # fmt: skip


def step(
    params: Params,
    u_t: Tensor,
    state: State,
    *,
    integration_timestep: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    inner_norm: InnerNorm = "none",
) -> tuple[Tensor, State]:
    """Take one step.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: from `init_state`, `scan` or `step`.
        integration_timestep: (...), time elapsed since the previous sample.
        timestep_mode: see `scan`.
        discretization: see `discretize`.
        alpha: the number of ``gbt``.
        dt_scale: multiplies delta.
        inner_norm: as in `init`.

    Returns:
        y_t (..., H) in u_t's dtype, and the new state.

    Raises:
        ValueError: as `scan`.
    """
    options = options_of(
        "mamba.step", discretization, timestep_mode, alpha, dt_scale, inner_norm, "auto"
    )
    return run_step("mamba.step", params, u_t, state, integration_timestep, options)


def run(
    where: str,
    params: Params,
    u: Tensor,
    state: State | None,
    options: _selective.Options,
    **sequence: Tensor | None,
) -> tuple[Tensor, State]:
    """Run the block over a sequence; STREAM's too, which differs in its parameters."""
    check_family(where, params)
    weight = params["in_proj.weight"]
    check_input(where, u, weight.shape[1], weight, rank=2, shape="(..., L, H)")

    def body(x: Tensor, seq: Layout) -> tuple[Tensor, State]:
        xz = _projected.linear(params, "in_proj", x)
        y, new = _selective.inner(where, params, xz, state, seq, options)
        return _projected.linear(params, "out_proj", y), new

    y, new = _projected.around_padding(u, layout(where, u, **sequence), body)
    return y.to(u.dtype), new


def run_step(
    where: str,
    params: Params,
    u_t: Tensor,
    state: State,
    timestep: Tensor | None,
    options: _selective.Options,
) -> tuple[Tensor, State]:
    """Take one step; STREAM's too."""
    check_family(where, params)
    weight = params["in_proj.weight"]
    check_input(where, u_t, weight.shape[1], weight, rank=1, shape="(..., H)")
    check_timestep(where, timestep, u_t)
    xz = _projected.linear(params, "in_proj", u_t)
    y, new = _selective.step(where, params, xz, state, timestep, options)
    return _projected.linear(params, "out_proj", y).to(u_t.dtype), new


def check_family(where: str, params: Params) -> None:
    """Raise if the parameters of STREAM are given to Mamba."""
    if "dtA_bias" in params and not where.startswith("stream"):
        function = where.rsplit(".", maxsplit=1)[-1]
        raise ValueError(f"{where}: params have dtA_bias, they are STREAM's; use stream.{function}")


def rank_of(
    where: str,
    d_model: int,
    d_state: int,
    d_conv: int,
    expand: int,
    dt_rank: int | None,
    dt_init: str,
    inner_norm: str,
) -> int:
    """Check the sizes and choices of `init`; return the rank R of the step's projection."""
    check_sizes(where, d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
    check_choice(where, "dt_init", dt_init, ("random", "constant"))
    check_choice(where, "inner_norm", inner_norm, ("none", "rms", "learned"))
    rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
    check_sizes(where, dt_rank=rank)
    return rank


def options_of(
    where: str,
    discretization: Discretization | None,
    timestep_mode: TimestepMode,
    alpha: Number | None,
    dt_scale: Number,
    inner_norm: InnerNorm,
    mode: Mode,
    bidirectional: bool = False,
) -> _selective.Options:
    """Check the choices of a call and bundle them."""
    check_choice(where, "mode", mode, MODES)
    check_choice(where, "inner_norm", inner_norm, ("none", "rms", "learned"))
    scheme_of(where, discretization, timestep_mode, alpha)
    return _selective.Options(
        "mamba" if discretization is None else discretization,
        timestep_mode, alpha, dt_scale, inner_norm, mode == "recurrent", bidirectional,
    )  # fmt: skip


def scheme_of(
    where: str,
    discretization: Discretization | None,
    timestep_mode: TimestepMode,
    alpha: Number | None,
) -> Scheme:
    """Return the scheme of a choice, or raise with the list."""
    name = "mamba" if discretization is None else discretization
    return resolve(name, timestep_mode, alpha, DISCRETIZATIONS, where)[0]
