# SPDX-License-Identifier: MIT
"""LRU: a diagonal complex recurrence parametrised in discrete time, stable by construction.

    x_t = lambda x_{t-1} + gamma (B u_t),    y_t = Re(C x_t) + D u_t,
    lambda = exp(-exp(nu_log) + i exp(theta_log)),    gamma = exp(gamma_log)

Source: Orvieto et al. 2023, arXiv:2303.06349, section 3 and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.models import _mimo, _response
from lrnnx_core.models._common import (
    check_choice,
    check_input,
    check_sizes,
    check_timestep,
    compute_dtype,
    full_precision,
    made_of,
    pair,
    parts_of,
    zero_state,
)
from lrnnx_core.sequences import layout
from lrnnx_core.types import Discrete, Mode, Number, Params

DISCRETIZATIONS = ("none",)


def init(
    d_model: int,
    d_state: int,
    *,
    bidirectional: bool = False,
    r_min: Number = 0.0,
    r_max: Number = 1.0,
    max_phase: Number = 2 * math.pi,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return fresh parameters.

    Args:
        d_model: channels H.
        d_state: number N of complex states, all stored.
        bidirectional: add C2, an independent readout of the reverse direction (our choice; the
            paper says only "similar to S4 and S5").
        r_min: inner radius; the eigenvalues start uniform on r_min <= |lambda| <= r_max.
        r_max: outer radius, at most 1.
        max_phase: largest argument in radians; small values favour long, slow memory.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Returns:
        nu_log, theta_log, gamma_log (N,); B_re, B_im (N, H); C_re, C_im (H, N), with
        ``bidirectional`` C2_re, C2_im too; D (H,).

    Raises:
        ValueError: a size < 1; bounds given as floats outside 0 <= r_min < r_max <= 1, max_phase <=
            0.

    Source: Orvieto et al. 2023, lemma 3.2 and appendix A (reference implementation).
    """
    check_sizes("lru.init", d_model=d_model, d_state=d_state)
    if not (isinstance(r_min, Tensor) or isinstance(r_max, Tensor) or 0 <= r_min < r_max <= 1):
        raise ValueError(
            f"lru.init: r_min = {r_min}, r_max = {r_max}, expected 0 <= r_min < r_max <= 1"
        )
    if not isinstance(max_phase, Tensor) and max_phase <= 0:
        raise ValueError(f"lru.init: max_phase = {max_phase}, expected > 0")
    draw = initialize.Drawer(generator, device, dtype).resolved()
    params: Params = {}
    u1, u2 = draw.uniform(d_state), draw.uniform(d_state)
    params["nu_log"], params["theta_log"], params["gamma_log"] = initialize.lru_ring(
        u1, u2, r_min, r_max, max_phase
    )
    for part in ("B_re", "B_im"):
        params[part] = draw.normal(d_state, d_model) / math.sqrt(2 * d_model)
    for key in ("C", "C2") if bidirectional else ("C",):
        for part in ("_re", "_im"):
            params[key + part] = draw.normal(d_model, d_state) / math.sqrt(d_state)
    params["D"] = draw.normal(d_model)
    return params


