# SPDX-License-Identifier: MIT
"""The scan of S4D: a diagonal state for each channel, summed to one output as it goes.

No state is written but the last one, and no convolution kernel is made: beside input and output the
operator needs memory for one state every `blocked_s4d.chunk_length` samples, and only where a
gradient is to come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_s4d, cpu, cuda_s4d, library, reference
from lrnnx_core.backends.transforms import allow_in_graph, differentiation_depth, full_precision
from lrnnx_core.ops._fused import Signature, fused
from lrnnx_core.ops.linear_scan import linear_scan
from lrnnx_core.sequences import valid_mask
from lrnnx_core.types import Backend


def s4d_scan(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute s_t = a s_{t-1} + u_t from a zero state, and y_t = Re sum_n v_n s_{t,n} + D u_t.

    Args:
        u: (..., L, H), real, the input of each channel.
        a: (H, M), real or complex, the decays of its states.
        v: (H, M), real or complex: C_n B_n, and for halves of conjugate pairs a factor 2 in it.
        D: (H,), real, the direct path; zeros if None.
        lengths: (...), integer: the state of a row stops after that many samples.
        reset: (..., L) bool, clear the state before that step.
        backend: ``"auto"``, or ``"reference"`` for the plain differentiable loop.

    Returns:
        y (..., L, H) in u's dtype, zero from ``lengths`` on, and the last state (..., H, M) in the
        dtype of a and v, at least float32 or complex64.

    Raises:
        ValueError: shapes that do not fit, a wrong dtype, tensors on different devices, an unknown
            backend.

    Source: Gu et al. 2022 (S4D), arXiv:2206.11893, section 3.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"s4d_scan: backend {backend!r}, expected 'auto' or 'reference'")
    dtype = u.dtype
    with full_precision(u.device):
        u, a, v, D, lengths, reset = prepare(u, a, v, D, lengths, reset)
        if backend == "reference":
            y, last = _composite(u, a, v, D, lengths, reset, backend=backend)
        else:
            y, last = _s4d_scan(u, a, v, D, lengths, reset)
        if lengths is not None:
            y = torch.where(valid_mask(lengths, y.shape[-2]).unsqueeze(-1), y, torch.zeros_like(y))
    return y.to(dtype), last


def prepare(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Check the arguments and bring them to the ranks and dtypes of the leaf operator."""
    if u.ndim < 2 or a.ndim != 2 or a.shape != v.shape or u.shape[-1] != a.shape[0]:
        raise ValueError(
            f"s4d_scan: u {tuple(u.shape)}, a {tuple(a.shape)} and v {tuple(v.shape)}, expected "
            "(..., L, H), (H, M) and (H, M)"
        )
    length = u.shape[-2]
    if D is not None and D.shape != a.shape[:1]:
        raise ValueError(f"s4d_scan: D {tuple(D.shape)}, expected {tuple(a.shape[:1])}")
    given = {"u": u, "a": a, "v": v, "D": D, "lengths": lengths, "reset": reset}
    for name, value in given.items():
        if value is None:
            continue
        if value.device != u.device:
            raise ValueError(f"s4d_scan: {name} is on {value.device} and u on {u.device}")
        if name == "reset":
            right, expected = value.dtype == torch.bool, "bool"
        elif name == "lengths":
            right = value.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
            expected = "an integer one"
        else:
            right = value.is_floating_point() or (name in "av" and value.is_complex())
            expected = "a floating or complex one" if name in "av" else "a real floating one"
        if not right:
            raise ValueError(f"s4d_scan: {name} has dtype {value.dtype}, expected {expected}")
    if reset is not None and reset.shape[-1:] != (length,):
        raise ValueError(f"s4d_scan: reset {tuple(reset.shape)}, expected (..., {length})")
    batches = [u.shape[:-2]]
    batches += [] if lengths is None else [lengths.shape]
    batches += [] if reset is None else [reset.shape[:-1]]
    try:  # torch.broadcast_shapes takes as long as the rest of this function
        batch = batches[0] if len(set(batches)) == 1 else torch.broadcast_shapes(*batches)
    except RuntimeError:
        got = ", ".join(
            f"{n} {tuple(t.shape)}" for n, t in given.items() if n not in "avD" and t is not None
        )
        raise ValueError(f"s4d_scan: batch axes do not broadcast: {got}") from None
    if v.is_complex() and not a.is_complex():
        v = v.real  # real states: the imaginary part reaches no output
    kind = torch.promote_types(torch.promote_types(a.dtype, v.dtype), torch.float32)
    kind = torch.promote_types(kind, u.dtype)
    kind = kind if D is None else torch.promote_types(kind, D.dtype)
    real = torch.float64 if kind in (torch.complex128, torch.float64) else torch.float32
    u = u.to(real) if real != reference.state_dtype(u.dtype) else u
    if lengths is not None:
        lengths = lengths.to(torch.int64).clamp(0, length).expand(batch)
    return (
        u.expand(*batch, *u.shape[-2:]),
        a.to(kind),
        v.to(kind),
        None if D is None else D.to(real),
        lengths,
        None if reset is None else reset.expand(*batch, length),
    )


