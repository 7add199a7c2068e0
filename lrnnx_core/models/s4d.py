# SPDX-License-Identifier: MIT
"""S4D: one diagonal state space for each channel.

    x_t = A_bar x_{t-1} + B_bar u_t,    y_t = 2 Re(sum_n C_n x_{t,n}) + D u_t

per channel, with N/2 complex states that stand for N in conjugate pairs; with ``is_real`` N real
states and no factor 2.

Source: Gu, Gupta, Goel & Re 2022, arXiv:2206.11893.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.discretize import EXPONENTIAL, resolve
from lrnnx_core.models import _response, _siso
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
from lrnnx_core.models._transforms import (
    RealTransform,
    StepTransform,
    check_transforms,
    raw_real_part,
    raw_step_size,
    real_part,
    step_size,
)
from lrnnx_core.ops.discretize_diagonal import discretize_diagonal, joined
from lrnnx_core.sequences import layout
from lrnnx_core.types import Discrete, Discretization, Mode, Number, Params, TimestepMode

DISCRETIZATIONS = ("zoh", "bilinear", "gbt", "euler", "dirac", "mamba", "async")
A_INITS = ("lin", "inv", "inv2", "quad", "legs", "real", "random")


def init(
    d_model: int,
    d_state: int = 64,
    *,
    A_init: initialize.S4DInit = "lin",
    is_real: bool = False,
    n_ssm: int | None = None,
    channels: int = 1,
    tied_dt: bool = True,
    bidirectional: bool = False,
    dt_min: Number = 1e-3,
    dt_max: Number = 1e-1,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return fresh parameters.

    Args:
        d_model: channels H.
        d_state: real states N a channel; stored are N/2 complex ones, or N real ones if
            ``is_real``.
        A_init: ``lin``, ``inv``, ``inv2``, ``quad``, ``legs``, ``real`` or ``random``; see
            `lrnnx_core.initialize.s4d_spectrum`. Real models take ``real`` (-(n+1)) or ``random``
            (-uniform).
        is_real: a model of real decays; keys A_im, B_im, C_im are absent.
        n_ssm: number S of independent (A, B), S divides H, channel h uses copy h mod S; H if None.
        channels: outputs Ch a channel.
        tied_dt: one step a channel; else one for every state.
        bidirectional: add C2, the readout of the reverse direction.
        dt_min: smallest initial step; log dt is uniform up to log dt_max.
        dt_max: largest initial step.
        dt_transform: how dt comes from log_dt: ``exp``, or ``softplus``.
        A_transform: how Re A comes from A_log: ``exp``, -exp(A_log); ``softplus``,
            -log(1 + exp(A_log)); ``relu``, -max(A_log, 0) - 1e-4; ``clip``, min(A_log, -1e-4);
            ``none``, A_log, which can become unstable. The start is the same under all.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Returns:
        log_dt (H,) or (H, M) untied; A_log, A_im, B_re, B_im (S, M); C_re, C_im (H, M), or
        (Ch, H, M) with channels; with ``bidirectional`` C2_re, C2_im too; D (H,) or (Ch, H). M is
        N/2, or N if ``is_real``. A = -exp(A_log) + i A_im under ``A_transform="exp"``.

    Raises:
        ValueError: a size < 1; an odd N of a complex model; S that does not divide H; an A_init
            that does not exist or is not for real models; an unknown transform.

    Source: Gu et al. 2022, sections 3 (parametrisation) and 4 (initialisation of A).
    """
    check_sizes("s4d.init", d_model=d_model, d_state=d_state, channels=channels)
    copies = d_model if n_ssm is None else n_ssm
    check_sizes("s4d.init", n_ssm=copies)
    check_transforms("s4d.init", dt_transform, A_transform)
    check_choice("s4d.init", "A_init", A_init, ("real", "random") if is_real else A_INITS)
    if not is_real and d_state % 2:
        raise ValueError(
            f"s4d.init: d_state = {d_state} is odd; conjugate pairs need an even one "
            "(or is_real=True)"
        )
    if d_model % copies:
        raise ValueError(f"s4d.init: n_ssm = {copies} does not divide d_model = {d_model}")
    draw = initialize.Drawer(generator, device, dtype).resolved()
    size = d_state if is_real else d_state // 2
    params: Params = {}
    steps = draw.uniform(d_model) if tied_dt else draw.uniform(d_model, size)
    params["log_dt"] = raw_step_size(initialize.log_dt(steps, dt_min, dt_max), dt_transform)
    if is_real and A_init == "random":
        decay, im = draw.uniform(copies, size), None
    else:
        decay, im = initialize.s4d_spectrum(A_init, size, copies, draw)
    params["A_log"] = raw_real_part(decay, A_transform)
    if not is_real and im is not None:
        params["A_im"] = im
    params["B_re"] = torch.ones_like(params["A_log"])
    if not is_real:
        params["B_im"] = torch.zeros_like(params["A_log"])
        if A_init == "legs":
            B = initialize.normal_form("legs", d_state).B
            params["B_re"] = draw.tensor(B.real).repeat(copies, 1)
            params["B_im"] = draw.tensor(B.imag).repeat(copies, 1)
    lead = (d_model,) if channels == 1 else (channels, d_model)
    for key in ("C", "C2") if bidirectional else ("C",):
        parts = ("_re",) if is_real else ("_re", "_im")
        for part in parts:
            params[key + part] = draw.normal(*lead, size) * len(parts) ** -0.5
    params["D"] = draw.normal(*lead)
    return params