def init_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the zero state (*batch_shape, N), complex, with parts of the real ``dtype``."""
    real = compute_dtype(params) if dtype is None else dtype
    like = params["B_re"].to(torch.promote_types(real, torch.complex64))
    return zero_state(like, batch_shape, params["B_re"].shape[:1])


def discretize(
    params: Params,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: Literal["state_only"] = "state_only",
    discretization: Literal["none"] | None = None,
    dt_scale: Number = 1.0,
) -> Discrete:
    """Return (A_bar, B_bar) = (lambda, gamma B): (N,) and (N, H), complex.

    The model is discrete already. Its decay is still a flow, exp(log lambda), and so can be run for
    another time than one sample; its input gain gamma is a learned number and holds no step.

    Args:
        params: from `init`.
        integration_timesteps: (..., L), time elapsed before each sample, in samples; A_bar is then
            lambda^timestep, (..., L, N).
        timestep_mode: ``state_only``, the only one there is.
        discretization: ``none``, the only one there is.
        dt_scale: A_bar = lambda^dt_scale.

    Raises:
        ValueError: another choice.

    Source: Orvieto et al. 2023, section 3; the power of lambda is ours.
    """
    r = _recurrence(
        "lru.discretize", params, compute_dtype(params, integration_timesteps),
        integration_timesteps, timestep_mode, discretization, dt_scale,
    )  # fmt: skip
    return r.A_bar, r.B_bar()


def kernel(
    params: Params,
    length: int,
    *,
    discretization: Literal["none"] | None = None,
    dt_scale: Number = 1.0,
    bidirectional: bool = False,
) -> Tensor:
    """Return the convolution kernel K_t = Re(C lambda^t gamma B), without D.

    Args:
        params: from `init`.
        length: number of samples L, at least 1.
        discretization: see `discretize`.
        dt_scale: see `discretize`.
        bidirectional: return the kernels of both directions.

    Returns:
        K (L, H, H), out by in; with ``bidirectional`` (2, L, H, H).

    Raises:
        ValueError: length < 1, another choice, no C2 in params.
    """
    dtype = compute_dtype(params)
    r = _recurrence("lru.kernel", params, dtype, None, "state_only", discretization, dt_scale)
    return _mimo.kernel("lru.kernel", params, length, r, scale=1.0, bidirectional=bidirectional)


def frequency_response(
    params: Params,
    omega: Tensor,
    *,
    discretization: Literal["none"] | None = None,
    dt_scale: Number = 1.0,
    bidirectional: bool = False,
) -> Tensor:
    """Return the transform D + sum_t Re(C lambda^t gamma B) exp(-i omega t), in closed form.

    Args:
        params: from `init`.
        omega: (...), real, in radians a sample: 2 pi times the frequency over the sampling rate.
            A float64 one computes in float64.
        discretization: see `discretize`.
        dt_scale: see `discretize`.
        bidirectional: add the reverse direction; both count the current sample.

    Returns:
        H (..., H, H), out by in, complex.

    Raises:
        ValueError: an omega that is not real, another choice, no C2 in params.

    Source: the transform of `kernel`, a geometric series for each state.
    """
    where = "lru.frequency_response"

    def recurrence(dtype: torch.dtype) -> _mimo.Recurrence:
        return _recurrence(where, params, dtype, None, "state_only", discretization, dt_scale)

    return _response.mimo(where, params, omega, recurrence, scale=1.0, bidirectional=bidirectional)


def scan(
    params: Params,
    u: Tensor,
    state: Tensor | None = None,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: Literal["state_only"] = "state_only",
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: Literal["none"] | None = None,
    dt_scale: Number = 1.0,
    bidirectional: bool = False,
    mode: Mode = "auto",
    kernel: Tensor | None = None,
    discrete: Discrete | None = None,
    chunk_size: int | None = None,
    max_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the model over a sequence.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        state: (..., N) complex, the state before the first sample; zeros if None.
        integration_timesteps: (..., L), time elapsed before each sample, in samples.
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, clear the state before that sample.
        timestep_mode: see `discretize`.
        discretization: see `discretize`.
        dt_scale: see `discretize`.
        bidirectional: add the reverse direction, read with C2; both count the current sample.
        mode: ``scan``; ``conv`` (FFT, projections included, in the cheapest order: see
            `lrnnx_core.ops.projected_convolution`); ``recurrent`` (a loop, the specification);
            ``auto`` = ``scan``.
        kernel: from `kernel`, to be convolved with instead; as long as L or ``chunk_size``.
        discrete: (A_bar, B_bar) from `discretize`, to be used instead of discretizing.
        chunk_size: samples that a convolution takes at once, the state carried between them; what
            it needs beside input and output does not grow with L then. None: all, or chunks of
            4096 (65536 on a GPU) where L is at least twice that.
        max_bytes: cap on what the contraction of a convolution may allocate, as
            `lrnnx_core.ops.contract.plan` estimates it.

    Returns:
        y (..., L, H) in u's dtype, and the final state (..., N) complex, at least complex64 (of the
        forward direction where bidirectional).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state with
            ``bidirectional``; ``conv``, ``chunk_size`` or ``max_bytes`` with
            timesteps, mask or reset.

    Source: Orvieto et al. 2023, section 3 and appendix A.
    """
    B = params["B_re"]
    check_input("lru.scan", u, B.shape[1], B, rank=2, shape="(..., L, H)")
    seq = layout(
        "lru.scan", u, lengths=lengths, mask=mask, reset=reset,
        integration_timesteps=integration_timesteps,
    )  # fmt: skip

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        if discrete is not None:
            return _mimo.given(discrete, "lru.scan", params, dtype, timesteps)
        return _sequence(
            "lru.scan", params, dtype, timesteps, timestep_mode, discretization, dt_scale
        )

    return _mimo.scan(
        "lru.scan", params, u, state, recurrence, layout=seq, mode=mode, scale=1.0,
        bidirectional=bidirectional, kernel=kernel,
        chunk_size=chunk_size, max_bytes=max_bytes,
    )  # fmt: skip


