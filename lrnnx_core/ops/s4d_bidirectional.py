# SPDX-License-Identifier: MIT
"""The scan of a bidirectional S4D in one operator: both directions of `s4d_scan`.

    y_t = Re sum_n v_n s_{t,n} + Re sum_n w_n r_{t+1,n} + D u_t,
    s_t = a s_{t-1} + u_t,   r_t = a r_{t+1} + u_t

The second direction runs over the samples from the second on, as they lie, and adds to the outputs
one sample before: no sequence is flipped or moved. The leaves are those of `s4d_scan`, whose
backends they share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_s4d, cuda_s4d, library
from lrnnx_core.backends.transforms import allow_in_graph, differentiation_depth, full_precision
from lrnnx_core.ops._fused import Signature, fused
from lrnnx_core.ops.s4d_scan import prepare, s4d_scan
from lrnnx_core.sequences import valid_mask


def s4d_bidirectional(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    w: Tensor,
    D: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y_t and the last state of the direction of time.

    Args:
        u: (..., L, H), zero from ``lengths`` on.
        a: (H, M), the decays, as all else in `s4d_scan`.
        v: (H, M), C_n B_n of the direction of time.
        w: (H, M), C_n B_n of the other one.
        D: (H,).
        lengths: (...).
        reset: (..., L) bool, where a document starts; no direction reads across.

    Returns:
        y (..., L, H), zero from ``lengths`` on, and the last state (..., H, M).
    """
    dtype = u.dtype
    with full_precision(u.device):
        u, a, v, D, lengths, reset = prepare(u, a, v, D, lengths, reset)
        w = (w.real if w.is_complex() and not a.is_complex() else w).to(a.dtype)
        y, last = _s4d_bidirectional(u, a, v, w, D, lengths, reset)
        if lengths is not None:
            y = torch.where(valid_mask(lengths, y.shape[-2]).unsqueeze(-1), y, torch.zeros_like(y))
    return y.to(dtype), last


def _composite(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    w: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compose the operator of differentiable pieces: right to any order."""
    y, last = s4d_scan(u, a, v, D, lengths=lengths, reset=reset)
    later, ends, opening = _shifted(u, reset)
    if later.shape[-2]:
        ends = None if ends is None else ends.flip(-1)
        y2 = s4d_scan(later.flip(-2), a, w, reset=ends)[0].flip(-2)
        y2 = y2 if opening is None else y2.masked_fill(opening, 0)
        y = y + torch.cat([y2, torch.zeros_like(y[..., :1, :])], dim=-2)
    return y, last


def _shifted(u: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what the second direction has of its own.

    Returns:
        The samples from the second on; where a document ends among them; and (..., L - 1, 1), which
        of them start one, so that the sample before has none after it.
    """
    later = u[..., 1:, :]
    if reset is None:
        return later, None, None
    ends = torch.cat([reset[..., 2:], torch.zeros_like(reset[..., :1])], dim=-1)
    return later, ends[..., : later.shape[-2]], reset[..., 1:].unsqueeze(-1)


def _default(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    w: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Leaf: y, the last state, and what `s4d_scan` keeps of both directions."""
    scan = torch.ops.lrnnx_core.s4d_scan.default
    with full_precision(u.device):
        y, last, kept = scan(u, a, v, D, lengths, reset, keep, False)
        later, ends, opening = _shifted(u, reset)
        y2, _, kept2 = scan(later, a, w, None, None, ends, keep, True)
        if opening is not None:
            y2.masked_fill_(opening, 0)
        y[..., :-1, :].add_(y2)
    return y, last, kept, kept2


def _default_backward(
    kept: Tensor,
    kept2: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    a: Tensor,
    v: Tensor,
    w: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, ...]:
    scan = torch.ops.lrnnx_core.s4d_scan_backward.default
    with full_precision(u.device):
        du, da, dv, dD = scan(kept, grad_y, grad_last, u, a, v, D, lengths, reset, False)
        later, ends, opening = _shifted(u, reset)
        g = grad_y[..., :-1, :]
        g = g if opening is None else g.masked_fill(opening, 0)
        end = torch.zeros_like(grad_last)
        du2, da2, dw, _ = scan(kept2, g, end, later, a, w, None, None, ends, True)
        du[..., 1:, :].add_(du2)
        da.add_(da2)
    return du, da, dv, dw, dD


def _fake(u: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, (H, M) = u.shape[:-2], a.shape[-2:]

    def kept(steps: int) -> Tensor:
        chunks = -(-steps // blocked_s4d.chunk_length(M)) if rest[-1] else 0
        return u.new_empty((*batch, chunks * H * M), dtype=a.dtype)

    length = u.shape[-2]
    return (
        u.new_empty(u.shape),
        a.new_empty(*batch, H, M),
        kept(length),
        kept(max(length - 1, 0)),
    )


def _fake_backward(
    kept: Tensor, kept2: Tensor, grad_y: Tensor, grad_last: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    absent = grad_y.new_empty(0)
    return tuple(absent if t is None else t.new_empty(t.shape) for t in rest[:5])


_ARGUMENTS = "Tensor u, Tensor a, Tensor v, Tensor w, Tensor? D, Tensor? lengths, Tensor? reset"
_leaf = library.define(
    f"s4d_bidirectional({_ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    default=_default,
    fake=_fake,
)
_leaf_backward = library.define(
    "s4d_bidirectional_backward(Tensor kept, Tensor kept2, Tensor grad_y, Tensor grad_last, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_default_backward,
    fake=_fake_backward,
)
_apply = fused(
    _leaf,
    _leaf_backward,
    _composite,
    Signature(tensors=7, differentiable=5, choices=0, outputs=2, remembered=(2, 3), passing=1),
)


def _s4d_bidirectional(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    w: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # without a backward to come, nothing is kept for it
    keep = cuda_s4d.keeps(u, a) and (torch.is_grad_enabled() or differentiation_depth() > 0)
    y, last = _apply(u, a, v, w, D, lengths, reset, keep)
    return y, last


allow_in_graph(_s4d_bidirectional)
