# SPDX-License-Identifier: MIT
"""Event-SSM: S5 over events, with the time between them in the decay.

    x_k = exp(dt Lambda delta_k) x_{k-1} + gamma B u_k,    y_k = s Re(C x_k) + D u_k

delta_k is the time that elapsed before event k. Under ``async``, the default, gamma is the gain of
a zero-order hold over dt, whatever the gap: every event counts alike. `pooled_scan` and `pool` are
the layer that gives an output for every ``stride`` events.

Source: Schoene et al. 2024, arXiv:2404.18508, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.models import _event_pooling, _mimo, _response, s5
from lrnnx_core.models._common import (
    check_choice,
    check_input,
    check_sizes,
    check_timestep,
    compute_dtype,
)
from lrnnx_core.models._event_pooling import (
    Compat,
    Pending,
    Pooled,
    PooledState,
    Pooling,
    init_pending,
    pool,
)
from lrnnx_core.sequences import layout
from lrnnx_core.types import Discrete, Discretization, Mode, Number, Params, TimestepMode

DISCRETIZATIONS = ("async", "zoh", "bilinear", "gbt", "euler", "dirac", "mamba")
POOLED_MODES = ("auto", "scan", "recurrent")


def init(
    d_model: int,
    d_state: int,
    *,
    d_out: int | None = None,
    blocks: int = 1,
    conj_sym: bool = True,
    bidirectional: bool = False,
    C_init: s5.CInit = "lecun_normal",
    dt_min: Number = 4e-3,
    dt_max: Number = 1e-1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return fresh parameters.

    Args:
        d_model: channels H of the input.
        d_state: full state size P; stored are P_h = P/2 with ``conj_sym``, else P.
        d_out: channels H_out of the output; H if None.
        blocks: J, the state matrix starts as J copies of HiPPO-LegS of size P/J.
        conj_sym: store one eigenvalue of each conjugate pair.
        bidirectional: add C2, the readout of the reverse direction.
        C_init: ``lecun_normal`` (deviation 1/sqrt(P H_out)), ``trunc_standard_normal`` (1/sqrt(P)),
            both rotated by the eigenvectors, or ``complex_normal`` (sqrt(1/2), drawn as stored).
        dt_min: smallest initial step, in the unit of the gaps; log dt is uniform up to log dt_max.
        dt_max: largest initial step.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Returns:
        Lambda_re, Lambda_im, log_dt (P_h,); B_re, B_im (P_h, H); C_re, C_im (H_out, P_h), with
        ``bidirectional`` C2_re, C2_im too; D (H,), or Glorot normal (H_out, H) where H_out is
        another width.

    Raises:
        ValueError: a size < 1; P not divisible by J; P/J odd with ``conj_sym``; an unknown choice.

    Source: Schoene et al. 2024, section 3; the defaults are those of the authors' configurations
    (gaps in milliseconds).
    """
    d_out = d_model if d_out is None else d_out
    check_sizes("event_ssm.init", d_model=d_model, d_state=d_state, d_out=d_out, blocks=blocks)
    check_choice("event_ssm.init", "C_init", C_init, s5.C_INITS)
    s5.check_blocks("event_ssm.init", d_state, blocks, conj_sym)
    return s5.parameters(
        initialize.Drawer(generator, device, dtype).resolved(), d_model, d_out, d_state,
        blocks=blocks, conj_sym=conj_sym, bidirectional=bidirectional, Lambda_init="hippo",
        C_init=C_init, dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip


def init_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the zero state (*batch_shape, P_h), complex.

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        dtype: real dtype of its parts; the parameters' (at least float32) if None.
    """
    return s5.init_state(params, batch_shape, dtype=dtype)


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

    With ``integration_timesteps`` (..., L), A_bar is (..., L, P_h); B_bar is (..., L, P_h, H)
    where the gap scales the gain, else (P_h, H).

    Args:
        params: from `init`.
        integration_timesteps: time elapsed before each event.
        timestep_mode: ``both`` scales decay and gain by the gap, ``state_only`` the decay alone.
            ``async`` is ``zoh`` with ``state_only`` and knows no other.
        discretization: ``async`` (default), ``dirac`` and ``zoh`` are the paper's; ``bilinear``,
            ``gbt``, ``euler``, ``mamba``, or a callable.
        alpha: the number of ``gbt``.
        dt_scale: multiplies dt.
        clip_eigs: hold Re Lambda at most -1e-4, so that the model stays stable in training.

    Raises:
        ValueError: an unknown choice.

    Source: Schoene et al. 2024, section 3.
    """
    r = _recurrence(
        "event_ssm.discretize", params, compute_dtype(params, integration_timesteps),
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
    """Return the convolution kernel K_t = s Re(C A_bar^t B_bar) of gaps of one, without D.

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
        K (L, H_out, H), out by in; with ``bidirectional`` (2, L, H_out, H), where the second runs
        backwards in time and counts the current sample too.

    Raises:
        ValueError: length < 1, an unknown choice, no C2 in params.

    Source: the recurrence of `scan`, unrolled.
    """
    where = "event_ssm.kernel"
    r = _recurrence(
        where, params, compute_dtype(params), None, "both", discretization, alpha, dt_scale,
        clip_eigs,
    )  # fmt: skip
    scale = _scale(conj_sym)
    return _mimo.kernel(where, params, length, r, scale=scale, bidirectional=bidirectional)


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
    """Return H(omega) = sum_t K_t exp(-i omega t) + D of gaps of one, in closed form.

    Args:
        params: from `init`.
        omega: (...), real, in radians a sample.
        discretization: see `discretize`.
        alpha: see `discretize`.
        dt_scale: see `discretize`.
        clip_eigs: see `discretize`.
        conj_sym: as in `init`.
        bidirectional: sum both directions.

    Returns:
        H (..., H_out, H), complex.

    Raises:
        ValueError: omega that is not real, an unknown choice, no C2 in params.

    Source: the z transform of the recurrence of `scan`.
    """
    where = "event_ssm.frequency_response"

    def recurrence(dtype: torch.dtype) -> _mimo.Recurrence:
        return _recurrence(
            where, params, dtype, None, "both", discretization, alpha, dt_scale, clip_eigs
        )

    return _response.mimo(
        where, params, omega, recurrence, scale=_scale(conj_sym), bidirectional=bidirectional
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
    """Run the model over a sequence of events.

    Args:
        params: from `init`.
        u: (..., L, H), real: one vector an event.
        state: (..., P_h) complex, the state before the first event; zeros if None.
        integration_timesteps: (..., L), time elapsed before each event; gaps of one if None.
        timestep_mode: see `discretize`.
        lengths: (...), events per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, clear the state before that event.
        discretization: see `discretize`.
        alpha: see `discretize`.
        dt_scale: see `discretize`.
        clip_eigs: see `discretize`.
        conj_sym: as in `init`.
        bidirectional: add the reverse direction, read with C2; both count the current event.
        mode: ``scan``; ``conv`` (by FFT, for gaps of one); ``recurrent`` (a loop, the
            specification); ``auto`` = ``scan``.
        kernel: from `kernel`, to be convolved with instead; as long as L or ``chunk_size``.
        discrete: (A_bar, B_bar) from `discretize`, to be used instead of discretizing.
        chunk_size: samples that a convolution takes at once, the state carried between them; what
            it needs beside input and output does not grow with L then. None: all, or chunks of
            4096 (65536 on a GPU) where L is at least twice that.
        max_bytes: cap on what the contraction of a convolution may allocate, as
            `lrnnx_core.ops.contract.plan` estimates it.

    Returns:
        y (..., L, H_out) in u's dtype, and the final state (..., P_h) complex, at least complex64
        (of the forward direction where bidirectional).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state with
            ``bidirectional``; ``conv``, ``chunk_size`` or ``max_bytes`` with
            timesteps, mask or reset.

    Source: Schoene et al. 2024, section 3.
    """
    where = "event_ssm.scan"
    B = params["B_re"]
    check_input(where, u, B.shape[1], B, rank=2, shape="(..., L, H)")
    seq = layout(
        where, u, lengths=lengths, mask=mask, reset=reset,
        integration_timesteps=integration_timesteps,
    )  # fmt: skip

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        if discrete is not None:
            return _mimo.given(discrete, where, params, dtype, timesteps)
        return s5.sequence(
            where, params, dtype, timesteps, timestep_mode, _scheme(discretization), alpha,
            dt_scale, clip_eigs, u.is_cuda,
        )  # fmt: skip

    return _mimo.scan(
        where, params, u, state, recurrence, layout=seq, mode=mode, scale=_scale(conj_sym),
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
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    conj_sym: bool = True,
    clip_eigs: bool = False,
    discrete: Discrete | None = None,
) -> tuple[Tensor, Tensor]:
    """Take in one event.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: (..., P_h) complex.
        integration_timestep: (...), time elapsed since the previous event; one if None.
        discrete: (A_bar, B_bar) from `discretize`, computed once for many steps.
        timestep_mode: see `scan`.
        discretization: see `scan`.
        alpha: see `scan`.
        dt_scale: see `scan`.
        conj_sym: see `scan`.
        clip_eigs: see `scan`.

    Returns:
        y_t (..., H_out) in u_t's dtype and the new state (..., P_h).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit.
    """
    where = "event_ssm.step"
    check_timestep(where, integration_timestep, u_t)

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        if discrete is not None:
            return _mimo.given(discrete, where, params, dtype, integration_timestep)
        return s5.sequence(
            where, params, dtype, integration_timestep, timestep_mode, _scheme(discretization),
            alpha, dt_scale, clip_eigs,
        )  # fmt: skip

    return _mimo.step(where, params, u_t, state, recurrence, scale=_scale(conj_sym))


def init_pooled_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> PooledState:
    """Return the state of `pooled_scan` before any event: h zero, and no events waiting.

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        dtype: real dtype of its parts; the parameters' (at least float32) if None.
    """
    h = init_state(params, batch_shape, dtype=dtype)
    like = h.real.new_zeros(())
    return PooledState(h, init_pending(like, batch_shape, params["B_re"].shape[1]))


def pooled_scan(
    params: Params,
    u: Tensor,
    state: PooledState | None = None,
    *,
    stride: int,
    pooling: Pooling = "last",
    compat: Compat | None = None,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    conj_sym: bool = True,
    clip_eigs: bool = False,
    mode: Literal["auto", "scan", "recurrent"] = "auto",
) -> tuple[Pooled, PooledState]:
    """Run the model over L events, with one output for each group of ``stride`` events.

    The state meets every event and is read after the last one of each group; C is applied to these
    states alone. D is applied to the group's pooled input. Events that do not fill a group wait in
    the returned state: any split of a sequence gives what the whole gives, and where a sequence
    ends, they are dropped. With ``lengths`` or ``mask`` every row ends here, and none wait.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        state: from `init_pooled_state` or an earlier call; nothing yet if None.
        stride: s, events a group, at least 1.
        pooling: of the input that D reads: ``last`` event, ``mean``, or ``time_weighted`` mean; see
            `pool`.
        compat: ``event_ssm`` reads the state after the *first* event of each group, and takes the
            first for ``last``, as the released code does.
        integration_timesteps: (..., L), time elapsed before each event; gaps of one if None.
        timestep_mode: see `discretize`.
        lengths: (...), events per row of a right-padded batch.
        mask: (..., L) bool, False is padding, as if it were not there.
        discretization: see `discretize`.
        alpha: see `discretize`.
        dt_scale: see `discretize`.
        conj_sym: as in `init`.
        clip_eigs: see `discretize`.
        mode: ``scan`` (= ``auto``) or ``recurrent``, the loop.

    Returns:
        Pooled: y (..., M, H_out) in u's dtype, integration_timesteps (..., M), the sums over the
        groups, and lengths (...), those given // s, or None; and the state. With w events waiting,
        M = (w + L) // s; what lies behind a row's length is zero.

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit.

    Source: Schoene et al. 2024, section 3 (event pooling).
    """
    where = "event_ssm.pooled_scan"
    check_choice(where, "mode", mode, POOLED_MODES)
    B = params["B_re"]
    check_input(where, u, B.shape[1], B, rank=2, shape="(..., L, H)")
    seq = layout(where, u, lengths=lengths, mask=mask, integration_timesteps=integration_timesteps)

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        return s5.sequence(
            where, params, dtype, timesteps, timestep_mode, _scheme(discretization), alpha,
            dt_scale, clip_eigs,
        )  # fmt: skip

    return _event_pooling.scan(
        where, params, u, state, recurrence, layout=seq, stride=stride, pooling=pooling,
        compat=compat, scale=_scale(conj_sym), recurrent=mode == "recurrent",
    )  # fmt: skip


def _scale(conj_sym: bool) -> float:
    return 2.0 if conj_sym else 1.0


def _scheme(discretization: Discretization | None) -> Discretization:
    return "async" if discretization is None else discretization


def _recurrence(
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
    """Return S5's recurrence with the asynchronous rule as the default."""
    return s5.discretized(
        where, params, dtype, timesteps, timestep_mode, _scheme(discretization), alpha, dt_scale,
        clip_eigs,
    )  # fmt: skip


__all__ = [
    "DISCRETIZATIONS",
    "POOLED_MODES",
    "Compat",
    "Pending",
    "Pooled",
    "PooledState",
    "Pooling",
    "discretize",
    "frequency_response",
    "init",
    "init_pooled_state",
    "init_state",
    "kernel",
    "pool",
    "pooled_scan",
    "scan",
    "step",
]
