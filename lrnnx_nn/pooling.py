# SPDX-License-Identifier: MIT
"""Pooling over time: groups of samples to one sample each, and whole sequences to one value.

The rules of groups, the same for every pooling:

* A row's valid samples are cut into groups of ``stride`` from its first valid one on. Padding is
  as if it were not there, on either side and in between.
* A last group of fewer than ``stride`` samples counts, reduced over the samples it has: a row of n
  samples has ceil(n / stride) groups, and no sample is lost. (`lrnnx_nn.EventPooling` waits for
  whole groups instead, as a stream that goes on must.)
* The gap before a pooled sample is the sum of the gaps of its group.
* A group never mixes documents: it reads its samples from the last reset in it on.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_core.sequences import Compaction, layout

ValuePooling = Literal["mean", "last", "max", "time_weighted"]
GroupPooling = Literal["none", "stride", "mean", "max", "time_weighted"]
VALUE_POOLINGS: tuple[str, ...] = get_args(ValuePooling)
GROUP_POOLINGS: tuple[str, ...] = get_args(GroupPooling)


class Grouped(NamedTuple):
    """A sequence and what a layer is told about it, each None where it need not be told.

    Attributes:
        y: (..., M, H), zero at padding.
        integration_timesteps: (..., M), time elapsed before each sample.
        lengths: (...), samples per row.
        mask: (..., M) bool, False is padding; None after a pooling, which pads on the right alone.
        reset: (..., M) bool, the first samples of documents.
    """

    y: Tensor
    integration_timesteps: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    reset: Tensor | None = None

    def valid(self) -> Tensor | None:
        """Return the (..., M) mask of samples that count, or None if all do."""
        return layout("pooling", self.y, lengths=self.lengths, mask=self.mask).valid(
            self.y.shape[-2]
        )


def check_grouping(where: str, pooling: str, stride: int) -> None:
    """Raise unless ``pooling`` and ``stride`` go together.

    Raises:
        ValueError: an unknown pooling, a stride < 1, a stride > 1 with ``none``.
    """
    if pooling not in GROUP_POOLINGS:
        raise ValueError(f"{where}: pooling = {pooling!r}, expected one of {GROUP_POOLINGS}")
    if not isinstance(stride, int) or isinstance(stride, bool) or stride < 1:
        raise ValueError(f"{where}: stride = {stride!r}, expected an integer >= 1")
    if pooling == "none" and stride > 1:
        raise ValueError(
            f"{where}: stride = {stride} with pooling = 'none', expected stride = 1 or one of "
            f"{GROUP_POOLINGS[1:]}"
        )


def grouped_lengths(lengths: Tensor, stride: int) -> Tensor:
    """Return how many groups rows of these lengths have: ceil(lengths / stride)."""
    return (lengths.to(torch.int64) + (stride - 1)) // stride  # a uint8 would wrap


def pool_groups(
    x: Tensor,
    stride: int,
    pooling: GroupPooling | str,
    *,
    integration_timesteps: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> Grouped:
    """Reduce every group of ``stride`` samples of x (..., L, H) to one.

    Args:
        x: (..., L, H), real and floating. Values at padding do not matter.
        stride: samples a group, at least 1.
        pooling: ``stride`` keeps the last sample of each group; ``mean``; ``max``;
            ``time_weighted``, the mean weighted by the gaps; ``none``, with a stride of 1 alone.
        integration_timesteps: (..., L), time elapsed before each sample. None stays None: time
            then counts in samples, before and after the pooling.
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding, as if it were not there.
        reset: (..., L) bool, a document starts. A group that holds a start reads the samples from
            it on. So packed documents are what they are alone where each starts a group, and never
            mix where not: then the samples in front of the start, in that group, are lost.

    Returns:
        Grouped: y (..., ceil(L / stride), H) in x's dtype; the sums of the gaps; the rows' lengths
        in groups, where lengths or mask were given; and where documents start. With a stride of 1
        what was given comes back, y zero at padding.

    Raises:
        ValueError: shapes, dtypes, devices, an unknown pooling, a stride that does not fit it.
    """
    where = "pool_groups"
    check_grouping(where, pooling, stride)
    _check_sequence(where, x)
    seq = layout(
        where, x, lengths=lengths, mask=mask, reset=reset,
        integration_timesteps=integration_timesteps,
    )  # fmt: skip
    length, rows = x.shape[-2], x.shape[:-1]
    valid, gaps, starts, count = seq.valid(length), seq.timesteps, seq.resets(length), seq.lengths
    if stride == 1:
        y = x if valid is None else torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))
        return Grouped(y, integration_timesteps, lengths, mask, reset)
    if seq.mask is not None and valid is not None:
        closing = Compaction.of(valid.expand(rows))
        x, count = closing.close(x), closing.lengths
        gaps = None if gaps is None else closing.close(gaps.expand(rows))
        starts = None if starts is None else closing.close(starts.expand(rows))
        valid = torch.arange(length, device=x.device) < count.unsqueeze(-1)
    elif length % stride and valid is None:
        valid = torch.ones(length, dtype=torch.bool, device=x.device)
    missing = -length % stride
    shape = (length + missing) // stride, stride

    def cut(t: Tensor) -> Tensor:
        """(..., L) -> (..., M, stride), False or zero past the end."""
        return F.pad(t, (0, missing)).unflatten(-1, shape)

    inside = None if valid is None else cut(valid)
    if starts is not None:
        opened = cut(starts)
        later = opened.flip(-1).cumsum(-1).flip(-1) - opened.to(torch.int64)
        inside = (later == 0) if inside is None else inside & (later == 0)
        starts = opened.any(-1)
    time = None if gaps is None else cut(gaps)
    x = F.pad(x, (0, 0, 0, missing)).unflatten(-2, shape)
    y = pool(x, inside, "last" if pooling == "stride" else pooling, time)
    if time is not None:
        time = (time if inside is None else torch.where(inside, time, 0.0)).sum(-1)
    return Grouped(y, time, None if count is None else grouped_lengths(count, stride), None, starts)


def pool(
    x: Tensor,
    valid: Tensor | None,
    pooling: ValuePooling | str,
    integration_timesteps: Tensor | None = None,
) -> Tensor:
    """Reduce x (..., L, H) over its valid samples to (..., H); a row without any gives zeros.

    Args:
        x: sequences. Values at padding do not matter.
        valid: (..., L) bool, or None if all samples count.
        pooling: ``mean``, ``last``, ``max``, or ``time_weighted``: the mean with the gap before
            each sample as its weight, whatever the unit; the mean itself without gaps, and in a
            row whose gaps are all zero.
        integration_timesteps: (..., L), the gaps. Read by ``time_weighted`` alone.

    Raises:
        ValueError: an unknown pooling, shapes, dtypes or devices that do not fit.
    """
    where = "pool"
    if pooling not in VALUE_POOLINGS:
        raise ValueError(f"{where}: pooling {pooling!r}, expected one of {VALUE_POOLINGS}")
    _check_sequence(where, x)
    gaps = layout(where, x, mask=valid, integration_timesteps=integration_timesteps).timesteps
    length = x.shape[-2]
    if length == 0:
        return x.sum(-2)
    if valid is None and (pooling != "time_weighted" or gaps is None):
        if pooling == "last":
            return x[..., -1, :]
        return x.amax(-2) if pooling == "max" else x.sum(-2) / length
    if valid is None:
        valid = torch.ones(length, dtype=torch.bool, device=x.device)
    valid = valid.expand(x.shape[:-1]).unsqueeze(-1)
    if pooling == "max":
        best = torch.where(valid, x, torch.full_like(x, torch.finfo(x.dtype).min)).amax(-2)
        return torch.where(valid.any(-2), best, torch.zeros_like(best))
    if pooling == "last":
        follows = valid.flip(-2).cumsum(-2).flip(-2)  # valid samples from here on
        return torch.where(valid & (follows == 1), x, torch.zeros_like(x)).sum(-2)
    known = torch.where(valid, x, torch.zeros_like(x))
    if pooling == "mean" or gaps is None:
        return known.sum(-2) / valid.sum(-2).clamp(min=1)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (known.to(wide) * _shares(valid, gaps.to(wide))).sum(-2).to(x.dtype)


def _check_sequence(where: str, x: Tensor) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"{where}: x {tuple(x.shape)} {x.dtype}, expected (..., L, H), real and floating"
        )


def _shares(valid: Tensor, gaps: Tensor) -> Tensor:
    """Return each sample's share (..., L, 1) of the time of its row, equal ones without time."""
    elapsed = torch.where(valid, gaps.unsqueeze(-1), torch.zeros_like(gaps).unsqueeze(-1))
    total = elapsed.sum(-2, keepdim=True)
    known = total > 0
    even = valid.to(gaps.dtype) / valid.sum(-2, keepdim=True).clamp(min=1)
    return torch.where(known, elapsed / torch.where(known, total, torch.ones_like(total)), even)
