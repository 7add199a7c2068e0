# SPDX-License-Identifier: MIT
"""S7: a state space whose recurrence depends on the input, in two variants.

``variant="delta"`` is S5 with an input-dependent step and a stable parametrisation of Re Lambda,

    Delta_t = softplus(step_proj(u_t))
    x_t = A_bar_t x_{t-1} + gamma_t B u_t,   y_t = s Re(C x_t) + D u_t

``variant="full"`` makes every matrix of a real state from the input, v = in_proj(u):

    h_t = A_bar_t h_{t-1} + B_t^T v_t + beta_t,   y_t = C_t h_t + d_t v_t
    out_t = y_t sigmoid(gate_proj(gelu(y_t)))

The first is what the published numbers were reproduced with, the second the letter of the paper.

Source: Soydan et al. 2024, arXiv:2410.03464.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.models import _mimo, _projected, _s7_delta, _s7_full, s5
from lrnnx_core.models._common import (
    check_choice,
    check_input,
    check_sizes,
    check_timestep,
    compute_dtype,
    zero_state,
)
from lrnnx_core.sequences import Layout, layout
from lrnnx_core.types import Discrete, Discretization, Mode, Number, Params, TimestepMode

Variant = Literal["delta", "full"]
DISCRETIZATIONS = s5.DISCRETIZATIONS
"""Of the delta variant; the full one has ``none`` only."""
MODES = ("auto", "scan", "recurrent")


def init(
    d_model: int,
    d_state: int,
    *,
    variant: Variant = "delta",
    blocks: int = 1,
    conj_sym: bool = True,
    bidirectional: bool = False,
    stable_reparam: bool = True,
    C_init: s5.CInit = "trunc_standard_normal",
    dt_init_scale: Number = 1.0,
    dt_min: Number = 1e-3,
    dt_max: Number = 1e-1,
    init_memory: _s7_full.InitMemory = "log",
    abar_min: Number = 0.9,
    abar_max: Number = 0.999,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return fresh parameters.

    Args:
        d_model: channels H.
        d_state: delta: full state size P, of which P_h = P/2 with ``conj_sym``, else P, are stored.
            full: states N.
        variant: ``delta`` or ``full``.
        blocks: delta: copies J of HiPPO-LegS of size P/J.
        conj_sym: delta: store one eigenvalue of each conjugate pair.
        bidirectional: for the reverse direction, delta: add C2, its readout, as S5 does; full: add
            a second x_proj and base.
        stable_reparam: delta: store w with Re Lambda = -1/(w^2 + 1/2), which is negative whatever
            training does, and >= -2; else Re Lambda itself.
        C_init: delta: see `lrnnx_core.models.s5.init`.
        dt_init_scale: delta: multiplies the bound ceil(H/16)^(-1/2) of step_proj's uniform weight.
        dt_min: delta: smallest step at an input of zero; its log is uniform up to log dt_max.
        dt_max: delta: largest step at an input of zero.
        init_memory: full: ``log`` (1 - A_bar on a geometric grid at an input of zero) or
            ``upstream`` (base = -1/2, so A_bar = -1/3: two samples of memory).
        abar_min: full, ``log``: smallest A_bar at an input of zero.
        abar_max: full, ``log``: largest A_bar at an input of zero.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Returns:
        delta: Lambda_w (``stable_reparam``) or Lambda_re, Lambda_im (P_h,), B_re, B_im (P_h, H),
        C_re, C_im (H, P_h), D (H,), step_proj.weight (P_h, H), step_proj.bias (P_h,); with
        ``bidirectional`` C2_re, C2_im.
        full: in_proj.weight (H, H), x_proj.weight (2 N + 2 H N + H, H), base (N,), gate_proj.weight
        (H, H); with ``bidirectional`` reverse.x_proj.weight, reverse.base.

    Raises:
        ValueError: a size < 1; P not divisible by J; P/J odd with ``conj_sym``; an unknown choice;
            an option of the other variant; bounds given as floats outside 0 <= abar_min <= abar_max
            < 1.

    Source: Soydan et al. 2024; the real part alone is reparametrised, since a complex w keeps
    Re Lambda negative only while Re(w^2) > -1/2.
    """
    check_sizes("s7.init", d_model=d_model, d_state=d_state, blocks=blocks)
    check_choice("s7.init", "variant", variant, ("delta", "full"))
    draw = initialize.Drawer(generator, device, dtype).resolved()
    if variant == "delta":
        _unused(
            "s7.init", "full", init_memory=(init_memory, "log"), abar_min=(abar_min, 0.9),
            abar_max=(abar_max, 0.999),
        )  # fmt: skip
        check_choice("s7.init", "C_init", C_init, s5.C_INITS)
        s5.check_blocks("s7.init", d_state, blocks, conj_sym)
        return _s7_delta.init(
            d_model, d_state, blocks=blocks, conj_sym=conj_sym, bidirectional=bidirectional,
            stable_reparam=stable_reparam, C_init=C_init, dt_init_scale=dt_init_scale,
            dt_min=dt_min, dt_max=dt_max, draw=draw,
        )  # fmt: skip
    _unused(
        "s7.init", "delta", blocks=(blocks, 1), conj_sym=(conj_sym, True),
        stable_reparam=(stable_reparam, True), C_init=(C_init, "trunc_standard_normal"),
        dt_init_scale=(dt_init_scale, 1.0), dt_min=(dt_min, 1e-3), dt_max=(dt_max, 1e-1),
    )  # fmt: skip
    return _s7_full.init(
        d_model, d_state, init_memory=init_memory, abar_min=abar_min, abar_max=abar_max,
        bidirectional=bidirectional, draw=draw,
    )  # fmt: skip