def init_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the zero state (*batch_shape, H, M), complex (real for a real model).

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        dtype: real dtype of its parts; the parameters' (at least float32) if None.
    """
    real = torch.promote_types(compute_dtype(params) if dtype is None else dtype, torch.float32)
    like = params["B_re"].to(real if "A_im" not in params else _siso.complex_of(real))
    return zero_state(like, batch_shape, _siso.state_shape(params))


def discretize(
    params: Params,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
) -> Discrete:
    """Return (A_bar, B_bar), each (H, M), complex (real for a real model).

    Args:
        params: from `init`.
        integration_timesteps: (..., L), time elapsed before each sample, in units of dt; the
            results are then (..., L, H, M), B_bar staying (H, M) under
            ``timestep_mode="state_only"``.
        timestep_mode: see `lrnnx_core.discretize.discretize`.
        discretization: ``zoh`` (default), ``bilinear``, ``gbt``, ``euler``, ``dirac``, ``mamba``,
            ``async``, or a callable.
        alpha: the number of ``gbt``.
        dt_scale: multiplies dt; 2.0 runs the model on a signal sampled at half the rate.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.

    Raises:
        ValueError: an unknown choice.

    Source: Gu et al. 2022 (zero-order hold and bilinear transform).
    """
    r = _recurrence(
        "s4d.discretize", params, compute_dtype(params, integration_timesteps),
        integration_timesteps, timestep_mode, discretization, alpha, dt_scale, dt_transform,
        A_transform,
    )  # fmt: skip
    return r.A_bar, r.B_bar


def kernel(
    params: Params,
    length: int,
    *,
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    bidirectional: bool = False,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
    bandlimit: float | None = None,
) -> Tensor:
    """Return the convolution kernel K_t = 2 Re(sum_n C_n A_bar_n^t B_bar_n), without D.

    Args:
        params: from `init`.
        length: number of samples L, at least 1.
        discretization: see `discretize`.
        alpha: see `discretize`.
        dt_scale: see `discretize`.
        bidirectional: return the kernels of both directions.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.
        bandlimit: leave out states of bandlimit / 2 or more cycles a sample, dt |Im A| / (2 pi) at
            the rate trained at; 1.0 is the Nyquist limit, None leaves out none.

    Returns:
        K (L, H), or (Ch, L, H) with channels, real; with ``bidirectional`` (2, ..., L, H), where
        the second runs backwards in time and starts at the next sample.

    Raises:
        ValueError: length < 1, an unknown choice, no C2 in params.

    Source: Gu et al. 2022, section 3 (the kernel as a Vandermonde product).
    """
    r = _recurrence(
        "s4d.kernel", params, compute_dtype(params), None, "both", discretization, alpha, dt_scale,
        dt_transform, A_transform,
    )  # fmt: skip
    params = _limited("s4d.kernel", params, bandlimit, dt_transform)
    return _siso.kernel("s4d.kernel", params, length, r, bidirectional=bidirectional)


def frequency_response(
    params: Params,
    omega: Tensor,
    *,
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    bidirectional: bool = False,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
    bandlimit: float | None = None,
) -> Tensor:
    """Return H = D + sum_n C_n B_bar_n / (1 - A_bar_n exp(-i omega)) over N states, in closed form.

    Of a stable model it is the Fourier transform of its impulse response.

    Args:
        params: from `init`.
        omega: (...), real, in radians a sample: 2 pi times the frequency over the sampling rate.
            A float64 one computes in float64.
        discretization: see `discretize`.
        alpha: see `discretize`.
        dt_scale: see `discretize`.
        bidirectional: add the reverse direction, which starts at the next sample.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.
        bandlimit: see `kernel`.

    Returns:
        H (..., H), or (Ch, ..., H) with channels, complex.

    Raises:
        ValueError: an omega that is not real, an unknown choice, no C2 in params.

    Source: the transform of `kernel`, a geometric series for each state.
    """
    where = "s4d.frequency_response"
    params = _limited(where, params, bandlimit, dt_transform)

    def recurrence(dtype: torch.dtype) -> _siso.Recurrence:
        return _recurrence(
            where, params, dtype, None, "both", discretization, alpha, dt_scale, dt_transform,
            A_transform,
        )  # fmt: skip

    return _response.siso(where, params, omega, recurrence, bidirectional=bidirectional)


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
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    bidirectional: bool = False,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
    bandlimit: float | None = None,
    mode: Mode = "auto",
    kernel: Tensor | None = None,
    discrete: Discrete | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the model over a sequence.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        state: (..., H, M), the state before the first sample; zeros if None.
        integration_timesteps: (..., L), time elapsed before each sample, in units of dt.
        timestep_mode: whether they scale decay and gain (``both``) or the decay (``state_only``).
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, clear the state before that sample.
        discretization: see `discretize`.
        alpha: see `discretize`.
        dt_scale: see `discretize`.
        bidirectional: add the reverse direction, read with C2; it starts at the next sample.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.
        bandlimit: see `kernel`.
        mode: ``conv`` (kernel and FFT, nothing of size L N H); ``scan``; ``recurrent`` (a loop, the
            specification); ``auto``: ``scan`` where something varies in time, else the faster
            one by length, states and device.
        kernel: from `kernel`, for ``conv``; at least as long as L or, if smaller, ``chunk_size``.
        discrete: (A_bar, B_bar) from `discretize`, to be used instead of discretizing.
        chunk_size: samples that a convolution takes at once, the state carried between them; what
            it needs beside input and output does not grow with L then. None: all, or chunks of
            4096 (65536 on a GPU) where L is at least twice that.

    Returns:
        y (..., L, H) in u's dtype, (..., L, Ch H) with channels (channel-major), and the final
        state (..., H, M), at least float32 (of the forward direction where bidirectional).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state with
            ``bidirectional``; ``conv`` or ``chunk_size`` with timesteps, mask or reset.

    Source: Gu et al. 2022, section 2; Goel et al. 2022, arXiv:2202.09729 (bidirectional).
    """
    D = params["D"]
    check_input("s4d.scan", u, D.shape[-1], D, rank=2, shape="(..., L, H)")
    seq = layout(
        "s4d.scan", u, lengths=lengths, mask=mask, reset=reset,
        integration_timesteps=integration_timesteps,
    )  # fmt: skip

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _siso.Recurrence:
        if discrete is not None:
            return _siso.given(discrete, "s4d.scan", params, dtype, timesteps)
        return _recurrence(
            "s4d.scan", params, dtype, timesteps, timestep_mode, discretization, alpha, dt_scale,
            dt_transform, A_transform,
        )  # fmt: skip

    return _siso.scan(
        "s4d.scan", _limited("s4d.scan", params, bandlimit, dt_transform), u, state, recurrence,
        layout=seq, mode=mode, bidirectional=bidirectional, kernel=kernel, chunk_size=chunk_size,
    )  # fmt: skip


