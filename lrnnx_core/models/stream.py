# SPDX-License-Identifier: MIT
"""STREAM: Mamba for event streams, whose memory fades with elapsed time and not with the input.

The block is Mamba's; the step of the decay is a learned constant of each channel times the time
since the last event, while the step of the input stays Mamba's:

    A_bar_t = exp(A tau_t softplus(dtA_bias)),    gamma_t = delta_t = softplus(dt_proj(r_t))

So events that come at the same time (tau = 0) all count, and silence fades what came before it.
With tau = 1 it is not Mamba: the decay has its own step.

Source: Schoene et al. 2024, arXiv:2411.12603, as the published lrnnx library realises it. The
authors' own code could not be read, so which discrete gain it uses is not confirmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.models import _projected, _selective, mamba
from lrnnx_core.models._common import check_choice
from lrnnx_core.models._selective import DISCRETIZATIONS, MODES, InnerNorm, State
from lrnnx_core.types import Discrete, Discretization, Mode, Number, Params

__all__ = ["DISCRETIZATIONS", "MODES", "State", "discretize", "init", "init_state", "scan", "step"]


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
    """Return fresh parameters: those of `lrnnx_core.mamba.init` and dtA_bias (E,).

    dtA_bias starts by the same rule as dt_proj.bias, drawn independently.

    Args:
        d_model: channels H.
        d_state: states N a channel of the inner width E = expand H.
        d_conv: width K of the convolution.
        expand: E / H.
        dt_rank: rank R of the step's projection; ceil(H / 16) if None.
        dt_init: see `lrnnx_core.mamba.init`.
        dt_init_scale: see `lrnnx_core.mamba.init`.
        dt_min: smallest initial step of decay and input; its logarithm is uniform up to log dt_max.
        dt_max: largest initial step.
        dt_floor: no initial step is smaller.
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out_proj have one.
        inner_norm: see `lrnnx_core.mamba.init`.
        bidirectional: see `lrnnx_core.mamba.init`; dtA_bias is among what is there twice.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Raises:
        ValueError: a size < 1, or an unknown choice.

    Source: Schoene et al. 2024; for what Mamba has too, Gu & Dao 2023, section 3.6.
    """
    rank = mamba.rank_of(
        "stream.init", d_model, d_state, d_conv, expand, dt_rank, dt_init, inner_norm
    )
    params = mamba.init(
        d_model, d_state, d_conv=d_conv, expand=expand, dt_rank=rank, dt_init=dt_init,
        dt_init_scale=dt_init_scale, dt_min=dt_min, dt_max=dt_max, dt_floor=dt_floor,
        conv_bias=conv_bias, bias=bias, inner_norm=inner_norm,
        bidirectional=bidirectional, generator=generator, device=device, dtype=dtype,
    )  # fmt: skip
    draw = initialize.Drawer(generator, device, dtype).resolved()
    for prefix in ("", _projected.REVERSE)[: 1 + bidirectional]:
        bias_A = _projected.dt_bias(draw, expand * d_model, dt_min, dt_max, dt_floor)
        params[prefix + "dtA_bias"] = bias_A
    return params


def init_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> State:
    """Return the zero state: conv (*batch_shape, K - 1, E) and h (*batch_shape, E, N).

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        dtype: of the activations, and so of conv; h is at least float32.
    """
    return mamba.init_state(params, batch_shape, dtype=dtype)


def discretize(
    params: Params,
    v: Tensor,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: Literal["state_only"] = "state_only",
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    inner_norm: InnerNorm = "none",
) -> Discrete:
    """Return (A_bar, B_bar), each (..., L, E, N), for the input v (..., L, E) of the recurrence.

    Args:
        params: from `init`.
        v: (..., L, E), what the convolution gives.
        integration_timesteps: (..., L), time elapsed before each event; 1 if None.
        timestep_mode: ``state_only``, the only one there is.
        discretization: see `lrnnx_core.mamba.discretize`.
        alpha: the number of ``gbt``.
        dt_scale: multiplies both steps.
        inner_norm: as in `init`.

    Raises:
        ValueError: an unknown choice; params without dtA_bias.
    """
    _check_params("stream.discretize", params)
    check_choice("stream.discretize", "timestep_mode", timestep_mode, ("state_only",))
    scheme = mamba.scheme_of("stream.discretize", discretization, timestep_mode, alpha)
    raw, B, _ = _selective.steps_and_matrices(params, v, inner_norm)
    drive = torch.nn.functional.softplus(raw + params["dt_proj.bias"]) * dt_scale
    decay = torch.nn.functional.softplus(params["dtA_bias"]) * dt_scale
    if integration_timesteps is None:
        decay = decay.expand_as(drive)
    else:
        decay = integration_timesteps.unsqueeze(-1) * decay
    A_bar, gamma = scheme(-torch.exp(params["A_log"]), decay.unsqueeze(-1), drive.unsqueeze(-1))
    return A_bar, gamma * B.unsqueeze(-2)


def scan(
    params: Params,
    u: Tensor,
    state: State | None = None,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: Literal["state_only"] = "state_only",
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
    """Run the block over a sequence of events.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        state: before the first event; zeros if None.
        integration_timesteps: (..., L), time elapsed before each event; 1 if None.
        timestep_mode: ``state_only``, the only one there is.
        lengths: (...), events per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, forget everything before that event.
        discretization: see `lrnnx_core.mamba.discretize`.
        alpha: the number of ``gbt``.
        dt_scale: multiplies both steps.
        inner_norm: as in `init`.
        bidirectional: see `lrnnx_core.mamba.scan`.
        mode: ``scan`` (``auto`` is the same) or ``recurrent`` (a loop, the specification).

    Returns:
        y (..., L, H) in u's dtype, and the state after the last event (of the forward direction
        where bidirectional).

    Raises:
        ValueError: as `lrnnx_core.mamba.scan`; params without dtA_bias.

    Source: Schoene et al. 2024, arXiv:2411.12603.
    """
    options = _options(
        "stream.scan", params, discretization, timestep_mode, alpha, dt_scale, inner_norm, mode,
        bidirectional,
    )  # fmt: skip
    sequence = {"lengths": lengths, "mask": mask, "reset": reset}
    return mamba.run(
        "stream.scan", params, u, state, options, integration_timesteps=integration_timesteps,
        **sequence,
    )  # fmt: skip


def step(
    params: Params,
    u_t: Tensor,
    state: State,
    *,
    integration_timestep: Tensor | None = None,
    timestep_mode: Literal["state_only"] = "state_only",
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
        integration_timestep: (...), time elapsed since the previous event; 1 if None.
        timestep_mode: ``state_only``, the only one there is.
        discretization: see `lrnnx_core.mamba.discretize`.
        alpha: the number of ``gbt``.
        dt_scale: multiplies both steps.
        inner_norm: as in `init`.

    Returns:
        y_t (..., H) in u_t's dtype, and the new state.

    Raises:
        ValueError: as `scan`.
    """
    options = _options(
        "stream.step", params, discretization, timestep_mode, alpha, dt_scale, inner_norm, "auto"
    )
    return mamba.run_step("stream.step", params, u_t, state, integration_timestep, options)


def _options(
    where: str,
    params: Params,
    discretization: Discretization | None,
    timestep_mode: Literal["state_only"],
    alpha: Number | None,
    dt_scale: Number,
    inner_norm: InnerNorm,
    mode: Mode,
    bidirectional: bool = False,
) -> _selective.Options:
    """Check parameters and choices of a call and bundle the choices."""
    check_choice(where, "timestep_mode", timestep_mode, ("state_only",))
    _check_params(where, params)
    return mamba.options_of(
        where, discretization, timestep_mode, alpha, dt_scale, inner_norm, mode, bidirectional
    )


def _check_params(where: str, params: Params) -> None:
    if "dtA_bias" not in params:
        raise ValueError(f"{where}: params have no dtA_bias; make them with stream.init")