def init_state(
    params: Params,
    batch_shape: Sequence[int] = (),
    *,
    variant: Variant = "delta",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the zero state: delta (*batch_shape, P_h), complex; full (*batch_shape, N), real.

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        variant: as in `init`.
        dtype: real dtype of its parts, at least float32; the parameters' if None.
    """
    check_choice("s7.init_state", "variant", variant, ("delta", "full"))
    if variant == "delta":
        return s5.init_state(params, batch_shape, dtype=dtype)
    _s7_full.check("s7.init_state", params)
    real = compute_dtype(params) if dtype is None else torch.promote_types(dtype, torch.float32)
    return zero_state(params["base"].to(real), batch_shape, params["base"].shape)


def discretize(
    params: Params,
    u: Tensor,
    *,
    variant: Variant = "delta",
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    clip_eigs: bool = False,
) -> Discrete:
    """Return (A_bar, B_bar) for the input u of the model.

    delta: (..., L, P_h) and (..., L, P_h, H), complex. full: (..., L, N) and B_t^T (..., L, N, H),
    which acts on in_proj(u). `scan` never forms B_bar for a whole sequence; this is for looking at
    what the model does.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        variant: as in `init`.
        integration_timesteps: delta: (..., L), time elapsed before each sample; multiplies Delta.
        timestep_mode: see `scan`.
        discretization: see `scan`.
        alpha: the number of ``gbt``.
        dt_scale: delta: multiplies the step.
        clip_eigs: delta: hold Re Lambda at most -1e-4.

    Raises:
        ValueError: as `scan`.
    """
    where = "s7.discretize"
    options = _options(
        where, params, variant, integration_timesteps, timestep_mode, discretization, alpha,
        dt_scale, True, clip_eigs,
    )  # fmt: skip
    seq = _layout(where, params, u, integration_timesteps=integration_timesteps)
    if options is None:
        return _s7_full.discretize(params, u)
    dtype = compute_dtype(params, u, seq.timesteps)
    r = _s7_delta.recurrence(where, params, u, dtype, seq.timesteps, options)
    return r.A_bar, r.B_bar()


def scan(
    params: Params,
    u: Tensor,
    state: Tensor | None = None,
    *,
    variant: Variant = "delta",
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    conj_sym: bool = True,
    bidirectional: bool = False,
    clip_eigs: bool = False,
    chunk_size: int | None = None,
    mode: Mode = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the model over a sequence.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        state: the state before the first sample, (..., P_h) complex for delta, (..., N) real for
            full; zeros if None.
        variant: as in `init`.
        integration_timesteps: delta: (..., L), time elapsed before each sample; multiplies Delta.
        timestep_mode: delta: whether in decay and input gain (``both``: a gap of zero drops the
            sample's input except under ``dirac``) or in the decay alone (``state_only``).
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, clear the state before that sample.
        discretization: delta: ``zoh`` (default), ``bilinear``, ``gbt``, ``euler``, ``dirac``,
            ``mamba``, ``async``, or a callable. full: ``none``, the only one there is.
        alpha: the number of ``gbt``.
        dt_scale: delta: multiplies the step.
        conj_sym: delta: as in `init`.
        bidirectional: add the reverse direction; both count the current sample. delta: the same
            recurrence, read with C2; full: its own matrices, summed in front of the gate.
        clip_eigs: delta: hold Re Lambda at most -1e-4.
        chunk_size: full: samples, of batch and time together, whose B_t or C_t are in memory at
            once; changes memory and speed, not results. None: 256 on a CPU, elsewhere what 64 MiB
            hold, and where a CUDA kernel runs none are.
        mode: ``scan`` (``auto`` is the same) or ``recurrent`` (a loop, the specification).

    Returns:
        y (..., L, H) in u's dtype, without a residual, and the final state, at least float32 and
        of the forward direction if there are two.

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state with
            ``bidirectional``; an option of the other variant, above all ``integration_timesteps``
            or ``dt_scale`` with ``full``: A_bar there may be negative, and has no power for a gap.

    Source: Soydan et al. 2024, arXiv:2410.03464.
    """
    where = "s7.scan"
    options = _options(
        where, params, variant, integration_timesteps, timestep_mode, discretization, alpha,
        dt_scale, conj_sym, clip_eigs,
    )  # fmt: skip
    check_choice(where, "mode", mode, MODES)
    if chunk_size is not None:
        check_sizes(where, chunk_size=chunk_size)
    if variant == "delta":
        _unused(where, "full", chunk_size=(chunk_size, None))
    seq = _layout(
        where, params, u, lengths=lengths, mask=mask, reset=reset,
        integration_timesteps=integration_timesteps,
    )  # fmt: skip
    valid = seq.valid(u.shape[-2])
    # The matrices come from u: what stands in padding must not even reach a product with zero.
    x = u if valid is None else torch.where(valid.unsqueeze(-1), u, torch.zeros_like(u))
    if options is None:
        return _s7_full.scan(
            where, params, x, state, seq, chunk_size=chunk_size, recurrent=mode == "recurrent",
            bidirectional=bidirectional,
        )  # fmt: skip

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        return _s7_delta.sequence(where, params, x, dtype, timesteps, options)

    def flipped(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        return _s7_delta.sequence(where, params, x.flip(-2), dtype, timesteps, options)

    return _mimo.scan(
        where, params, x, state, recurrence, layout=seq, mode=mode,
        scale=2.0 if conj_sym else 1.0, bidirectional=bidirectional, kernel=None, flipped=flipped,
    )  # fmt: skip


def step(
    params: Params,
    u_t: Tensor,
    state: Tensor,
    *,
    variant: Variant = "delta",
    integration_timestep: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Discretization | None = None,
    alpha: Number | None = None,
    dt_scale: Number = 1.0,
    conj_sym: bool = True,
    clip_eigs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Take one step.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: from `init_state`, `scan` or `step`.
        variant: as in `init`.
        integration_timestep: delta: (...), time elapsed since the previous sample.
        timestep_mode: see `scan`.
        discretization: see `scan`.
        alpha: see `scan`.
        dt_scale: see `scan`.
        conj_sym: as in `init`.
        clip_eigs: see `scan`.

    Returns:
        y_t (..., H) in u_t's dtype and the new state.

    Raises:
        ValueError: as `scan`.
    """
    where = "s7.step"
    options = _options(
        where, params, variant, integration_timestep, timestep_mode, discretization, alpha,
        dt_scale, conj_sym, clip_eigs,
    )  # fmt: skip
    width = params["B_re" if variant == "delta" else "in_proj.weight"]
    check_input(where, u_t, width.shape[1], width, rank=1, shape="(..., H)")
    if options is None:
        v = _projected.linear(params, "in_proj", u_t)
        y, state = _s7_full.step(where, params, v, state)
        return _s7_full.gate(params, y).to(u_t.dtype), state
    check_timestep(where, integration_timestep, u_t)

    def recurrence(dtype: torch.dtype, timesteps: Tensor | None) -> _mimo.Recurrence | _mimo.Flow:
        return _s7_delta.sequence(where, params, u_t, dtype, integration_timestep, options)

    return _mimo.step(where, params, u_t, state, recurrence, scale=2.0 if conj_sym else 1.0)


def _layout(where: str, params: Params, u: Tensor, **sequence: Tensor | None) -> Layout:
    """Check u and its sequence arguments."""
    like = params["B_re"] if "B_re" in params else params["in_proj.weight"]
    check_input(where, u, like.shape[1], like, rank=2, shape="(..., L, H)")
    return layout(where, u, **sequence)


def _options(
    where: str,
    params: Params,
    variant: Variant,
    timesteps: Tensor | None,
    timestep_mode: TimestepMode,
    discretization: Discretization | None,
    alpha: Number | None,
    dt_scale: Number,
    conj_sym: bool,
    clip_eigs: bool,
) -> _s7_delta.Options | None:
    """Check the choices of a call; bundle those of ``delta``, return None for ``full``."""
    check_choice(where, "variant", variant, ("delta", "full"))
    if variant == "delta":
        scheme = "zoh" if discretization is None else discretization
        options = _s7_delta.Options(scheme, timestep_mode, alpha, dt_scale, clip_eigs)
        _s7_delta.check(where, params, options)
        return options
    _s7_full.check(where, params)
    check_choice(where, "timestep_mode", timestep_mode, ("both", "state_only"))
    check_choice(where, "discretization", discretization or "none", ("none",))
    if timesteps is not None:
        raise ValueError(
            f"{where}: variant='full' takes no integration_timesteps: its A_bar, in [-1, 1), may "
            "be negative and has no power for a gap; use variant='delta'"
        )
    _unused(
        where, "delta", timestep_mode=(timestep_mode, "both"), alpha=(alpha, None),
        dt_scale=(dt_scale, 1.0), conj_sym=(conj_sym, True), clip_eigs=(clip_eigs, False),
    )  # fmt: skip
    return None


def _unused(where: str, variant: Variant, **given: tuple[object, object]) -> None:
    """Raise if an option of the other variant differs from its default."""
    for name, (value, default) in given.items():
        if isinstance(value, Tensor) or value != default:
            raise ValueError(f"{where}: {name} belongs to variant={variant!r}")
