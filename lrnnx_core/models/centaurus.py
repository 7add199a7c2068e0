# SPDX-License-Identifier: MIT
"""Centaurus: state channels of several sub-states each, in four connectivities.

    x_t = A_bar x_{t-1} + gamma v_t,    s_t = sum_m E_m Re(x_{t,m})    for each state channel

with A = -softplus(A_raw) + i A_im. How inputs drive state channels (v) and how their signals s make
outputs is the variant: ``neck`` v = B u, y = C s with J channels of M sub-states; ``pointwise`` the
same without E, each sub-state a channel of its own; ``dws`` one state channel an input, y = W s;
``full`` one for each pair of output and input, y = sum of s over inputs. Projections are real, and
there is no direct term D.

Source: Pei 2025, arXiv:2501.13230; aTENNuate (Pei et al. 2024, arXiv:2409.03377) for ``pointwise``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.discretize import EXPONENTIAL, resolve
from lrnnx_core.models import _response, _substates
from lrnnx_core.models._common import (
    check_choice,
    check_input,
    check_sizes,
    check_timestep,
    compute_dtype,
    full_precision,
    scaled,
    zero_state,
)
from lrnnx_core.models._substates import VARIANTS, Connection, Recurrence, Variant, check_variant
from lrnnx_core.ops.discretize_diagonal import discretize_diagonal, joined
from lrnnx_core.sequences import layout
from lrnnx_core.types import Discrete, Discretization, Mode, Number, Params, TimestepMode

DISCRETIZATIONS = ("mamba", "zoh")
SUB_STATES = 8
"""M of ``neck`` and ``pointwise`` if none is given."""


def init(
    d_model: int,
    d_state: int,
    *,
    variant: Variant = "neck",
    sub_state_dim: int | None = None,
    d_out: int | None = None,
    tied_dt: bool = True,
    bidirectional: bool = False,
    dt_min: Number = 1e-3,
    dt_max: Number = 1e-1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return fresh parameters.

    Args:
        d_model: channels H of the input.
        d_state: ``neck``, ``pointwise``: number J of state channels (blocks). ``dws``, ``full``:
            number M of sub-states of each, for there the connectivity says how many state channels
            there are, H and H_out H.
        variant: ``neck``, ``pointwise``, ``dws`` or ``full``.
        sub_state_dim: number M of sub-states of a state channel; 8 if None. For ``dws`` and
            ``full`` it is d_state.
        d_out: channels H_out of the output; H if None.
        tied_dt: one step for all sub-states of a state channel (``full``: of an output); else one
            for each sub-state.
        bidirectional: add the second readout, C2 or E2.
        dt_min: smallest initial step; log dt is an even grid up to log dt_max.
        dt_max: largest initial step.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Returns:
        ``neck``: A_raw, A_im, E (J, M), log_dt (J,), B (J, H), C (H_out, J). ``pointwise``: A_raw,
        A_im (J, M), log_dt (J,), B (J M, H), C (H_out, J M). ``dws``: A_raw, A_im, E (H, M), log_dt
        (H,), W (H_out, H). ``full``: A_raw, A_im, E (H_out, H, M), log_dt (H_out,). An untied
        log_dt has one more axis, M. With ``bidirectional`` C2 as C, or E2 as E.

    Raises:
        ValueError: a size < 1, an unknown variant, a sub_state_dim other than d_state for ``dws``
            or ``full``.

    Source: Pei 2025; the authors' code of aTENNuate for ``pointwise``.
    """
    where = "centaurus.init"
    check_choice(where, "variant", variant, VARIANTS)
    d_out = d_model if d_out is None else d_out
    check_sizes(where, d_model=d_model, d_state=d_state, d_out=d_out)
    channels, size = _state_sizes(d_model, d_state, d_out, variant, sub_state_dim)
    check_sizes(where, sub_state_dim=size)
    draw = initialize.Drawer(generator, device, dtype).resolved()
    shape = (*channels, size)

    def constant(value: float, *shape: int) -> Tensor:
        return draw.tensor(torch.full(shape, value, dtype=torch.float64, device="cpu"))

    m = torch.arange(size, dtype=torch.float64, device="cpu")
    params: Params = {
        "A_raw": constant(math.log(math.expm1(0.5)), *shape),
        "A_im": draw.tensor((math.pi * m).expand(shape).contiguous()),
        "log_dt": _grid(draw, channels[0], 1 if tied_dt else size, dt_min, dt_max, tied_dt),
    }

    def readout() -> Tensor:
        if variant in ("neck", "pointwise"):
            inner = channels[0] if variant == "neck" else channels[0] * size
            return draw.normal(d_out, inner) * math.sqrt(2 / (channels[0] * size))
        return constant((size if variant == "dws" else d_model) ** -0.5, *shape)

    if variant in ("neck", "pointwise"):
        rows = channels[0] * (size if variant == "pointwise" else 1)
        params["B"] = constant(d_model**-0.5, rows, d_model)
    for key in (_substates.READOUT[variant] + s for s in (("", "2") if bidirectional else ("",))):
        params[key] = readout()
    if variant == "neck":
        params["E"] = draw.normal(*shape) * math.sqrt(2)
    if variant == "dws":
        params["W"] = draw.normal(d_out, d_model) / math.sqrt(d_model)
    return params


