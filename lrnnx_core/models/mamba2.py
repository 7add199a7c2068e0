# SPDX-License-Identifier: MIT
"""Mamba-2: Mamba with one decay a head, so that a sequence becomes matrix products by chunk (SSD).

    (z, x, B_t, C_t, r) = in_proj(u), x, B, C through conv1d and silu;   A = -exp(A_log) a head
    delta_t = clamp(softplus(r + dt_bias), dt_limit)
    h_t = exp(delta_t A) h_{t-1} + delta_t x_t (outer) B_t;   y_t = h_t C_t + D x_t
    out = out_proj(RMSNorm(y silu(z)))

Parameter names are those of published checkpoints.

Source: Dao & Gu 2024, arXiv:2405.21060, section 7 (the Mamba-2 block).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.models import _projected, _ssd
from lrnnx_core.models._common import check_input, check_sizes, check_timestep
from lrnnx_core.models._ssd import DISCRETIZATIONS, MODES, State
from lrnnx_core.sequences import Layout, layout
from lrnnx_core.types import Discrete, Mode, Number, Params, TimestepMode

__all__ = ["DISCRETIZATIONS", "MODES", "State", "discretize", "init", "init_state", "scan", "step"]

PROJECTIONS = ("in_proj", "out_proj")


def init(
    d_model: int,
    d_state: int = 128,
    *,
    d_conv: int = 4,
    expand: int = 2,
    head_dim: int | None = None,
    n_groups: int = 1,
    A_min: Number = 1.0,
    A_max: Number = 16.0,
    dt_min: Number = 1e-3,
    dt_max: Number = 1e-1,
    dt_floor: Number = 1e-4,
    conv_bias: bool = True,
    bias: bool = False,
    gated_norm: bool = True,
    bidirectional: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return fresh parameters.

    Args:
        d_model: channels H.
        d_state: states N of each channel of the inner width E = expand H.
        d_conv: width K of the convolution.
        expand: E / H.
        head_dim: channels P a head; E / P = nh heads. None: the largest divisor of E up to 64.
        n_groups: G, heads in a group share B and C; G divides nh.
        A_min: smallest initial -A; it is uniform up to A_max.
        A_max: largest initial -A.
        dt_min: smallest initial step; log of the step is uniform up to log dt_max.
        dt_max: largest initial step.
        dt_floor: no initial step is smaller.
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out_proj have one.
        gated_norm: whether y silu(z) is normalised before out_proj.
        bidirectional: add a second set of what stands between the projections, drawn alike, for
            the reverse direction.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Returns:
        in_proj.weight (2 E + 2 G N + nh, H), rows z, x, B, C, dt; conv1d.weight (E + 2 G N, 1, K),
        conv1d.bias; dt_bias, A_log, D (nh,); norm.weight (E,); out_proj.weight (H, E); with
        ``bias`` in_proj.bias and out_proj.bias; with ``bidirectional`` all but in_proj and out_proj
        again, under ``reverse.``.

    Raises:
        ValueError: a size < 1; head_dim that does not divide E, n_groups that does not divide nh.

    Source: Dao & Gu 2024, section 7; the reference implementation's defaults.
    """
    where, width = "mamba2.init", expand * d_model
    check_sizes(where, d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
    check_sizes(where, n_groups=n_groups)
    if head_dim is None:
        head_dim = max(p for p in range(1, min(width, 64) + 1) if width % p == 0)
    check_sizes(where, head_dim=head_dim)
    heads = width // head_dim
    if width % head_dim or heads % n_groups:
        raise ValueError(
            f"{where}: head_dim = {head_dim} and n_groups = {n_groups}, expected head_dim to "
            f"divide E = {width} and n_groups to divide the number of heads"
        )
    draw = initialize.Drawer(generator, device, dtype).resolved()
    mixed = width + 2 * n_groups * d_state
    bound = d_conv**-0.5

    def one_way() -> Params:
        low, high = (initialize.as_tensor(v, draw.uniform(1)[0]) for v in (A_min, A_max))
        params: Params = {
            "in_proj.weight": _projected.linear_init(draw, width + mixed + heads, d_model),
            "conv1d.weight": (2 * draw.uniform(mixed, 1, d_conv) - 1) * bound,
            "conv1d.bias": (2 * draw.uniform(mixed) - 1) * bound,
            "dt_bias": _projected.dt_bias(draw, heads, dt_min, dt_max, dt_floor),
            "A_log": torch.log(low + draw.uniform(heads) * (high - low)),
            "D": draw.tensor(torch.ones(heads, device="cpu")),
            "norm.weight": draw.tensor(torch.ones(width, device="cpu")),
            "out_proj.weight": _projected.linear_init(draw, d_model, width),
        }
        if not conv_bias:
            del params["conv1d.bias"]
        if not gated_norm:
            del params["norm.weight"]
        if bias:
            params["in_proj.bias"] = torch.zeros_like(params["in_proj.weight"][:, 0])
            params["out_proj.bias"] = torch.zeros_like(params["out_proj.weight"][:, 0])
        return params

    return _projected.with_reverse(one_way, PROJECTIONS) if bidirectional else one_way()


def init_state(
    params: Params,
    batch_shape: Sequence[int] = (),
    *,
    n_groups: int = 1,
    dtype: torch.dtype | None = None,
) -> State:
    """Return the zero state: conv (*batch_shape, K - 1, E + 2 G N), h (*batch_shape, nh, P, N).

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        n_groups: as in `init`.
        dtype: of the activations, and so of conv; h is at least float32.
    """
    conv, h = _ssd.state_shapes(params, params["out_proj.weight"].shape[1], n_groups)
    like = params["conv1d.weight"]
    kind = like.dtype if dtype is None else dtype
    wide = torch.promote_types(kind, torch.promote_types(params["A_log"].dtype, torch.float32))
    return State(
        like.new_zeros((*batch_shape, *conv), dtype=kind),
        like.new_zeros((*batch_shape, *h), dtype=wide),
    )


def discretize(
    params: Params,
    r: Tensor,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Literal["mamba"] | None = None,
    dt_scale: Number = 1.0,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Discrete:
    """Return (A_bar, gamma), each (..., L, nh): the decay, and the step that multiplies x B.

    Args:
        params: from `init`.
        r: (..., L, nh), the last rows of in_proj.
        integration_timesteps: (..., L), time elapsed before each sample: multiplies delta.
        timestep_mode: whether in decay and input gain, or in the decay alone.
        discretization: ``mamba``, the only one there is.
        dt_scale: multiplies delta.
        dt_limit: delta is held between these two.

    Raises:
        ValueError: an unknown choice.

    Source: Dao & Gu 2024, section 7; section 2 for the discretization.
    """
    options = _ssd.options_of(
        "mamba2.discretize", discretization, timestep_mode, dt_scale, dt_limit, 1, False, "auto", 64
    )
    log_decay, step = _ssd.steps(params, r, integration_timesteps, options)
    return torch.exp(log_decay), step


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
    discretization: Literal["mamba"] | None = None,
    dt_scale: Number = 1.0,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    n_groups: int = 1,
    norm_before_gate: bool = False,
    bidirectional: bool = False,
    chunk_size: int = 64,
    mode: Mode = "auto",
) -> tuple[Tensor, State]:
    """Run the block over a sequence.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        state: before the first sample, from `init_state`, `scan` or `step`; zeros if None.
        integration_timesteps: (..., L), time elapsed before each sample: multiplies delta.
        timestep_mode: whether in decay and input gain (``both``: a gap of zero drops the sample's
            input) or in the decay alone (``state_only``).
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, forget everything, the convolution's tail too, before that sample.
        discretization: ``mamba``, the only one there is.
        dt_scale: multiplies delta.
        dt_limit: delta is held between these two, in every mode and in `step`.
        n_groups: as in `init`.
        norm_before_gate: RMSNorm(y) silu(z) in place of RMSNorm(y silu(z)).
        bidirectional: add the reverse direction, which has its own convolution, recurrence and norm
            between the same projections; both count the current sample.
        chunk_size: samples a chunk of the matrix form; changes speed, not results.
        mode: ``scan`` (chunks of matrix products; ``auto`` is the same) or ``recurrent`` (a loop).

    Returns:
        y (..., L, H) in u's dtype, and the state after the last sample (of the forward direction
        where bidirectional).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state of another model or
            batch, or any with ``bidirectional``.

    Source: Dao & Gu 2024, sections 6 and 7; ``bidirectional`` as for `lrnnx_core.mamba.scan`.
    """
    options = _ssd.options_of(
        "mamba2.scan", discretization, timestep_mode, dt_scale, dt_limit, n_groups,
        norm_before_gate, mode, chunk_size, bidirectional,
    )  # fmt: skip
    sequence = {"lengths": lengths, "mask": mask, "reset": reset}
    return _run(
        "mamba2.scan", params, u, state, options, integration_timesteps=integration_timesteps,
        **sequence,
    )  # fmt: skip


def step(
    params: Params,
    u_t: Tensor,
    state: State,
    *,
    integration_timestep: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Literal["mamba"] | None = None,
    dt_scale: Number = 1.0,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    n_groups: int = 1,
    norm_before_gate: bool = False,
) -> tuple[Tensor, State]:
    """Take one step.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: from `init_state`, `scan` or `step`.
        integration_timestep: (...), time elapsed since the previous sample.
        timestep_mode: see `scan`.
        discretization: ``mamba``, the only one there is.
        dt_scale: multiplies delta.
        dt_limit: see `scan`.
        n_groups: as in `init`.
        norm_before_gate: see `scan`.

    Returns:
        y_t (..., H) in u_t's dtype, and the new state.

    Raises:
        ValueError: as `scan`.
    """
    where, weight = "mamba2.step", params["in_proj.weight"]
    check_input(where, u_t, weight.shape[1], weight, rank=1, shape="(..., H)")
    check_timestep(where, integration_timestep, u_t)
    options = _ssd.options_of(
        where, discretization, timestep_mode, dt_scale, dt_limit, n_groups, norm_before_gate,
        "auto", 64,
    )  # fmt: skip
    parts = _projected.linear(params, "in_proj", u_t)
    y, new = _ssd.step(where, params, parts, state, integration_timestep, options)
    return _projected.linear(params, "out_proj", y).to(u_t.dtype), new


def _run(
    where: str,
    params: Params,
    u: Tensor,
    state: State | None,
    options: _ssd.Options,
    **sequence: Tensor | None,
) -> tuple[Tensor, State]:
    weight = params["in_proj.weight"]
    check_input(where, u, weight.shape[1], weight, rank=2, shape="(..., L, H)")

    def body(x: Tensor, seq: Layout) -> tuple[Tensor, State]:
        parts = _projected.linear(params, "in_proj", x)
        y, new = _ssd.inner(where, params, parts, state, seq, options)
        return _projected.linear(params, "out_proj", y), new

    y, new = _projected.around_padding(u, layout(where, u, **sequence), body)
    return y.to(u.dtype), new