def _composite(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compose the operator of differentiable pieces: right to any order, memory L H M."""
    length, A = u.shape[-2], a.flatten(-2).unsqueeze(-2)
    b = u.to(A.dtype).unsqueeze(-1).expand(*u.shape, a.shape[-1]).flatten(-2)
    if lengths is not None:
        # a = 1 with no input leaves the state alone
        counted = valid_mask(lengths, length).unsqueeze(-1)
        A = torch.where(counted, A, torch.ones_like(A))
        b = torch.where(counted, b, torch.zeros_like(b))
        if reset is not None:
            reset = reset & counted.squeeze(-1)
    h, last = linear_scan(A, b, reset=reset, backend=backend)
    y = (h.unflatten(-1, a.shape) * v).sum(-1)
    y = y.real if y.is_complex() else y
    y = y if D is None else y + D * u
    return y.to(u.dtype), last.unflatten(-1, a.shape)


def _fake(u: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep = rest[4]
    batch, (H, M) = u.shape[:-2], a.shape[-2:]
    chunks = -(-u.shape[-2] // blocked_s4d.chunk_length(M)) if keep else 0
    return u.new_empty(u.shape), a.new_empty(*batch, H, M), a.new_empty(*batch, chunks * H * M)


def _fake_backward(
    kept: Tensor, grad_y: Tensor, grad_last: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    absent = grad_y.new_empty(0)
    return tuple(absent if t is None else t.new_empty(t.shape) for t in rest[:4])


def _default(*arguments: Any) -> tuple[Tensor, ...]:
    with full_precision(arguments[0].device):
        return blocked_s4d.s4d_scan(*arguments)


def _default_backward(*arguments: Any) -> tuple[Tensor, ...]:
    with full_precision(arguments[0].device):  # it may be run inside of an autocast region
        return blocked_s4d.s4d_scan_backward(*arguments)


_ARGUMENTS = "Tensor u, Tensor a, Tensor v, Tensor? D, Tensor? lengths, Tensor? reset"
_leaf = library.define(
    f"s4d_scan({_ARGUMENTS}, bool keep, bool reverse=False) -> (Tensor, Tensor, Tensor)",
    default=_default,
    fake=_fake,
)
_leaf_backward = library.define(
    f"s4d_scan_backward(Tensor kept, Tensor grad_y, Tensor grad_last, {_ARGUMENTS}, "
    "bool reverse=False) -> (Tensor, Tensor, Tensor, Tensor)",
    default=_default_backward,
    fake=_fake_backward,
)
_apply = fused(
    _leaf,
    _leaf_backward,
    _composite,
    Signature(tensors=6, differentiable=4, choices=0, outputs=2, remembered=(2,), passing=1),
)


def _s4d_scan(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # without a backward to come, nothing is kept for it
    keep = cuda_s4d.keeps(u, a) and (torch.is_grad_enabled() or differentiation_depth() > 0)
    y, last = _apply(u, a, v, D, lengths, reset, keep)
    return y, last


allow_in_graph(_s4d_scan)
_CUDA = cuda_s4d.implement()
_CPU = cpu.implement("s4d_scan", "s4d_scan", "s4d_scan_backward")
