# SPDX-License-Identifier: MIT
"""Where tokens stand: in their document, and at the end of a row."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from lrnnx_core.backends.transforms import transform_active
from lrnnx_core.sequences import Layout


def positions(
    ids: Tensor, seq: Layout, start: Tensor | None, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the place of each token in its document (..., L), and of the one to come (...).

    Args:
        ids: (..., L).
        seq: which tokens count, and where documents start.
        start: (...) int64, tokens of the first document before these; none if None.
        wanted: False spares the first result.
    """
    length, batch = ids.shape[-1], ids.shape[:-1]
    valid, resets = seq.valid(length), seq.resets(length)
    if start is None:
        start = torch.zeros(batch, dtype=torch.int64, device=ids.device)
    if not wanted and resets is None:
        return None, start + (length if valid is None else valid.expand(ids.shape).sum(-1))
    if length == 0:
        return torch.zeros_like(ids, dtype=torch.int64), start
    if valid is None:
        before = torch.arange(length, device=ids.device).expand(ids.shape)
        count = torch.full_like(start, length)
    else:
        counted = valid.expand(ids.shape).to(torch.int64).cumsum(-1)
        before, count = counted - 1, counted[..., -1]
    since = -start.unsqueeze(-1)
    if resets is None:
        return before - since, count + start
    since = torch.where(resets, before, since).cummax(-1).values
    return before - since, count - since[..., -1]


def last_valid(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return x (..., H) at the last valid sample of each row, and which rows (...) have one."""
    length = x.shape[-2]
    if length == 0:
        rows = x.shape[:-2]
        nothing = torch.zeros(rows, dtype=torch.bool, device=x.device)
        return x.new_zeros((*rows, x.shape[-1])), nothing
    if valid is None:
        return x[..., -1, :], None
    valid = valid.expand(x.shape[:-1])
    index = torch.arange(length, device=x.device).expand(valid.shape)
    last = torch.where(valid, index, 0).amax(-1, keepdim=True).unsqueeze(-1)
    return x.gather(-2, last.expand(*last.shape[:-1], x.shape[-1])).squeeze(-2), valid.any(-1)


class Trusted(threading.local):
    """Inside of ``with trusted:`` this thread's ids and positions are known to be in range."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


trusted = Trusted()


def check_range(
    where: str, name: str, values: Tensor, valid: Tensor | None, limit: int, of: str
) -> None:
    """Raise if a value that counts is not in 0 ... limit - 1: in eager mode on a CPU alone.

    Elsewhere the check would synchronise or cannot be made, and for tokens that were chosen among
    the model's own it need not be (`trusted`). An embedding of a wrong index stops a CUDA device
    with an assertion.
    """
    if trusted.depth or values.device.type != "cpu" or type(values) is not Tensor:
        return
    if transform_active():
        return
    if valid is None and values.numel() == 1 and 0 <= int(values) < limit:
        return
    bad = (values < 0) | (values >= limit)
    if valid is not None:
        bad = bad & valid
    if bool(bad.any()):
        first = int(values.expand(bad.shape)[bad][0])
        raise ValueError(f"{where}: {name} {first}, expected 0 ... {limit - 1} ({of} = {limit})")
