# SPDX-License-Identifier: MIT
"""The scan of a diagonal complex state on real halves: the middle of S5, LRU and Event-SSM.

Between two real matrix products, of u with [B_re; B_im]^T and of the states with [C_re; -C_im]^T,
no complex tensor as long as the sequence is made, and decay and input gain are formed from A, the
step and the elapsed time as the scan goes. It is the shortest example of an operator by `fused`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_diagonal, cpu, cuda_diagonal, library, reference
from lrnnx_core.backends.blocked_diagonal import Arguments
from lrnnx_core.backends.transforms import allow_in_graph, full_precision
from lrnnx_core.discretize import FUSED, SCHEMES
from lrnnx_core.ops._fused import Signature, fused
from lrnnx_core.ops.linear_scan import linear_scan
from lrnnx_core.types import Backend, TimestepMode

NAMES = ("none", *FUSED)


def diagonal_scan(
    x: Tensor,
    A: Tensor,
    dt: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    discretization: str = "none",
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute h_t = a_t h_{t-1} + gamma_t x_t over complex states stored as [re | im] halves.

    Args:
        x: (..., L, 2S), real, the drive: S real parts and then S imaginary ones.
        A: (S,), complex: the decay itself under ``none``, else the continuous state matrix.
        dt: (S,), or (..., L, S) where it varies; the step, 1 if None.
        h0: (..., S) complex, the state before the first step; zeros if None.
        discretization: ``none`` (a = A, gamma = 1), ``zoh``, ``bilinear``, ``dirac`` or ``mamba``,
            which give a_t and gamma_t from A and the step.
        integration_timesteps: (..., L), time elapsed before each sample, multiplies the step.
        timestep_mode: whether in decay and gain (``both``) or in the decay (``state_only``).
        reset: (..., L) bool, clear the state before that step.
        mask: (..., L) bool, False is padding: h_t = h_{t-1}.
        reverse: run from the last step to the first: h_t follows h_{t+1}, h0 is the state after the
            last step, and a reset clears the state before its own step in that order.
        backend: ``"auto"``, or ``"reference"`` for the plain differentiable loop.

    Returns:
        h (..., L, 2S), all states in halves, in x's dtype; the last state run (..., S), complex, at
        least complex64.

    Raises:
        ValueError: shapes that do not fit, a wrong dtype, tensors on different devices, an unknown
            choice, a step or timesteps with ``none``.

    Source: Smith et al. 2023 (S5), arXiv:2208.04933, section 3; Orvieto et al. 2023 (LRU),
    arXiv:2303.06349, section 3; Schoene et al. 2024 (Event-SSM), arXiv:2404.18508, section 3.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"diagonal_scan: backend {backend!r}, expected 'auto' or 'reference'")
    if discretization not in NAMES:
        raise ValueError(
            f"diagonal_scan: discretization {discretization!r}, expected one of {NAMES}"
        )
    if timestep_mode not in ("both", "state_only"):
        raise ValueError(
            f"diagonal_scan: timestep_mode {timestep_mode!r}, expected 'both' or 'state_only'"
        )
    if discretization == "none" and not (dt is None and integration_timesteps is None):
        raise ValueError("diagonal_scan: discretization 'none' has no use for dt or timesteps")
    varying = dt is not None and dt.ndim > 1
    steps, dt = (None, dt) if varying else (dt, None)
    with full_precision(x.device):
        arguments = _prepare(
            Arguments(
                x, A, steps, dt, h0, integration_timesteps, reset, mask,
                timestep_mode == "state_only", discretization, reverse,
            )
        )  # fmt: skip
        if backend == "reference":
            h, last = _composite(*arguments, backend=backend)
        else:
            h, last = _diagonal_scan(*arguments)
    return h.to(x.dtype), last


def _prepare(p: Arguments) -> Arguments:
    """Check the arguments and bring them to the ranks and dtypes of the leaf operator."""
    if p.x.ndim < 2 or p.A.ndim != 1 or p.x.shape[-1] != 2 * p.A.shape[-1]:
        raise ValueError(
            f"diagonal_scan: x {tuple(p.x.shape)} and A {tuple(p.A.shape)}, expected (..., L, 2S) "
            "and (S,)"
        )
    length, size = p.x.shape[-2], p.A.shape[0]
    ends = {"x": (length, 2 * size), "dt": (length, size), "h0": (size,)}
    ends |= dict.fromkeys(("timesteps", "reset", "mask"), (length,))
    batches: dict[str, torch.Size] = {}
    for name, value in zip(Arguments._fields, p, strict=True):
        if not isinstance(value, Tensor):
            continue
        _check_kind(name, value, p.x)
        end = ends.get(name, (size,))
        lead = value.shape[: max(value.ndim - len(end), 0)]
        if tuple(value.shape[len(lead) :]) != end or (name not in ends and lead):
            shape = str(end if name not in ends else ("...", *end)).replace("'", "")
            label = "dt" if name == "steps" else name
            raise ValueError(f"diagonal_scan: {label} {tuple(value.shape)}, expected {shape}")
        if name in ends:
            batches[name] = lead
    try:  # torch.broadcast_shapes takes as long as the rest of this function
        same = len(set(batches.values())) == 1
        batch = batches["x"] if same else torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        got = ", ".join(f"{n} {tuple(s)}" for n, s in batches.items())
        raise ValueError(f"diagonal_scan: batch axes do not broadcast: {got}") from None
    kind = p.A.dtype
    for value in (p.x, p.steps, p.dt, p.h0):
        kind = kind if value is None else torch.promote_types(kind, value.dtype)
    kind = torch.promote_types(kind, torch.complex64)
    real = torch.float64 if kind == torch.complex128 else torch.float32
    narrow = real if real != reference.state_dtype(p.x.dtype) else p.x.dtype
    dtypes = {"x": narrow, "A": kind, "h0": kind, "reset": torch.bool, "mask": torch.bool}

    def ready(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value, lead = value.to(dtypes.get(name, real)), batches.get(name)
        return value if lead is None or lead == batch else value.expand(*batch, *ends[name])

    return Arguments(*(ready(n, v) for n, v in zip(Arguments._fields, p, strict=True)))


def _check_kind(name: str, value: Tensor, x: Tensor) -> None:
    """Raise unless the device is that of x and the dtype fits the argument."""
    if value.device != x.device:
        raise ValueError(f"diagonal_scan: {name} is on {value.device} and x on {x.device}")
    if name in ("reset", "mask"):
        right, expected = value.dtype == torch.bool, "bool"
    elif name in ("A", "h0"):
        right = value.is_complex() or (name == "h0" and value.is_floating_point())
        expected = "a complex one"
    else:
        right, expected = value.is_floating_point(), "a real floating one"
    if not right:
        raise ValueError(f"diagonal_scan: {name} has dtype {value.dtype}, expected {expected}")


def _composite(*arguments: Any, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Compose the operator of differentiable pieces: right to any order."""
    p = Arguments(*arguments)
    x, A, dt, timesteps, mask = p.x, p.A, p.dt, p.timesteps, p.mask
    size, real = A.shape[-1], A.real.dtype
    b = torch.complex(x[..., :size].to(real), x[..., size:].to(real))
    a = A.unsqueeze(0)
    if mask is not None:  # whatever stands at padding, even NaN, reaches no gradient either
        b = torch.where(mask.unsqueeze(-1), b, torch.zeros_like(b))
    if p.scheme != "none":
        if mask is not None:
            dt = None if dt is None else torch.where(mask.unsqueeze(-1), dt, torch.ones_like(dt))
            if timesteps is not None:
                timesteps = torch.where(mask, timesteps, torch.ones_like(timesteps))
        d = torch.ones_like(A.real) if p.steps is None else p.steps
        d = d.unsqueeze(0) if dt is None else dt
        dd = d if timesteps is None else timesteps.unsqueeze(-1) * d
        a, gamma = SCHEMES[p.scheme](A, dd, d if p.state_only else dd)
        b = gamma * b
    if mask is not None:
        # a = 1 with no input leaves the state alone
        a = torch.where(mask.unsqueeze(-1), a, torch.ones_like(a))
    h, last = linear_scan(a, b, p.h0, reset=p.reset, reverse=p.reverse, backend=backend)
    return torch.cat([h.real, h.imag], dim=-1).to(x.dtype), last


