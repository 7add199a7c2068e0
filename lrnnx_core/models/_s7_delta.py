# SPDX-License-Identifier: MIT
"""S7 with fixed matrices and a step that comes from the input: `s7` with ``variant="delta"``.

    Delta_t = softplus(step_proj(u_t)),   (A_bar_t, gamma_t) = discretize(Lambda, Delta_t)
    x_t = A_bar_t x_{t-1} + gamma_t B u_t,   y_t = s Re(C x_t) + D u_t

It is S5 but for the step, so S5's initialisation and `_mimo` serve it too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.discretize import resolve
from lrnnx_core.models import _mimo, s5
from lrnnx_core.models._common import (
    check_keys,
    full_precision,
    made_of,
    pair,
    parts_of,
    scaled,
)
from lrnnx_core.models._projected import softplus_inverse
from lrnnx_core.ops.steps import linear_step
from lrnnx_core.types import Discretization, Number, Params, TimestepMode


class Options(NamedTuple):
    """The choices and numbers of a call."""

    discretization: Discretization
    timestep_mode: TimestepMode
    alpha: Number | None
    dt_scale: Number
    clip_eigs: bool


def init(
    d_model: int,
    d_state: int,
    *,
    blocks: int,
    conj_sym: bool,
    bidirectional: bool,
    stable_reparam: bool,
    C_init: s5.CInit,
    dt_init_scale: Number,
    dt_min: Number,
    dt_max: Number,
    draw: initialize.Drawer,
) -> Params:
    """Return fresh parameters; see `lrnnx_core.models.s7.init`."""
    params = s5.init(
        d_model, d_state, blocks=blocks, conj_sym=conj_sym, bidirectional=bidirectional,
        C_init=C_init, dt_min=dt_min, dt_max=dt_max, generator=draw.generator, device=draw.device,
        dtype=draw.dtype,
    )  # fmt: skip
    steps = torch.exp(params.pop("log_dt"))
    bound = math.ceil(d_model / 16) ** -0.5
    sign = 2 * draw.uniform(steps.shape[0], d_model) - 1
    if stable_reparam:
        params = {"Lambda_w": torch.sqrt(-1 / params.pop("Lambda_re") - 0.5), **params}
    params["step_proj.weight"] = sign * bound * dt_init_scale
    params["step_proj.bias"] = softplus_inverse(steps)
    return params


def eigenvalues(params: Params, dtype: torch.dtype, clip_eigs: bool) -> Tensor:
    """Return Lambda (P_h,), complex; Re Lambda = -1/(w^2 + 1/2) where Lambda_w is stored."""
    if "Lambda_w" in params:
        re = -1 / (params["Lambda_w"].to(dtype).square() + 0.5)
    else:
        re = params["Lambda_re"].to(dtype)
    re = re.clamp(max=s5.MAX_REAL) if clip_eigs else re
    return torch.complex(re, params["Lambda_im"].to(dtype))


def check(where: str, params: Params, options: Options) -> None:
    """Raise unless the parameters are of this variant and the choices exist."""
    check_keys(
        where, params, ("step_proj.weight", "step_proj.bias"),
        "variant='delta' has them; were these made with variant='full'?",
    )  # fmt: skip
    resolve(options.discretization, options.timestep_mode, options.alpha, s5.DISCRETIZATIONS, where)


def recurrence(
    where: str,
    params: Params,
    u: Tensor,
    dtype: torch.dtype,
    timesteps: Tensor | None,
    options: Options,
) -> _mimo.Recurrence:
    """Discretize with the steps of u (..., L, H), or of one sample (..., H)."""
    r = sequence(where, params, u, dtype, timesteps, options)
    return r if isinstance(r, _mimo.Recurrence) else r.discretized()


def sequence(
    where: str,
    params: Params,
    u: Tensor,
    dtype: torch.dtype,
    timesteps: Tensor | None,
    options: Options,
) -> _mimo.Recurrence | _mimo.Flow:
    """Return what a scan of u runs: if it can, without forming A_bar and gamma."""
    scheme, timestep_mode = resolve(
        options.discretization, options.timestep_mode, options.alpha, s5.DISCRETIZATIONS, where
    )
    with full_precision(u.device):
        weight, bias = (params["step_proj." + k].to(dtype) for k in ("weight", "bias"))
        raw = linear_step(u.to(dtype), weight, bias)
        dt = torch.nn.functional.softplus(raw)
        dt = scaled(dt, options.dt_scale)

        def make() -> tuple[Tensor, Tensor]:
            return eigenvalues(params, dtype, options.clip_eigs), pair(params, "B", dtype)

        Lambda, B = made_of(params, ("s7", dtype, options.clip_eigs), make)
        timesteps = None if timesteps is None else timesteps.to(dtype)
        flow = _mimo.Flow.of(
            Lambda, dt, timesteps, options.discretization, options.timestep_mode, B,
            parts_of(params, "B", dtype),
        )  # fmt: skip
        if flow is not None:
            return flow
        decay = dt if timesteps is None else timesteps.unsqueeze(-1) * dt
        A_bar, gamma = scheme(Lambda, decay, dt if timestep_mode == "state_only" else decay)
        return _mimo.Recurrence(A_bar, gamma, B)
