# SPDX-License-Identifier: MIT
"""Event pooling: one output for every ``stride`` events, of a state that meets them all.

A sequence is cut into groups of ``stride`` events. What does not fill a group waits for the next
chunk, so that any split of a stream gives the same groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lrnnx_core.models import _mimo
from lrnnx_core.models._common import (
    check_choice,
    check_device,
    check_sizes,
    check_state,
    compute_dtype,
    full_precision,
    zero_state,
)
from lrnnx_core.sequences import Compaction, Layout, layout, valid_mask
from lrnnx_core.types import Params

Pooling = Literal["last", "mean", "time_weighted"]
Compat = Literal["event_ssm"]
POOLINGS = get_args(Pooling)
MIN_WEIGHT = 1e-6
"""Added to each gap in the time-weighted mean, so that a group without any has a mean."""


class Pooled(NamedTuple):
    """A pooled sequence: y (..., M, H), its gaps (..., M), and the rows' lengths (...) or None."""

    y: Tensor
    integration_timesteps: Tensor
    lengths: Tensor | None


class Pending(NamedTuple):
    """Events that wait for their group to fill: x (..., w, H) and their gaps (..., w), w < s."""

    x: Tensor
    timesteps: Tensor


class PooledState(NamedTuple):
    """The state of a pooled scan: h (..., P_h), complex, after all whole groups, and the rest."""

    h: Tensor
    pending: Pending


class Groups(NamedTuple):
    """Whole groups: x (..., M s, H) and gaps (..., M s), zero at padding; lengths in groups.

    ``uniform`` says that no gaps were given, so that all are one.
    """

    x: Tensor
    timesteps: Tensor
    lengths: Tensor | None
    pending: Pending
    uniform: bool


def init_pending(like: Tensor, batch_shape: Sequence[int], d_model: int) -> Pending:
    """Return no events, with the dtype and device of ``like``.

    Args:
        like: any tensor.
        batch_shape: leading dimensions.
        d_model: channels H.
    """
    none = zero_state(like, batch_shape, (0,))
    return Pending(zero_state(like, batch_shape, (0, d_model)), none)


def pool(
    x: Tensor,
    state: Pending | None = None,
    *,
    stride: int,
    pooling: Pooling = "last",
    compat: Compat | None = None,
    integration_timesteps: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Pooled, Pending]:
    """Reduce each group of ``stride`` events to one: a skip connection around `pooled_scan`.

    Args:
        x: (..., L, H), real.
        state: what waits from an earlier call; nothing if None.
        stride: s, events a group, at least 1.
        pooling: ``last`` event of the group; ``mean``; ``time_weighted``, the mean with weights
            delta + 1e-6, where delta is the gap before the event.
        compat: ``event_ssm`` takes the first event for ``last``, as the released code does.
        integration_timesteps: (..., L), time elapsed before each event; gaps of one if None.
        lengths: (...), events per row of a right-padded batch.
        mask: (..., L) bool, False is padding, as if it were not there.

    Returns:
        Pooled: y (..., M, H) in x's dtype, integration_timesteps (..., M), the sums over the
        groups, and lengths (...), those given // s, or None; and the events that wait, none with
        lengths or mask. With w events waiting before, M = (w + L) // s.

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit.

    Source: Schoene et al. 2024, arXiv:2404.18508, section 3 (event pooling).
    """
    where = "event_ssm.pool"
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"{where}: x {tuple(x.shape)} {x.dtype}, expected (..., L, H), real and floating"
        )
    check(where, stride, pooling, compat)
    seq = layout(where, x, lengths=lengths, mask=mask, integration_timesteps=integration_timesteps)
    groups = group(where, x, state, seq, stride)
    y = reduce(groups, stride, pooling, compat).to(x.dtype)
    return Pooled(y, gaps(groups, stride), groups.lengths), groups.pending


def scan(
    where: str,
    params: Params,
    u: Tensor,
    state: PooledState | None,
    recurrence: _mimo.Source,
    *,
    layout: Layout,
    stride: int,
    pooling: Pooling,
    compat: Compat | None,
    scale: float,
    recurrent: bool,
) -> tuple[Pooled, PooledState]:
    """Run a model of `_mimo`'s kind over the groups of u; see `event_ssm.pooled_scan`."""
    check(where, stride, pooling, compat)
    if state is not None:
        check_state(where, state.h, u.shape[:-2], params["B_re"].shape[:1], u)
    groups = group(where, u, None if state is None else state.pending, layout, stride)
    with full_precision(u.device):
        dtype = compute_dtype(params, u, None if state is None else state.h)
        timesteps = None if groups.uniform else groups.timesteps
        whole = None if groups.lengths is None else groups.lengths * stride
        h, last = _mimo.states(
            recurrence(dtype, timesteps), groups.x.to(dtype), None if state is None else state.h,
            Layout(whole, None, None, timesteps), loop=recurrent,
        )  # fmt: skip
        read = h[..., _index(stride, compat) :: stride, :]
        x = reduce(groups, stride, pooling, compat, dtype)
        y = _mimo.read(params, "C", read, scale) + _mimo.feedthrough(params, x)
        if groups.lengths is not None:
            valid = valid_mask(groups.lengths, y.shape[-2]).unsqueeze(-1)
            y = torch.where(valid, y, torch.zeros_like(y))
    pooled = Pooled(y.to(u.dtype), gaps(groups, stride), groups.lengths)
    return pooled, PooledState(last, groups.pending)


