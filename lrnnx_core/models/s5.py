# SPDX-License-Identifier: MIT
"""S5: one multi-input multi-output diagonal state space for all channels.

    x_t = A_bar x_{t-1} + B_bar u_t,    y_t = s Re(C x_t) + D u_t

with s = 2 where one eigenvalue of each conjugate pair is stored (``conj_sym``), else 1.

Source: Smith, Warrington & Linderman 2023, arXiv:2208.04933, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.discretize import EXPONENTIAL, resolve
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
    scaled,
    zero_state,
)
from lrnnx_core.ops.discretize_diagonal import discretize_diagonal
from lrnnx_core.sequences import layout
from lrnnx_core.types import Discrete, Discretization, Mode, Number, Params, TimestepMode

CInit = Literal["trunc_standard_normal", "lecun_normal", "complex_normal"]
DISCRETIZATIONS = ("zoh", "bilinear", "gbt", "euler", "dirac", "mamba", "async")
C_INITS = get_args(CInit)
MAX_REAL = -1e-4
"""Where `clip_eigs` holds the real part of the eigenvalues."""


def init(
    d_model: int,
    d_state: int,
    *,
    blocks: int = 1,
    conj_sym: bool = True,
    bidirectional: bool = False,
    dense_D: bool = False,
    Lambda_init: Literal["hippo", "lin"] = "hippo",
    C_init: CInit = "trunc_standard_normal",
    dt_min: Number = 1e-3,
    dt_max: Number = 1e-1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return fresh parameters.

    Args:
        d_model: channels H.
        d_state: full state size P; stored are P_h = P/2 with ``conj_sym``, else P.
        blocks: J, the state matrix starts as J copies of HiPPO-LegS of size P/J.
        conj_sym: store one eigenvalue of each conjugate pair.
        bidirectional: add C2, the readout of the reverse direction.
        dense_D: D is a matrix, outputs by inputs, and no diagonal.
        Lambda_init: ``hippo``, or ``lin`` (-1/2 + i pi n, B = 1/sqrt(H), dt on a geometric grid).
        C_init: ``trunc_standard_normal`` (deviation 1/sqrt(P)), ``lecun_normal`` (1/sqrt(P H)),
            both rotated by the eigenvectors, or ``complex_normal`` (sqrt(1/2), drawn as stored).
        dt_min: smallest initial step; log dt is uniform up to log dt_max.
        dt_max: largest initial step.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Returns:
        Lambda_re, Lambda_im, log_dt (P_h,); B_re, B_im (P_h, H); C_re, C_im (H, P_h), with
        ``bidirectional`` C2_re, C2_im too; D (H,), or (H, H) with ``dense_D``.

    Raises:
        ValueError: a size < 1; P not divisible by J; P/J odd with ``conj_sym``; an unknown choice.

    Source: Smith et al. 2023, section 3 and its appendix on initialisation; the authors' code.
    """
    check_sizes("s5.init", d_model=d_model, d_state=d_state, blocks=blocks)
    check_choice("s5.init", "Lambda_init", Lambda_init, ("hippo", "lin"))
    check_choice("s5.init", "C_init", C_init, C_INITS)
    check_blocks("s5.init", d_state, blocks, conj_sym)
    draw = initialize.Drawer(generator, device, dtype).resolved()
    return parameters(
        draw, d_model, d_model, d_state, blocks=blocks, conj_sym=conj_sym,
        bidirectional=bidirectional, Lambda_init=Lambda_init, C_init=C_init, dt_min=dt_min,
        dt_max=dt_max, dense_D=dense_D,
    )  # fmt: skip