def _state_sizes(
    d_model: int, d_state: int, d_out: int, variant: Variant, sub_state_dim: int | None
) -> tuple[tuple[int, ...], int]:
    """Return the shape of the state channels, and the sub-states of each."""
    if variant in ("neck", "pointwise"):
        return (d_state,), SUB_STATES if sub_state_dim is None else sub_state_dim
    if sub_state_dim not in (None, d_state):
        raise ValueError(
            f"centaurus.init: sub_state_dim = {sub_state_dim} with variant {variant!r}, where "
            f"d_state = {d_state} is the number of sub-states; expected None or {d_state}"
        )
    return ((d_model,) if variant == "dws" else (d_out, d_model)), d_state


def _grid(
    draw: initialize.Drawer, count: int, states: int, low: Number, high: Number, tied: bool
) -> Tensor:
    """Return log dt on an even grid, (count,), or (count, states) with equal columns."""
    points = torch.arange(count, dtype=torch.float64, device="cpu") / max(count - 1, 1)
    log_dt = initialize.log_dt(draw.tensor(points), low, high)
    return log_dt if tied else log_dt.unsqueeze(-1).repeat(1, states)


def init_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the zero state (*batch_shape, J, M), complex.

    It is (*batch_shape, H, M) for ``dws`` and (*batch_shape, H_out, H, M) for ``full``.

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        dtype: real dtype of its parts; the parameters' (at least float32) if None.
    """
    real = compute_dtype(params) if dtype is None else dtype
    like = params["A_raw"].to(torch.promote_types(real, torch.complex64))
    return zero_state(like, batch_shape, params["A_raw"].shape)


def discretize(
    params: Params,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    dt_scale: Number = 1.0,
    variant: Variant = "neck",
) -> Discrete:
    """Return (A_bar, gamma), both of a state's shape, complex.

    The input map is gamma times the projection: B_bar[j, m] = gamma[j, m] B[j] for ``neck``; gamma
    alone for ``dws`` and ``full``. With ``integration_timesteps`` (..., L) they are (..., L, *that
    shape), gamma staying as it is under ``timestep_mode="state_only"``.

    Args:
        params: from `init`.
        integration_timesteps: time elapsed before each sample, in units of dt.
        timestep_mode: see `lrnnx_core.discretize.discretize`.
        discretization: ``mamba`` (default: gamma = dt, the published rule, called "zoh" there),
            ``zoh`` (a true zero-order hold), or a callable.
        dt_scale: multiplies dt; 2.0 runs the model on a signal sampled at half the rate.
        variant: as in `init`.

    Raises:
        ValueError: an unknown choice, parameters of another variant.

    Source: Pei 2025.
    """
    r = _recurrence(
        "centaurus.discretize", params, compute_dtype(params, integration_timesteps),
        integration_timesteps, timestep_mode, discretization, dt_scale, variant,
    )  # fmt: skip
    return r.A_bar, r.gamma


def kernel(
    params: Params,
    length: int,
    *,
    discretization: Discretization | None = None,
    dt_scale: Number = 1.0,
    variant: Variant = "neck",
    bidirectional: bool = False,
) -> Tensor:
    """Return the convolution kernel from every input to every output, real.

    Args:
        params: from `init`.
        length: number of samples L, at least 1.
        discretization: see `discretize`.
        dt_scale: see `discretize`.
        variant: as in `init`.
        bidirectional: return the kernels of both directions.

    Returns:
        K (L, H_out, H); with ``bidirectional`` (2, L, H_out, H), where the second runs backwards in
        time and counts the current sample too.

    Raises:
        ValueError: length < 1, an unknown choice, parameters of another variant or without the
            second readout.

    Source: Pei 2025, the contraction of basis kernels with the projections.
    """
    where = "centaurus.kernel"
    check_variant(where, params, variant, bidirectional)
    with full_precision(params["log_dt"].device):
        r = _recurrence(
            where, params, compute_dtype(params), None, "both", discretization, dt_scale, variant
        )
        return _substates.kernel(
            where, params, length, r, variant=variant, bidirectional=bidirectional
        )


def frequency_response(
    params: Params,
    omega: Tensor,
    *,
    discretization: Discretization | None = None,
    dt_scale: Number = 1.0,
    variant: Variant = "neck",
    bidirectional: bool = False,
) -> Tensor:
    """Return H = sum_t K_t exp(-i omega t) for the kernel K, in closed form.

    Of a stable model it is the Fourier transform of its impulse response.

    Args:
        params: from `init`.
        omega: (...), real, in radians a sample: 2 pi times the frequency over the sampling rate.
            A float64 one computes in float64.
        discretization: see `discretize`.
        dt_scale: see `discretize`.
        variant: as in `init`.
        bidirectional: add the reverse direction; both count the current sample.

    Returns:
        H (..., H_out, H), complex.

    Raises:
        ValueError: an omega that is not real, an unknown choice, parameters of another variant or
            without the second readout.

    Source: the transform of `kernel`, a geometric series for each sub-state.
    """
    where = "centaurus.frequency_response"
    check_variant(where, params, variant, bidirectional)
    _response.check_omega(where, omega, params)
    with full_precision(omega.device):
        dtype = compute_dtype(params, omega)
        r = _recurrence(where, params, dtype, None, "both", discretization, dt_scale, variant)
        factors = _response.resolvent(omega.to(dtype), r.A_bar, r.z)

        def one(second: bool, at: _response.Resolvent) -> Tensor:
            c = Connection.of(params, variant, dtype, second)
            ahead, back = (c.coefficients(r.gamma * f).sum(-1) for f in at)
            return c.mix(0.5 * (ahead + back.conj()), r.A_bar.shape)

        response = one(False, factors)
        return response + one(True, factors.reversed()) if bidirectional else response


def scan(
    params: Params,
    u: Tensor,
    state: Tensor | None = None,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: Discretization | None = None,
    dt_scale: Number = 1.0,
    variant: Variant = "neck",
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
        state: (..., *S) complex, the state before the first sample, S as `init_state` has it; zeros
            if None.
        integration_timesteps: (..., L), time elapsed before each sample, in units of dt.
        timestep_mode: whether they scale decay and gain (``both``) or the decay (``state_only``).
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, clear the state before that sample.
        discretization: see `discretize`.
        dt_scale: see `discretize`.
        variant: as in `init`.
        bidirectional: add the reverse direction, read with C2 or E2; both count the current sample.
        mode: ``conv``: basis kernels, then projections and FFT in the cheapest order (see
            `lrnnx_core.ops.projected_convolution`); ``scan`` over all sub-states; ``recurrent`` (a
            loop, the specification); ``auto``: ``conv`` where nothing varies in time, a state
            channel has M > 1 sub-states and M L >= 1024, else ``scan``.
        kernel: from `kernel`, to be convolved with instead; as long as L or ``chunk_size``.
        discrete: (A_bar, gamma) from `discretize`, to be used instead of discretizing.
        chunk_size: samples that a convolution takes at once, the state carried between them; what
            it needs beside input and output does not grow with L then. None: all, or chunks of
            4096 (65536 on a GPU) where L is at least twice that.
        max_bytes: cap on what the contraction of a convolution may allocate, as
            `lrnnx_core.ops.contract.plan` estimates it.

    Returns:
        y (..., L, H_out) in u's dtype, and the final state (..., *S) complex, at least complex64
        (of the forward direction where bidirectional).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state with
            ``bidirectional``; ``conv``, ``chunk_size`` or ``max_bytes`` with
            timesteps, mask or reset.

    Source: Pei 2025.
    """
    where = "centaurus.scan"
    check_variant(where, params, variant, bidirectional)
    check_input(
        where, u, _substates.width(params, variant), params["A_raw"], rank=2, shape="(..., L, H)"
    )
    seq = layout(
        where, u, lengths=lengths, mask=mask, reset=reset,
        integration_timesteps=integration_timesteps,
    )  # fmt: skip

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> Recurrence:
        if discrete is not None:
            return _substates.given(discrete, where, params, dtype, timesteps)
        return _recurrence(
            where, params, dtype, timesteps, timestep_mode, discretization, dt_scale, variant
        )

    return _substates.scan(
        where, params, u, state, recurrence, variant=variant, layout=seq, mode=mode,
        bidirectional=bidirectional, kernel=kernel,
        chunk_size=chunk_size, max_bytes=max_bytes,
    )  # fmt: skip


