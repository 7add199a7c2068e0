# SPDX-License-Identifier: MIT
"""The selective scan of Mamba (S6): a diagonal recurrence whose steps and matrices vary in time.

By `lrnnx_core.ops._fused`: one forward and one backward leaf hold the values and the first
derivatives, and where more is asked for a composite of differentiable pieces runs instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_selective, cpu, cuda_selective_scan, library, reference
from lrnnx_core.backends.blocked_selective import Arguments
from lrnnx_core.backends.transforms import (
    allow_in_graph,
    differentiation_depth,
    full_precision,
)
from lrnnx_core.discretize import FUSED, SCHEMES, resolve
from lrnnx_core.ops._fused import Signature, fused
from lrnnx_core.ops.linear_scan import linear_scan
from lrnnx_core.types import Backend, Discretization, Number, Scheme, TimestepMode


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    decay_dt: Tensor | None = None,
    softplus: bool = False,
    discretization: Discretization = "mamba",
    alpha: Number | None = None,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    reset: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute h_t = A_bar_t h_{t-1} + gamma_t B_t u_t and y_t = (sum_n C_t h_t + D u_t) silu(z_t).

    (A_bar_t, gamma_t) is the discretization of A with the step delta_t = dt_t + dt_bias, or its
    softplus. For complex A every stored state stands for a conjugate pair: y takes 2 Re(sum_n C h).

    Args:
        u: (..., L, E), the input, real.
        dt: (..., L, E), the step before bias and softplus.
        A: (E, N), the diagonal of each channel's state matrix, real or complex.
        B: (..., L, N); (..., L, G, N) where channel d belongs to group d // (E/G); or (E, N)
            constant in time (with a u without batch axes (1, E, N), as (E, N) reads as (L, N)).
        C: the same forms as B, not necessarily the same one.
        D: (E,), the direct path.
        z: (..., L, E), the gate.
        dt_bias: (E,).
        h0: (..., E, N), the state before the first step; zeros if None.
        decay_dt: (E,) or (..., L, E), replaces delta in the decay (STREAM); not passed through
            bias and softplus.
        softplus: whether delta = softplus(dt + dt_bias).
        discretization: ``mamba``, ``zoh``, ``bilinear``, ``dirac`` (fused); ``async``, ``gbt``,
            ``euler`` or a callable (composed of differentiable pieces, memory L E N).
        alpha: the number of ``gbt``.
        integration_timesteps: (..., L), multiplies the step.
        timestep_mode: whether in decay and input (``both``) or in the decay (``state_only``).
        reset: (..., L) bool, clear the state before that step.
        backend: ``"auto"``, or ``"reference"`` for the plain differentiable loop.

    Returns:
        y (..., L, E) in u's dtype, and the last state (..., E, N), at least float32.

    Raises:
        ValueError: shapes that do not fit, groups that do not divide E, a dtype that is not
            floating, tensors on different devices, an unknown choice.

    Source: Gu & Dao 2023 (Mamba), arXiv:2312.00752, section 3 and algorithm 2.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"selective_scan: backend {backend!r}, expected 'auto' or 'reference'")
    if discretization == "none":
        raise ValueError("selective_scan: discretization 'none' has no use for dt")
    scheme, timestep_mode = resolve(discretization, timestep_mode, alpha, where="selective_scan")
    name = discretization if isinstance(discretization, str) else ""  # of a callable there is none
    name = "zoh" if name == "async" else name
    arguments = _prepare(
        Arguments(
            u, dt, A, B, C, D, z, dt_bias, h0, decay_dt, integration_timesteps, reset,
            softplus, timestep_mode == "state_only", name,
        )
    )  # fmt: skip
    with full_precision(u.device):
        if backend == "reference":
            return reference.selective_scan(*arguments[:-1], scheme)
        if name not in FUSED:
            return _composite(arguments, scheme)
        return _selective_scan(*arguments)


def _prepare(x: Arguments) -> Arguments:
    """Check the arguments and bring them to the ranks of the leaf operator, as views."""
    u, A = x.u, x.A
    if u.ndim < 2 or A.ndim != 2:
        raise ValueError(
            f"selective_scan: u {tuple(u.shape)} and A {tuple(A.shape)}, expected (..., L, E) "
            "and (E, N)"
        )
    _check_kinds(x)
    length, width, states = u.shape[-2], u.shape[-1], A.shape[-1]
    decay = x.decay_dt
    if decay is not None and decay.ndim == 1:
        decay = decay.unsqueeze(0)
    B, C = _matrix("B", x.B, u, states), _matrix("C", x.C, u, states)
    x = Arguments(u, x.dt, A, B, C, x.D, x.z, x.dt_bias, x.h0, decay, *x[10:])
    for name, value, shape in (
        ("A", A, (width, states)), ("D", x.D, (width,)), ("dt_bias", x.dt_bias, (width,)),
    ):  # fmt: skip
        if value is not None and value.shape != shape:
            raise ValueError(f"selective_scan: {name} {tuple(value.shape)}, expected {shape}")
    sequence = (length, width)
    ends = (
        ("u", u, sequence), ("dt", x.dt, sequence), ("z", x.z, sequence),
        ("B", B, (_time(B, 3, length), B.shape[-2], states)),
        ("C", C, (_time(C, 3, length), C.shape[-2], states)), ("h0", x.h0, (width, states)),
        ("decay_dt", decay, sequence if decay is None else (_time(decay, 2, length), width)),
        ("timesteps", x.timesteps, (length,)), ("reset", x.reset, (length,)),
    )  # fmt: skip
    leads: dict[str, torch.Size] = {}
    for name, value, end in ends:
        if value is None:
            continue
        split = value.ndim - len(end)
        if split < 0 or value.shape[split:] != end:
            raise ValueError(
                f"selective_scan: {name} {tuple(value.shape)} does not fit u {tuple(u.shape)} "
                f"and A {tuple(A.shape)}"
            )
        leads[name] = value.shape[:split]
    try:  # broadcast_shapes takes as long as the rest of this function
        alike = all(lead == leads["u"] for lead in leads.values())
        batch = leads["u"] if alike else torch.broadcast_shapes(*leads.values())
    except RuntimeError:
        got = ", ".join(f"{n} {tuple(s)}" for n, s in leads.items())
        raise ValueError(f"selective_scan: batch axes do not broadcast: {got}") from None
    if alike:
        return x
    wide = {
        name: getattr(x, name).expand(*batch, *getattr(x, name).shape[len(lead) :])
        for name, lead in leads.items()
        if lead != batch
    }
    return x._replace(**wide)


def _time(value: Tensor, axis: int, length: int) -> int:
    """Return the length that the time axis (from the end) must have: 1 is constant in time."""
    return 1 if value.ndim >= axis and value.shape[-axis] == 1 else length


def _check_kinds(x: Arguments) -> None:
    """Raise unless devices agree and dtypes are floating (complex where A allows it)."""
    for name, value in zip(Arguments._fields, x, strict=True):
        if not isinstance(value, Tensor):
            continue
        if value.device != x.u.device:
            raise ValueError(f"selective_scan: {name} is on {value.device} and u on {x.u.device}")
        complex_ok = name == "A" or (name in ("B", "C", "h0") and x.A.is_complex())
        right = value.is_floating_point() or (complex_ok and value.is_complex())
        if name == "reset":
            right = value.dtype == torch.bool
        if not right:
            raise ValueError(f"selective_scan: {name} has dtype {value.dtype}, with A {x.A.dtype}")


def _matrix(name: str, value: Tensor, u: Tensor, states: int) -> Tensor:
    """Bring B or C to (..., L or 1, G, N)."""
    length, width = u.shape[-2:]
    if value.ndim < 2 or value.shape[-1] != states:
        raise ValueError(
            f"selective_scan: {name} {tuple(value.shape)}, expected N = {states} at axis -1"
        )
    if value.ndim == u.ndim + 1:
        grouped = value
    elif value.ndim == u.ndim and value.shape[-2] == length:
        grouped = value.unsqueeze(-2)
    elif value.ndim == 2 and value.shape[0] == width:
        grouped = value.unsqueeze(0)
    else:
        raise ValueError(
            f"selective_scan: {name} {tuple(value.shape)} with u {tuple(u.shape)}, expected "
            "(..., L, N), (..., L, G, N) or a constant (E, N)"
        )
    groups = grouped.shape[-2]
    if groups < 1 or width % groups:
        raise ValueError(f"selective_scan: {groups} groups in {name} do not divide E = {width}")
    return grouped


def _composite(p: Arguments, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Compose the operator of differentiable pieces: right to any order, memory L E N."""
    u, dt, A, B, C, D, z, dt_bias, h0, decay_dt, tau, reset, *_ = p
    real = torch.promote_types(u.dtype, A.real.dtype if A.is_complex() else A.dtype)
    real = reference.state_dtype(real)
    kind = torch.promote_types(real, A.dtype)
    B, C = (_spread(t.to(torch.promote_types(t.dtype, real)), u.shape[-1]) for t in (B, C))
    x = u.to(real)
    delta = dt.to(real) if dt_bias is None else dt.to(real) + dt_bias.to(real)
    delta = torch.nn.functional.softplus(delta) if p.softplus else delta
    decay = delta if decay_dt is None else decay_dt.to(real)
    if tau is not None:
        tau = tau.to(real).unsqueeze(-1)
        decay, delta = tau * decay, delta if p.state_only else tau * delta
    A_bar, gamma = scheme(A.to(kind), decay.unsqueeze(-1), delta.unsqueeze(-1))
    drive = (gamma * B * x.unsqueeze(-1)).to(kind)
    start = None if h0 is None else h0.to(kind).flatten(-2)
    h, last = linear_scan(A_bar.flatten(-2), drive.flatten(-2), start, reset=reset)
    y = (h.reshape(h.shape[:-1] + A.shape) * C).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    y = y if D is None else y + D.to(real) * x
    y = y if z is None else y * torch.nn.functional.silu(z.to(real))
    return y.to(u.dtype), last.reshape(last.shape[:-1] + A.shape)