def _fake(x: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), A.new_empty((*x.shape[:-2], A.shape[-1]))


def _fake_backward(h: Tensor, grad_h: Tensor, grad_last: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    like = [
        grad_last.new_empty(0, dtype=grad_last.real.dtype) if t is None else t.new_empty(t.shape)
        for t in rest[:6]
    ]
    like[4] = grad_last.new_empty(grad_last.shape)
    return tuple(like)


_ARGUMENTS = library.parameters(Arguments)
_leaf = library.define(
    f"diagonal_scan({_ARGUMENTS}) -> (Tensor, Tensor)",
    default=blocked_diagonal.diagonal_scan,
    fake=_fake,
)
_leaf_backward = library.define(
    f"diagonal_scan_backward(Tensor h, Tensor grad_h, Tensor grad_last, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=blocked_diagonal.gradients,
    fake=_fake_backward,
)
_apply = fused(
    _leaf,
    _leaf_backward,
    _composite,
    Signature(tensors=8, differentiable=6, choices=3, outputs=2, remembered=(0,)),
)


def _diagonal_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    h, last = _apply(*arguments)
    return h, last


allow_in_graph(_diagonal_scan)
_CPU = cpu.implement("diagonal_scan", "diagonal_scan", "diagonal_scan_backward")
_CUDA = cuda_diagonal.implement()