def step(
    params: Params,
    u_t: Tensor,
    state: Tensor,
    *,
    integration_timestep: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    dt_scale: Number = 1.0,
    variant: Variant = "neck",
    discrete: Discrete | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: (..., *S) complex.
        integration_timestep: (...), time elapsed since the previous sample, in units of dt.
        discrete: (A_bar, gamma) from `discretize`, computed once for many steps.
        timestep_mode: see `scan`.
        discretization: see `scan`.
        dt_scale: see `scan`.
        variant: see `scan`.

    Returns:
        y_t (..., H_out) in u_t's dtype and the new state (..., *S).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit.
    """
    where = "centaurus.step"
    check_timestep(where, integration_timestep, u_t)

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> Recurrence:
        if discrete is not None:
            return _substates.given(discrete, where, params, dtype, integration_timestep)
        return _recurrence(
            where, params, dtype, integration_timestep, timestep_mode, discretization, dt_scale,
            variant,
        )  # fmt: skip

    return _substates.step(where, params, u_t, state, recurrence, variant=variant)


def _recurrence(
    where: str,
    params: Params,
    dtype: torch.dtype,
    timesteps: Tensor | None,
    timestep_mode: TimestepMode,
    discretization: Discretization | None,
    dt_scale: Number,
    variant: Variant,
) -> Recurrence:
    check_variant(where, params, variant, False)
    scheme = "mamba" if discretization is None else discretization
    resolve(scheme, timestep_mode, None, DISCRETIZATIONS, where)
    with full_precision(params["log_dt"].device):
        # the threshold of softplus only where it is exact in float64
        decay = torch.nn.functional.softplus(params["A_raw"].to(dtype), threshold=40.0)
        A = -decay, params["A_im"].to(dtype)
        dt = scaled(torch.exp(params["log_dt"].to(dtype)), dt_scale)
        if dt.ndim == 1:
            dt = dt.unsqueeze(-1)
        if variant == "full":  # a step belongs to an output
            dt = dt.unsqueeze(-2)
        A_bar, gamma = discretize_diagonal(
            A, dt, discretization=scheme, timestep_mode=timestep_mode,
            integration_timesteps=None if timesteps is None else timesteps.to(dtype),
        )  # fmt: skip
        known = scheme in EXPONENTIAL and timesteps is None
        return Recurrence(A_bar, gamma, (lambda: dt * joined(A)) if known else None)