def check(where: str, stride: int, pooling: Pooling, compat: Compat | None) -> None:
    """Raise unless these describe a pooling."""
    check_sizes(where, stride=stride)
    check_choice(where, "pooling", pooling, POOLINGS)
    check_choice(where, "compat", compat, (None, *get_args(Compat)))


def group(where: str, x: Tensor, before: Pending | None, seq: Layout, stride: int) -> Groups:
    """Cut what waits and x (..., L, H) into whole groups; close the holes of a mask."""
    waiting = 0
    if before is not None:
        waiting = _check_pending(where, before, x, stride)
    batch, length, lengths = x.shape[:-2], x.shape[-2], seq.lengths
    uniform = seq.timesteps is None and not waiting
    if seq.timesteps is None:
        time = x.new_ones((), dtype=torch.promote_types(x.dtype, torch.float32))
    else:
        time = seq.timesteps.to(torch.promote_types(seq.timesteps.dtype, torch.float32))
    time = time.expand(*batch, length)
    valid = seq.valid(length)
    if seq.mask is not None and valid is not None:
        closing = Compaction.of(valid.expand(*batch, length))
        x, time, lengths = closing.close(x), closing.close(time), closing.lengths
    if before is not None:
        x, time = torch.cat([before.x, x], dim=-2), torch.cat([before.timesteps, time], dim=-1)
    whole = (waiting + length) // stride * stride
    rest = x[..., whole:, :], time[..., whole:]
    x, time = x[..., :whole, :], time[..., :whole]
    if lengths is not None:
        lengths = (lengths + waiting) // stride
        kept = valid_mask(lengths * stride, whole)
        x = torch.where(kept.unsqueeze(-1), x, torch.zeros_like(x))
        time = torch.where(kept, time, torch.zeros_like(time))
        rest = rest[0][..., :0, :], rest[1][..., :0]
    pending = Pending(rest[0].clone(), rest[1].clone())  # no view that keeps the sequence alive
    return Groups(x, time, lengths, pending, uniform)


def reduce(
    groups: Groups,
    stride: int,
    pooling: Pooling,
    compat: Compat | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return one vector a group, (..., M, H), at least float32."""
    wide = torch.promote_types(groups.x.dtype, torch.float32) if dtype is None else dtype
    x = groups.x.to(wide).unflatten(-2, (groups.x.shape[-2] // stride, stride))
    if pooling == "last":
        return x[..., _index(stride, compat), :]
    if pooling == "mean":
        return x.mean(-2)
    weight = _grouped(groups, stride).to(wide).unsqueeze(-1) + MIN_WEIGHT
    return (weight * x).sum(-2) / weight.sum(-2)


def gaps(groups: Groups, stride: int) -> Tensor:
    """Return the time that elapsed over each group, (..., M)."""
    return _grouped(groups, stride).sum(-1)


def _grouped(groups: Groups, stride: int) -> Tensor:
    return groups.timesteps.unflatten(-1, (groups.timesteps.shape[-1] // stride, stride))


def _index(stride: int, compat: Compat | None) -> int:
    """Return which event of a group is read."""
    return stride - 1 if compat is None else 0


def _check_pending(where: str, pending: Pending, x: Tensor, stride: int) -> int:
    """Return how many events wait; raise unless they fit x and the stride."""
    waiting = pending.timesteps.shape[-1] if pending.timesteps.ndim else 0
    batch, width = x.shape[:-2], x.shape[-1]
    shapes = (*batch, waiting, width), (*batch, waiting)
    if (tuple(pending.x.shape), tuple(pending.timesteps.shape)) != shapes or waiting >= stride:
        raise ValueError(
            f"{where}: waiting are x {tuple(pending.x.shape)} and timesteps "
            f"{tuple(pending.timesteps.shape)}, expected {(*batch, 'w', width)} and "
            f"{(*batch, 'w')} with w < stride = {stride}"
        )
    check_device(where, "what waits", pending.x, x)
    return waiting
