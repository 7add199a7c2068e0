# SPDX-License-Identifier: MIT
"""S4: one diagonal plus low-rank state space for each channel.

    x' = (Lambda - P P^*) x + B u,    y = C x + D u

made discrete by the bilinear transform; N/2 complex states stand for N in conjugate pairs, and the
low-rank term couples a pair's halves.

Source: Gu, Goel & Ré 2022, arXiv:2111.00396; the rank-2 and Fourier measures: Gu, Johnson,
Timalsina, Rudra & Ré 2022, arXiv:2206.12037.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, get_args

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.initialize import Measure
from lrnnx_core.models import _dplr, _dplr_kernel, _response, _s4, _s4_run, _s4_scan
from lrnnx_core.models._common import (
    check_choice,
    check_directions,
    check_input,
    check_sizes,
    check_state,
    check_timestep,
    compute_dtype,
    full_precision,
    zero_state,
)
from lrnnx_core.models._dplr import Transition
from lrnnx_core.models._s4_run import Choices
from lrnnx_core.models._siso import complex_of
from lrnnx_core.models._transforms import (
    RealTransform,
    StepTransform,
    check_transforms,
    raw_real_part,
    raw_step_size,
)
from lrnnx_core.sequences import layout
from lrnnx_core.types import Discrete, Discretization, Mode, Number, Params, TimestepMode

DISCRETIZATIONS = ("bilinear",)
A_INITS = (*get_args(Measure), "hippo")


def init(
    d_model: int,
    d_state: int = 64,
    *,
    A_init: Measure | str | tuple[Measure, ...] = "legs",
    rank: int | None = None,
    B_clip: float | None = 2.0,
    n_ssm: int | None = None,
    channels: int = 1,
    tied_dt: bool = True,
    bidirectional: bool = False,
    l_kernel: int | None = None,
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
        d_state: real states N a channel, even; stored are N/2 complex ones.
        A_init: the HiPPO measure ``legs`` (rank 1), ``legt`` (rank 2) or ``fout`` (rank 1), see
            `lrnnx_core.initialize.hippo`; or a tuple of measures that share the copies out in
            order; ``hippo`` is ("legs", "fout").
        rank: rows R of P; the largest rank of the measures if None. A larger one adds rows of
            zeros, at which the gradient of P is zero. 0 leaves the low-rank term out: S4D.
        B_clip: the largest size of Im B at the start, as in the released code; None keeps that of
            HiPPO, which grows with N.
        n_ssm: number S of independent (A, B), S divides H, channel h uses copy h mod S; H if None.
        channels: outputs Ch a channel.
        tied_dt: one step a channel; else one for every state.
        bidirectional: add C2, the readout of the reverse direction.
        l_kernel: None stores C itself; a length L stores C~ = C (I - A_bar^L), whose kernel of L
            samples needs no powers of A_bar. Give every other function the same l_kernel.
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
        log_dt (H,) or (H, N/2) untied; A_log, A_im, B_re, B_im (S, N/2); P_re, P_im (R, S, N/2);
        C_re, C_im (H, N/2), or (Ch, H, N/2) with channels; with ``bidirectional`` C2_re, C2_im too;
        D (H,) or (Ch, H).

    Raises:
        ValueError: a size < 1; an odd N; S that does not divide H or that the measures cannot
            share; an unknown choice; a rank too small for the measure; a B_clip that is not > 0.

    Source: Gu et al. 2022 (S4), section 3 and appendix C; Gu et al. 2022 (How to train your
    HiPPO), and their released code (cut of Im B, smallest decay).
    """
    where = "s4.init"
    copies = d_model if n_ssm is None else n_ssm
    check_sizes(where, d_model=d_model, d_state=d_state, channels=channels, n_ssm=copies)
    check_transforms(where, dt_transform, A_transform)
    if l_kernel is not None:
        check_sizes(where, l_kernel=l_kernel)
    measures = _measures(where, A_init)
    if d_state % 2:
        raise ValueError(f"{where}: d_state = {d_state} is odd; conjugate pairs need an even one")
    if d_model % copies:
        raise ValueError(f"{where}: n_ssm = {copies} does not divide d_model = {d_model}")
    if rank is not None and rank != 0:
        check_sizes(where, rank=rank)
    if B_clip is not None and not B_clip > 0:
        raise ValueError(f"{where}: B_clip = {B_clip}, expected a number > 0 or None")
    draw = initialize.Drawer(generator, device, dtype).resolved()
    steps = draw.uniform(d_model) if tied_dt else draw.uniform(d_model, d_state // 2)
    A, B, P = _s4.initial_copies(where, measures, d_state, copies, rank)
    params: Params = {
        "log_dt": raw_step_size(initialize.log_dt(steps, dt_min, dt_max), dt_transform),
        "A_log": draw.tensor(raw_real_part(-A.real, A_transform)),
        "A_im": draw.tensor(A.imag),
        "B_re": draw.tensor(B.real),
        "B_im": draw.tensor(B.imag if B_clip is None else B.imag.clamp(-B_clip, B_clip)),
        "P_re": draw.tensor(P.real),
        "P_im": draw.tensor(P.imag),
    }
    lead = (d_model,) if channels == 1 else (channels, d_model)
    for key in ("C", "C2") if bidirectional else ("C",):
        for part in ("_re", "_im"):
            params[key + part] = draw.normal(*lead, d_state // 2) * 2**-0.5
    params["D"] = draw.normal(*lead)
    if l_kernel is None:
        return params
    return c_to_ctilde(params, l_kernel, dt_transform=dt_transform, A_transform=A_transform)


def _measures(where: str, A_init: object) -> tuple[Measure, ...]:
    if A_init == "hippo":
        return ("legs", "fout")
    given = A_init if isinstance(A_init, tuple) else (A_init,)
    known = get_args(Measure)
    if not given or any(m not in known for m in given):
        raise ValueError(
            f"{where}: A_init = {A_init!r}, expected one of {A_INITS} or a tuple of {known}"
        )
    return cast(tuple[Measure, ...], given)


def init_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the zero state (*batch_shape, H, N/2), complex.

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        dtype: real dtype of its parts; the parameters' (at least float32) if None.
    """
    real = torch.promote_types(compute_dtype(params) if dtype is None else dtype, torch.float32)
    return zero_state(params["C_re"].to(complex_of(real)), batch_shape, params["C_re"].shape[-2:])


def _choices(
    where: str,
    discretization: Discretization | None,
    dt_scale: Number,
    dt_transform: StepTransform,
    A_transform: RealTransform,
    l_kernel: int | None = None,
    timestep_mode: TimestepMode = "both",
) -> Choices:
    """Bundle the choices of a call; raise with the list unless each is one of them."""
    if discretization is not None:
        check_choice(where, "discretization", discretization, DISCRETIZATIONS)
    check_choice(where, "timestep_mode", timestep_mode, ("both", "state_only"))
    check_transforms(where, dt_transform, A_transform)
    if l_kernel is not None:
        check_sizes(where, l_kernel=l_kernel)
    return Choices(dt_transform, A_transform, dt_scale, l_kernel, timestep_mode)


def discretize(
    params: Params,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    dt_scale: Number = 1.0,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
) -> Discrete:
    """Return (A_bar, B_bar) as full real matrices, (H, N, N) and (H, N).

    They act on the real form of a state, its N/2 real parts and then its N/2 imaginary ones. Made
    once, they serve many calls of `step`; a step without them works on the low-rank form.

    Args:
        params: from `init`.
        integration_timesteps: (..., L), time elapsed before each sample, in units of dt; the
            results are then (..., L, H, N, N) and (..., L, H, N), B_bar staying (H, N) under
            ``timestep_mode="state_only"``.
        timestep_mode: whether they scale decay and gain (``both``) or the decay (``state_only``).
        discretization: ``bilinear``, the only one of S4 and the default.
        dt_scale: multiplies dt; 2.0 runs the model on a signal sampled at half the rate.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.

    Raises:
        ValueError: an unknown choice.

    Source: Gu et al. 2022 (S4), section 2.3 (bilinear transform), appendix C.2 (low rank).
    """
    choices = _choices(
        "s4.discretize", discretization, dt_scale, dt_transform, A_transform, None, timestep_mode
    )
    with full_precision(params["log_dt"].device):
        dtype = compute_dtype(params, integration_timesteps)
        elapsed = integration_timesteps
        A, B = _s4_run.transition(params, dtype, choices, elapsed).dense()
        return A, B


def kernel(
    params: Params,
    length: int,
    *,
    discretization: Discretization | None = None,
    dt_scale: Number = 1.0,
    bidirectional: bool = False,
    l_kernel: int | None = None,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
) -> Tensor:
    """Return the convolution kernel K_t = C A_bar^t B_bar, t = 0 ... L - 1, without D.

    With C itself stored it comes from repeated squares of A_bar, in float64. With C~ it is the
    truncated generating function at the roots of unity, O(N L), made at l_kernel samples and cut.
    A dt_scale other than the float 1.0 changes A_bar, for which C~ was not made: the true C is
    recovered first, which is exact.

    Args:
        params: from `init`.
        length: number of samples L, at least 1.
        discretization: see `discretize`.
        dt_scale: see `discretize`.
        bidirectional: return the kernels of both directions.
        l_kernel: as given to `init`; L may not be larger.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.

    Returns:
        K (L, H), or (Ch, L, H) with channels, real; with ``bidirectional`` (2, ..., L, H), where
        the second runs backwards in time and starts at the next sample.

    Raises:
        ValueError: length < 1 or > l_kernel, an unknown choice, no C2 in params.

    Source: Gu et al. 2022 (S4), section 3.2 and appendix C.3.
    """
    where = "s4.kernel"
    choices = _choices(where, discretization, dt_scale, dt_transform, A_transform, l_kernel)
    if length < 1:
        raise ValueError(f"{where}: length = {length}, expected >= 1")
    _s4_scan.check_reach(where, length, l_kernel)
    if bidirectional:
        check_directions(where, params)
    with full_precision(params["log_dt"].device):
        dtype = compute_dtype(params)
        keys = ("C", "C2") if bidirectional else ("C",)
        each = [_s4_run.kernel(params, key, length, choices, dtype) for key in keys]
        K = torch.stack(each) if bidirectional else each[0]
        return K.squeeze(-3) if params["D"].ndim == 1 else K


def frequency_response(
    params: Params,
    omega: Tensor,
    *,
    discretization: Discretization | None = None,
    dt_scale: Number = 1.0,
    bidirectional: bool = False,
    l_kernel: int | None = None,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
) -> Tensor:
    """Return H = D + C (I - A_bar exp(-i omega))^-1 B_bar, in closed form.

    It is the Fourier transform of the impulse response.

    Args:
        params: from `init`.
        omega: (...), real, in radians a sample: 2 pi times the frequency over the sampling rate.
            A float64 one computes in float64.
        discretization: see `discretize`.
        dt_scale: see `discretize`.
        bidirectional: add the reverse direction, which starts at the next sample.
        l_kernel: as given to `init`.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.

    Returns:
        H (..., H), or (Ch, ..., H) with channels, complex.

    Raises:
        ValueError: an omega that is not real, an unknown choice, no C2 in params.

    Source: the generating function of `kernel` without truncation.
    """
    where = "s4.frequency_response"
    choices = _choices(where, discretization, dt_scale, dt_transform, A_transform, l_kernel)
    _response.check_omega(where, omega, params)
    if bidirectional:
        check_directions(where, params)
    with full_precision(omega.device):
        dtype = compute_dtype(params, omega)
        system = _s4_run.system(params, dtype, choices)
        flat = omega.to(dtype).flatten()

        def one(key: str) -> Tensor:
            C = _s4.from_rows(_s4_run.true_readout(params, key, choices)).to(complex_of(dtype))
            return _dplr_kernel.response(C, system, flat)

        H = one("C")
        if bidirectional:
            turn = torch.exp(torch.complex(torch.zeros_like(flat), flat)).unsqueeze(-1)
            H = H + turn * _dplr.conjugate(one("C2"))
        H = H + params["D"].to(dtype).reshape(-1, 1, H.shape[-1])
        H = H.unflatten(-2, omega.shape) if omega.ndim else H.squeeze(-2)
        return H.squeeze(0) if params["D"].ndim == 1 else H


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
    bidirectional: bool = False,
    l_kernel: int | None = None,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
    mode: Mode = "auto",
    kernel: Tensor | None = None,
    discrete: Discrete | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the model over a sequence.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        state: (..., H, N/2), the state before the first sample; zeros if None.
        integration_timesteps: (..., L), time elapsed before each sample, in units of dt.
        timestep_mode: whether they scale decay and gain (``both``) or the decay (``state_only``).
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, clear the state before that sample.
        discretization: see `discretize`.
        dt_scale: see `discretize`.
        bidirectional: add the reverse direction, read with C2; it starts at the next sample.
        l_kernel: as given to `init`. ``conv`` needs L <= l_kernel, or a ``chunk_size`` that
            is; other modes recover the true C.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.
        mode: ``conv`` (kernel and FFT); ``scan`` (matrix products over blocks of time, a loop
            over time where timesteps are given); ``recurrent`` (a loop over the
            low-rank form, the specification); ``auto``: ``conv`` with a kernel given, or where
            l_kernel says C~ is stored and reaches that far, else ``scan``.
        kernel: from `kernel`, for ``conv``; as long as L or ``chunk_size``.
        discrete: (A_bar, B_bar) from `discretize`, to be used instead of discretizing.
        chunk_size: samples that a convolution takes at once, the state carried between them; what
            it needs beside input and output does not grow with L then, and L may pass l_kernel.
            None: all, or where C itself is stored chunks of 4096 (65536 on a GPU) from twice that
            on.

    Returns:
        y (..., L, H) in u's dtype, (..., L, Ch H) with channels (channel-major), and the final
        state (..., H, N/2), at least float32 (of the forward direction where bidirectional).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state with
            ``bidirectional``; ``conv`` or ``chunk_size`` with timesteps, mask or reset;
            ``conv`` beyond l_kernel.

    Source: Gu et al. 2022 (S4), section 3; Goel et al. 2022, arXiv:2202.09729 (bidirectional).
    """
    D = params["D"]
    check_input("s4.scan", u, D.shape[-1], D, rank=2, shape="(..., L, H)")
    seq = layout(
        "s4.scan", u, lengths=lengths, mask=mask, reset=reset,
        integration_timesteps=integration_timesteps,
    )  # fmt: skip
    choices = _choices(
        "s4.scan", discretization, dt_scale, dt_transform, A_transform, l_kernel, timestep_mode
    )
    return _s4_scan.scan(
        "s4.scan", params, u, state, choices, layout=seq, mode=mode,
        bidirectional=bidirectional, kernel=kernel, discrete=discrete,
        chunk_size=chunk_size,
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
    l_kernel: int | None = None,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
    discrete: Discrete | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step, O(N R) in the low-rank form, or O(N^2) with ``discrete``.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: (..., H, N/2).
        integration_timestep: (...), time elapsed since the previous sample, in units of dt.
        timestep_mode: see `scan`.
        discretization: see `scan`.
        dt_scale: see `scan`.
        l_kernel: as given to `init`. With one every step recovers the true C, O(N^3 log l_kernel):
            for many steps convert the parameters once with `ctilde_to_c`.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.
        discrete: (A_bar, B_bar) from `discretize`, computed once for many steps.

    Returns:
        y_t (..., H) in u_t's dtype, (..., Ch H) with channels, and the new state (..., H, N/2).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit.
    """
    where, D = "s4.step", params["D"]
    check_input(where, u_t, D.shape[-1], D, rank=1, shape="(..., H)")
    check_state(where, state, u_t.shape[:-1], params["C_re"].shape[-2:], u_t)
    check_timestep(where, integration_timestep, u_t)
    choices = _choices(
        where, discretization, dt_scale, dt_transform, A_transform, l_kernel, timestep_mode
    )
    if discrete is not None:
        _s4_scan.check_given(where, params, discrete, integration_timestep)
    with full_precision(u_t.device):
        dtype = compute_dtype(params, u_t, state)
        if discrete is None:
            at = _s4_run.transition(params, dtype, choices, integration_timestep)
            return _s4_run.low_rank_step(params, u_t, state, at, choices)
        x, h = u_t.to(dtype), state.to(complex_of(dtype))
        h = _s4_run.dense_step((discrete[0].to(dtype), discrete[1].to(dtype)), h, x)
        y = _s4_run.reader(params, "C", choices, dtype)(h) + D.to(dtype) * x.unsqueeze(-2)
        return y.flatten(-2).to(u_t.dtype), h


def transition(
    params: Params,
    *,
    dt_scale: float = 1.0,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
) -> Transition:
    """Return the discrete system in its low-rank form, computed once for many steps."""
    choices = _choices("s4.transition", None, dt_scale, dt_transform, A_transform, None, "both")
    with full_precision(params["D"].device):
        return _s4_run.transition(params, compute_dtype(params), choices)


def advance(
    where: str, params: Params, u_t: Tensor, state: Tensor, at: Transition
) -> tuple[Tensor, Tensor]:
    """Take one `step` with the true C and a `transition` made before."""
    D = params["D"]
    check_input(where, u_t, D.shape[-1], D, rank=1, shape="(..., H)")
    check_state(where, state, u_t.shape[:-1], params["C_re"].shape[-2:], u_t)
    with full_precision(u_t.device):
        kind = complex_of(compute_dtype(params, u_t, state))
        if at.a.dtype is not kind:
            at = Transition(*(t.to(kind) for t in at))
        choices = _s4_run.Choices("exp", "exp", 1.0, None)
        return _s4_run.low_rank_step(params, u_t, state, at, choices)


def c_to_ctilde(
    params: Params,
    length: int,
    *,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
) -> Params:
    """Return parameters that store C~ = C (I - A_bar^L), for ``l_kernel=length``.

    Args:
        params: parameters that store C, ``l_kernel=None``.
        length: L, at least 1.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.

    Raises:
        ValueError: length < 1.

    Source: Gu et al. 2022 (S4), appendix C.3.
    """
    return _s4.convert("s4.c_to_ctilde", params, length, dt_transform, A_transform, "truncate")


def ctilde_to_c(
    params: Params,
    length: int,
    *,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
) -> Params:
    """Return parameters that store the true C, for ``l_kernel=None``: the inverse of `c_to_ctilde`.

    Solves with I - A_bar^L, whose condition is near 1 / (L dt |lambda|) where that is below one.

    Args:
        params: parameters that store C~ for this length.
        length: L, at least 1.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.

    Raises:
        ValueError: length < 1.
    """
    return _s4.convert("s4.ctilde_to_c", params, length, dt_transform, A_transform, "recover")


def extend(
    params: Params,
    length: int,
    *,
    dt_transform: StepTransform = "exp",
    A_transform: RealTransform = "exp",
) -> Params:
    """Return parameters that store C~ for twice the length, C~_2L = C~_L (I + A_bar^L).

    Args:
        params: parameters that store C~ for this length.
        length: L, at least 1; the result is for ``l_kernel=2 * length``.
        dt_transform: as given to `init`.
        A_transform: as given to `init`.

    Raises:
        ValueError: length < 1.
    """
    return _s4.convert("s4.extend", params, length, dt_transform, A_transform, "extend")