def _spread(t: Tensor, width: int) -> Tensor:
    """(..., G, N) -> (..., E, N)."""
    return t if t.shape[-2] == width else t.repeat_interleave(width // t.shape[-2], -2)


def _selective_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    # without a backward to come, nothing is kept for it
    keep = torch.is_grad_enabled() or differentiation_depth() > 0
    y, last = _apply(*arguments, keep)
    return y, last


def _named_composite(*arguments: Any) -> tuple[Tensor, Tensor]:
    p = Arguments(*arguments)
    return _composite(p, SCHEMES[p.scheme])


def _shapes(u: Tensor, dt: Tensor, A: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    real = torch.promote_types(u.dtype, A.real.dtype if A.is_complex() else A.dtype)
    kind = torch.promote_types(reference.state_dtype(real), A.dtype)
    return (*u.shape[:-2], *A.shape[-2:]), kind


def _fake(u: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape, kind = _shapes(u, dt, A)
    chunks = -(-u.shape[-2] // blocked_selective.CHUNK) if rest[-1] else 0
    kept = (*u.shape[:-2], chunks * A.shape[-2] * A.shape[-1])
    return u.new_empty(u.shape), u.new_empty(shape, dtype=kind), u.new_empty(kept, dtype=kind)


def _fake_backward(kept: Tensor, gy: Tensor, glast: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors = rest[:11]
    like = [gy.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]
    like[8] = glast.new_empty(glast.shape)
    return tuple(like)


def _default_backward(kept: Tensor, gy: Tensor, glast: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with full_precision(gy.device):  # a backward pass may be run inside of an autocast region
        gradients = blocked_selective.selective_scan_backward(kept, gy, glast, *rest)
    return tuple(gy.new_empty(0) if g is None else g for g in gradients)


_ARGUMENTS = library.parameters(Arguments)
_leaf = library.define(
    f"selective_scan({_ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor)",
    default=blocked_selective.selective_scan,
    fake=_fake,
)
_leaf_backward = library.define(
    f"selective_scan_backward(Tensor checkpoints, Tensor grad_y, Tensor grad_last, {_ARGUMENTS}) "
    f"-> ({', '.join(['Tensor'] * 11)})",
    default=_default_backward,
    fake=_fake_backward,
)
_apply = fused(
    _leaf,
    _leaf_backward,
    _named_composite,
    Signature(tensors=12, differentiable=11, choices=3, outputs=2, remembered=(2,), passing=1),
)
allow_in_graph(_selective_scan)
_CUDA = cuda_selective_scan.implement()
_CPU = cpu.implement("selective_scan", "selective_scan", "selective_scan_backward")