def step(
    params: Params,
    u_t: Tensor,
    state: Tensor,
    *,
    integration_timestep: Tensor | None = None,
    timestep_mode: Literal["state_only"] = "state_only",
    discretization: Literal["none"] | None = None,
    dt_scale: Number = 1.0,
    discrete: Discrete | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: (..., N) complex.
        integration_timestep: (...), time elapsed since the previous sample, in samples.
        discrete: (A_bar, B_bar) from `discretize`, computed once for many steps.
        timestep_mode: see `discretize`.
        discretization: see `discretize`.
        dt_scale: see `discretize`.

    Returns:
        y_t (..., H) in u_t's dtype and the new state (..., N).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit.
    """
    check_timestep("lru.step", integration_timestep, u_t)

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        if discrete is not None:
            return _mimo.given(discrete, "lru.step", params, dtype, integration_timestep)
        return _sequence(
            "lru.step", params, dtype, integration_timestep, timestep_mode, discretization, dt_scale
        )

    return _mimo.step("lru.step", params, u_t, state, recurrence, scale=1.0)


def _recurrence(
    where: str,
    params: Params,
    dtype: torch.dtype,
    timesteps: Tensor | None,
    timestep_mode: str,
    discretization: str | None,
    dt_scale: Number,
) -> _mimo.Recurrence:
    r = _sequence(where, params, dtype, timesteps, timestep_mode, discretization, dt_scale)
    if isinstance(r, _mimo.Recurrence):
        return r
    return r.discretized()._replace(gamma=None)


def _sequence(
    where: str,
    params: Params,
    dtype: torch.dtype,
    timesteps: Tensor | None,
    timestep_mode: str,
    discretization: str | None,
    dt_scale: Number,
) -> _mimo.Recurrence | _mimo.Flow:
    """Return what a scan runs: under irregular time the flow exp(z tau) with a constant gain."""
    check_choice(where, "discretization", discretization or "none", DISCRETIZATIONS)
    check_choice(where, "timestep_mode", timestep_mode, ("state_only",))
    with full_precision(params["nu_log"].device):

        def rate() -> tuple[Tensor, Tensor]:
            return -params["nu_log"].to(dtype).exp(), params["theta_log"].to(dtype).exp()

        def make() -> tuple[Tensor, Tensor, Tensor]:
            gamma = params["gamma_log"].to(dtype).exp()
            # A product even by 1: the gradient of `torch.complex` alone is a lazy negation under
            # jacrev(jacrev), which vmap cannot map.
            return torch.complex(*rate()) * dt_scale, gamma, pair(params, "B", dtype)

        def decay() -> Tensor:
            if not torch.compiler.is_compiling():
                return torch.exp(z)
            re, im = (x * dt_scale for x in rate())  # real, so that it is fused
            size = re.exp()
            return torch.complex(size * im.cos(), size * im.sin())

        z, gamma, B = made_of(params, ("lru", dtype, dt_scale), make)
        if timesteps is None:
            A_bar = made_of(params, ("lru A_bar", dtype, dt_scale), decay)
            return _mimo.Recurrence(A_bar, gamma, B, lambda: z, parts_of(params, "B", dtype))
        B_bar = made_of(params, ("lru B_bar", dtype), lambda: gamma.unsqueeze(-1) * B)
        return _mimo.Flow(z, None, timesteps.to(dtype), "dirac", "state_only", B_bar)