def parameters(
    draw: initialize.Drawer,
    d_model: int,
    d_out: int,
    d_state: int,
    *,
    blocks: int,
    conj_sym: bool,
    bidirectional: bool,
    Lambda_init: Literal["hippo", "lin"],
    C_init: CInit,
    dt_min: Number,
    dt_max: Number,
    dense_D: bool = False,
) -> Params:
    """Draw the parameters of a model with d_out outputs; choices are those of `init`, checked.

    D is (H,) where d_out = H, or else, and with dense_D, a matrix (d_out, H), Glorot normal.
    """
    stored = d_state // 2 if conj_sym else d_state
    params: Params = {}
    if Lambda_init == "hippo":
        form = initialize.normal_form("legs", d_state // blocks, conj_sym=conj_sym)
        V = torch.block_diag(*[form.V] * blocks)
        Lambda = form.Lambda.repeat(blocks)
        params["Lambda_re"], params["Lambda_im"] = (
            draw.tensor(Lambda.real),
            draw.tensor(Lambda.imag),
        )
        params["log_dt"] = initialize.log_dt(draw.uniform(stored), dt_min, dt_max)
        B = draw.lecun(d_state, d_model, fan_in=d_state)
        V_re, V_im = draw.tensor(V.real), draw.tensor(V.imag)
        params["B_re"], params["B_im"] = V_re.mT @ B, -(V_im.mT @ B)
    else:
        V_re = V_im = None
        n = torch.arange(stored, dtype=torch.float64, device="cpu")
        params["Lambda_re"] = draw.tensor(torch.full_like(n, -0.5))
        params["Lambda_im"] = draw.tensor(math.pi * n)
        params["log_dt"] = initialize.log_dt(draw.tensor(n / max(stored - 1, 1)), dt_min, dt_max)
        params["B_re"] = draw.tensor(torch.full((stored, d_model), d_model**-0.5, device="cpu"))
        params["B_im"] = torch.zeros_like(params["B_re"])
    for key in ("C", "C2") if bidirectional else ("C",):
        if C_init == "complex_normal" or V_re is None or V_im is None:
            std = 0.5**0.5 if C_init == "complex_normal" else d_state**-0.5
            re, im = (std * draw.normal(d_out, stored) for _ in range(2))
        else:
            fan_in = d_state * (1 if C_init == "trunc_standard_normal" else d_out)
            re0, im0 = (draw.lecun(d_out, d_state, fan_in=fan_in) for _ in range(2))
            re, im = re0 @ V_re - im0 @ V_im, re0 @ V_im + im0 @ V_re
        params[key + "_re"], params[key + "_im"] = re, im
    if d_out == d_model and not dense_D:
        params["D"] = draw.normal(d_model)
    else:
        params["D"] = draw.lecun(d_out, d_model, fan_in=1) * (2 / (d_model + d_out)) ** 0.5
    return params


def check_blocks(where: str, d_state: int, blocks: int, conj_sym: bool) -> None:
    """Raise unless d_state divides into blocks, of even size where one of each pair is stored."""
    if d_state % blocks or (conj_sym and (d_state // blocks) % 2):
        raise ValueError(
            f"{where}: d_state = {d_state} with blocks = {blocks}, conj_sym = {conj_sym}; expected "
            "d_state divisible by blocks" + (" into an even block size" if conj_sym else "")
        )


def init_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the zero state (*batch_shape, P_h), complex.

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        dtype: real dtype of its parts; the parameters' (at least float32) if None.
    """
    real = compute_dtype(params) if dtype is None else dtype
    like = params["B_re"].to(torch.promote_types(real, torch.complex64))
    return zero_state(like, batch_shape, params["B_re"].shape[:1])


def discretize(
    params: Params,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    clip_eigs: bool = False,
) -> Discrete:
    """Return (A_bar, B_bar): (P_h,) and (P_h, H), complex.

    With ``integration_timesteps`` (..., L) they are (..., L, P_h) and (..., L, P_h, H), B_bar
    staying (P_h, H) under ``timestep_mode="state_only"``. `scan` never forms that B_bar.

    Args:
        params: from `init`.
        integration_timesteps: time elapsed before each sample, in units of dt.
        timestep_mode: see `lrnnx_core.discretize.discretize`.
        discretization: ``zoh`` (default), ``bilinear``, ``gbt``, ``euler``, ``dirac``, ``mamba``,
            ``async``, or a callable.
        alpha: the number of ``gbt``.
        dt_scale: multiplies dt; 2.0 runs the model on a signal sampled at half the rate.
        clip_eigs: hold Re Lambda at most -1e-4, so that the model stays stable in training.

    Raises:
        ValueError: an unknown choice.

    Source: Smith et al. 2023 (zero-order hold is its discretization).
    """
    r = discretized(
        "s5.discretize", params, compute_dtype(params, integration_timesteps),
        integration_timesteps, timestep_mode, discretization, alpha, dt_scale, clip_eigs,
    )  # fmt: skip
    return r.A_bar, r.B_bar()


def kernel(
    params: Params,
    length: int,
    *,
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    conj_sym: bool = True,
    clip_eigs: bool = False,
    bidirectional: bool = False,
) -> Tensor:
    """Return the convolution kernel K_t = s Re(C A_bar^t B_bar), without D.

    Args:
        params: from `init`.
        length: number of samples L, at least 1.
        discretization: see `discretize`.
        alpha: see `discretize`.
        dt_scale: see `discretize`.
        clip_eigs: see `discretize`.
        conj_sym: as in `init`.
        bidirectional: return the kernels of both directions.

    Returns:
        K (L, H, H), out by in; with ``bidirectional`` (2, L, H, H), where the second runs backwards
        in time and counts the current sample too.

    Raises:
        ValueError: length < 1, an unknown choice, no C2 in params.

    Source: the recurrence of `scan`, unrolled.
    """
    r = discretized(
        "s5.kernel", params, compute_dtype(params), None, "both", discretization, alpha, dt_scale,
        clip_eigs,
    )  # fmt: skip
    scale = 2.0 if conj_sym else 1.0
    return _mimo.kernel("s5.kernel", params, length, r, scale=scale, bidirectional=bidirectional)


def frequency_response(
    params: Params,
    omega: Tensor,
    *,
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    conj_sym: bool = True,
    clip_eigs: bool = False,
    bidirectional: bool = False,
) -> Tensor:
    """Return H = D + C (1 - A_bar exp(-i omega))^(-1) B_bar over all P states, in closed form.

    Of a stable model it is the Fourier transform of its impulse response.

    Args:
        params: from `init`.
        omega: (...), real, in radians a sample: 2 pi times the frequency over the sampling rate.
            A float64 one computes in float64.
        discretization: see `discretize`.
        alpha: see `discretize`.
        dt_scale: see `discretize`.
        conj_sym: as in `init`.
        clip_eigs: see `discretize`.
        bidirectional: add the reverse direction; both count the current sample.

    Returns:
        H (..., H, H), out by in, complex.

    Raises:
        ValueError: an omega that is not real, an unknown choice, no C2 in params.

    Source: the transform of `kernel`, a geometric series for each state.
    """
    where = "s5.frequency_response"

    def recurrence(dtype: torch.dtype) -> _mimo.Recurrence:
        return discretized(
            where, params, dtype, None, "both", discretization, alpha, dt_scale, clip_eigs
        )

    scale = 2.0 if conj_sym else 1.0
    return _response.mimo(
        where, params, omega, recurrence, scale=scale, bidirectional=bidirectional
    )


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
    conj_sym: bool = True,
    clip_eigs: bool = False,
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
        state: (..., P_h) complex, the state before the first sample; zeros if None.
        integration_timesteps: (..., L), time elapsed before each sample, in units of dt.
        timestep_mode: whether they scale decay and gain (``both``) or the decay (``state_only``).
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, clear the state before that sample.
        discretization: see `discretize`.
        alpha: see `discretize`.
        dt_scale: see `discretize`.
        clip_eigs: see `discretize`.
        conj_sym: as in `init`.
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
        y (..., L, H) in u's dtype, and the final state (..., P_h) complex, at least complex64 (of
        the forward direction where bidirectional).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state with
            ``bidirectional``; ``conv``, ``chunk_size`` or ``max_bytes`` with
            timesteps, mask or reset.

    Source: Smith et al. 2023, section 3 (the S5 layer).
    """
    B = params["B_re"]
    check_input("s5.scan", u, B.shape[1], B, rank=2, shape="(..., L, H)")
    seq = layout(
        "s5.scan", u, lengths=lengths, mask=mask, reset=reset,
        integration_timesteps=integration_timesteps,
    )  # fmt: skip

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        if discrete is not None:
            return _mimo.given(discrete, "s5.scan", params, dtype, timesteps)
        return sequence(
            "s5.scan", params, dtype, timesteps, timestep_mode, discretization, alpha, dt_scale,
            clip_eigs, u.is_cuda,
        )  # fmt: skip

    return _mimo.scan(
        "s5.scan", params, u, state, recurrence, layout=seq, mode=mode,
        scale=2.0 if conj_sym else 1.0, bidirectional=bidirectional, kernel=kernel,
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
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    conj_sym: bool = True,
    clip_eigs: bool = False,
    discrete: Discrete | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: (..., P_h) complex.
        integration_timestep: (...), time elapsed since the previous sample, in units of dt.
        discrete: (A_bar, B_bar) from `discretize`, computed once for many steps.
        timestep_mode: see `scan`.
        discretization: see `scan`.
        alpha: see `scan`.
        dt_scale: see `scan`.
        conj_sym: see `scan`.
        clip_eigs: see `scan`.

    Returns:
        y_t (..., H) in u_t's dtype and the new state (..., P_h).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit.
    """
    check_timestep("s5.step", integration_timestep, u_t)

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        if discrete is not None:
            return _mimo.given(discrete, "s5.step", params, dtype, integration_timestep)
        return sequence(
            "s5.step", params, dtype, integration_timestep, timestep_mode, discretization, alpha,
            dt_scale, clip_eigs,
        )  # fmt: skip

    return _mimo.step("s5.step", params, u_t, state, recurrence, scale=2.0 if conj_sym else 1.0)


def discretized(
    where: str,
    params: Params,
    dtype: torch.dtype,
    timesteps: Tensor | None,
    timestep_mode: TimestepMode,
    discretization: Discretization | None,
    alpha: Number | None,
    dt_scale: Number,
    clip_eigs: bool,
) -> _mimo.Recurrence:
    """Discretize for ``where``, in this real dtype; the choices are those of `discretize`."""
    r = sequence(
        where, params, dtype, timesteps, timestep_mode, discretization, alpha, dt_scale, clip_eigs
    )
    return r if isinstance(r, _mimo.Recurrence) else r.discretized()


def sequence(
    where: str,
    params: Params,
    dtype: torch.dtype,
    timesteps: Tensor | None,
    timestep_mode: TimestepMode,
    discretization: Discretization | None,
    alpha: Number | None,
    dt_scale: Number,
    clip_eigs: bool,
    always: bool = False,
) -> _mimo.Recurrence | _mimo.Flow:
    """Return what a scan runs: under irregular time, what it needs to discretize as it goes.

    ``always``: in regular time too, which saves a GPU the launches of some fifty small operations.
    """
    scheme = "zoh" if discretization is None else discretization
    resolve(scheme, timestep_mode, alpha, DISCRETIZATIONS, where)
    with full_precision(params["log_dt"].device):

        def make() -> tuple[Tensor, Tensor, Tensor]:
            re, im = params["Lambda_re"].to(dtype), params["Lambda_im"].to(dtype)
            Lambda = torch.complex(re.clamp(max=MAX_REAL) if clip_eigs else re, im)
            dt = scaled(torch.exp(params["log_dt"].to(dtype)), dt_scale)
            return Lambda, dt, pair(params, "B", dtype)

        Lambda, dt, B = made_of(params, ("s5", dtype, dt_scale, clip_eigs), make)
        parts = parts_of(params, "B", dtype)
        if timesteps is not None:
            timesteps = timesteps.to(dtype)
        if timesteps is not None or always:
            flow = _mimo.Flow.of(Lambda, dt, timesteps, scheme, timestep_mode, B, parts)
            if flow is not None:
                return flow
        A_bar, gamma = discretize_diagonal(
            Lambda, dt, discretization=scheme, timestep_mode=timestep_mode, alpha=alpha,
            integration_timesteps=timesteps,
        )  # fmt: skip
        known = scheme in EXPONENTIAL and timesteps is None
        exponent = (lambda: dt * Lambda) if known else None
        return _mimo.Recurrence(A_bar, gamma, B, exponent, parts)