def step(
    params: Params,
    u_t: Tensor,
    state: Tensor,
    *,
    integration_timestep: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
    bandlimit: float | None = None,
    discrete: Discrete | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: (..., H, M).
        integration_timestep: (...), time elapsed since the previous sample, in units of dt.
        discrete: (A_bar, B_bar) from `discretize`, computed once for many steps.
        timestep_mode: see `scan`.
        discretization: see `scan`.
        alpha: see `scan`.
        dt_scale: see `scan`.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.
        bandlimit: see `kernel`.

    Returns:
        y_t (..., H) in u_t's dtype, (..., Ch H) with channels, and the new state (..., H, M).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit.
    """
    check_timestep("s4d.step", integration_timestep, u_t)

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _siso.Recurrence:
        if discrete is not None:
            return _siso.given(discrete, "s4d.step", params, dtype, integration_timestep)
        return _recurrence(
            "s4d.step", params, dtype, integration_timestep, timestep_mode, discretization, alpha,
            dt_scale, dt_transform, A_transform,
        )  # fmt: skip

    params = _limited("s4d.step", params, bandlimit, dt_transform)
    return _siso.step("s4d.step", params, u_t, state, recurrence)


def _limited(
    where: str, params: Params, bandlimit: float | None, dt_transform: StepTransform
) -> Params:
    """Return the parameters with C zero where a state oscillates beyond the band."""
    if bandlimit is None:
        return params
    if not bandlimit > 0:
        raise ValueError(f"{where}: bandlimit = {bandlimit}, expected a number > 0")
    if "A_im" not in params:
        raise ValueError(f"{where}: bandlimit is for complex models; a real one never oscillates")
    check_transforms(where, dt_transform, "exp")
    C = params["C_re"]
    dt = step_size(params["log_dt"].to(compute_dtype(params)), dt_transform)
    dt = dt.unsqueeze(-1) if dt.ndim == 1 else dt
    tiles = C.shape[-2] // params["A_im"].shape[0]
    cycles = dt * params["A_im"].abs().repeat(tiles, 1) / (2 * math.pi)
    inside = cycles < bandlimit / 2
    read = [k for k in params if k.startswith("C")]
    return params | {k: torch.where(inside, params[k], 0) for k in read}


def _recurrence(
    where: str,
    params: Params,
    dtype: torch.dtype,
    timesteps: Tensor | None,
    timestep_mode: TimestepMode,
    discretization: Discretization | None,
    alpha: Number | None,
    dt_scale: Number,
    dt_transform: StepTransform,
    A_transform: RealTransform,
) -> _siso.Recurrence:
    scheme = "zoh" if discretization is None else discretization
    resolve(scheme, timestep_mode, alpha, DISCRETIZATIONS, where)
    check_transforms(where, dt_transform, A_transform)
    with full_precision(params["log_dt"].device):
        re, im = real_part(params["A_log"].to(dtype), A_transform), params.get("A_im")
        A, B = (re, None), (params["B_re"].to(dtype), None)
        if im is not None:
            A, B = (re, im.to(dtype)), (B[0], params["B_im"].to(dtype))
        dt = scaled(step_size(params["log_dt"].to(dtype), dt_transform), dt_scale)
        dt = dt.unsqueeze(-1) if dt.ndim == 1 else dt
        copies = re.shape[0]
        tiled = copies != dt.shape[0]
        if tiled:  # channel h uses copy h mod S
            dt = dt.unflatten(0, (-1, copies))
        A_bar, B_bar = discretize_diagonal(
            A, dt, B, discretization=scheme, timestep_mode=timestep_mode, alpha=alpha,
            integration_timesteps=None if timesteps is None else timesteps.to(dtype),
        )  # fmt: skip
        if tiled:
            A_bar, B_bar = (t.flatten(-3, -2) for t in (A_bar, B_bar))

        def exponent() -> Tensor:
            z = dt * joined(A)
            return z.flatten(0, 1) if tiled else z

        known = scheme in EXPONENTIAL and timesteps is None
        return _siso.Recurrence(A_bar, B_bar, exponent if known else None)
