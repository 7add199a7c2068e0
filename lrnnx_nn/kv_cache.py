# SPDX-License-Identifier: MIT
"""The state of attention: keys and values that were seen, and where in their document they stood.

Positions are counted in valid samples from the start of each document. A cache that grows keeps
every sample in the order of arrival. A ring of n slots keeps position p in slot p mod n, and thus
the last n of the current document. Padding, and what a reset cut off, has position -1.

Functions here have one batch dimension B, and padding, if any, on the right. Positions and
documents that are the same in every row may have one row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.models._common import check_device
from lrnnx_core.models._projected import check_parts
from lrnnx_core.sequences import Layout


class AttentionState(NamedTuple):
    """A cache that grows by a slot for each sample. A value: nobody writes to it.

    Attributes:
        k: (..., S, n_kv_heads, head_dim), keys, already rotated.
        v: (..., S, n_kv_heads, head_dim), values.
        position: (..., S) int64, of each slot in its own document; -1 is an empty slot.
        next: (...) int64, position of the sample to come.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    next: Tensor


class AttentionRing(NamedTuple):
    """A cache of fixed size, with the fields of `AttentionState`; position p is in slot p mod S."""

    k: Tensor
    v: Tensor
    position: Tensor
    next: Tensor


Cache = AttentionState | AttentionRing


class Place(NamedTuple):
    """Where the samples of a chunk stand.

    Attributes:
        position: (B or 1, L), in the sample's own document; -1 at padding.
        document: (B or 1, L), 0 for what continues the state, or None if all does.
        end: (B or 1), valid samples of the chunk.
        next: (B or 1), position of the sample after the chunk.
    """

    position: Tensor
    document: Tensor | None
    end: Tensor
    next: Tensor

    @property
    def last(self) -> Tensor | None:
        """The document (B or 1, 1) in which the chunk ends."""
        return None if self.document is None else self.document[:, -1:]


def empty(
    batch_shape: tuple[int, ...],
    slots: int | None,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Cache:
    """Return a ring of ``slots``, or a cache that grows if None, without any sample."""
    shape = (*batch_shape, slots or 0)
    k, v = (torch.zeros(*shape, heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    position = torch.full(shape, -1, device=device, dtype=torch.int64)
    start = torch.zeros(batch_shape, device=device, dtype=torch.int64)
    kind = AttentionState if slots is None else AttentionRing
    return kind(k, v, position, start)


def check(
    where: str,
    state: Any,
    batch: torch.Size,
    heads: int,
    head_dim: int,
    window: int | None,
    u: Tensor,
) -> None:
    """Raise unless the state is a cache for these rows, heads and window, where u is.

    Raises:
        ValueError: another kind, shape, device, or positions that are not int64.
    """
    kinds = (AttentionState, AttentionRing) if window is None else (AttentionRing,)
    if not isinstance(state, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: state is a {type(state).__name__}, expected {expected}")
    slots = state.k.shape[-3] if state.k.ndim >= 3 else 0
    part = (*batch, slots, heads, head_dim)
    shapes = {"k": part, "v": part, "position": (*batch, slots), "next": tuple(batch)}
    check_parts(where, state, type(state), shapes, u)
    for name in ("position", "next"):
        part = getattr(state, name)
        check_device(where, f"state.{name}", part, u)
        if part.dtype != torch.int64:
            raise ValueError(f"{where}: state.{name} has dtype {part.dtype}, expected torch.int64")
    most = slots if window is None else window
    if isinstance(state, AttentionRing) and not 1 <= slots <= most:
        raise ValueError(f"{where}: a state of {slots} slots, expected 1 ... {max(most, 1)}")


def flattened(state: Cache, rows: int) -> Cache:
    """Return the state with its batch dimensions made one."""
    slots = state.k.shape[-3:]
    return type(state)(
        state.k.reshape(rows, *slots), state.v.reshape(rows, *slots),
        state.position.reshape(rows, slots[0]), state.next.reshape(rows),
    )  # fmt: skip


def shaped(state: Cache, batch: torch.Size) -> Cache:
    """Return a state (B, ...) with these batch dimensions."""
    return type(state)(*(part.reshape((*batch, *part.shape[1:])) for part in state))


def place(
    seq: Layout, following: Tensor | None, batch: torch.Size, length: int, like: Tensor
) -> Place:
    """Return where the samples of a chunk stand.

    Args:
        seq: the chunk's documents and padding, which is on the right.
        following: (B), samples of the first document that came before; None for none.
        batch: shape of the batch, B rows in all.
        length: samples L.
        like: a tensor on the same device.
    """
    index = torch.arange(length, device=like.device).unsqueeze(0)
    end = index.new_full((1,), length) if seq.lengths is None else seq.lengths.reshape(-1).long()
    ahead = index.new_zeros(1) if following is None else following
    document = start = None
    position = index
    resets = seq.resets(length) if length else None
    if resets is not None:
        rows = resets.reshape(1, length) if resets.ndim == 1 else resets.expand(*batch, length)
        rows = rows.reshape(-1, length)
        document = rows.to(torch.int64).cumsum(-1)
        start = torch.where(rows, index, 0).cummax(-1).values
        position = index - start
    if following is not None:
        later = position + ahead.unsqueeze(-1)
        position = later if document is None else torch.where(document == 0, later, position)
    if seq.lengths is not None:
        position = torch.where(index < end.unsqueeze(-1), position, -1)
    if document is None or start is None:
        return Place(position, None, end, ahead + end)
    after = end - start[:, -1] + torch.where(document[:, -1] == 0, ahead, 0)
    return Place(position, document, end, after)


def place_one(following: Tensor) -> Place:
    """Return where one sample stands that comes after ``following`` (B) samples."""
    return Place(following.unsqueeze(-1), None, torch.ones_like(following), following + 1)


def append(old: Cache | None, k: Tensor, v: Tensor, at: Place) -> AttentionState:
    """Return a growing cache with the samples of a chunk behind it."""
    rows = k.shape[0]
    position = at.position
    if at.document is not None:
        position = torch.where(at.document == at.last, position, -1)
    position, after = position.expand(rows, -1), at.next.expand(rows)
    if old is None:
        return AttentionState(k, v, position, after)
    before = old.position
    if at.last is not None:
        before = torch.where(at.last == 0, before, -1)
    return AttentionState(
        torch.cat([old.k, k], 1), torch.cat([old.v, v], 1), torch.cat([before, position], 1), after
    )


def put(old: AttentionRing, k: Tensor, v: Tensor, at: Place) -> AttentionRing:
    """Return the ring with one sample k, v (B, 1, heads, head_dim) in its slot."""
    slots = old.k.shape[1]
    here = torch.arange(slots, device=k.device) == (old.next % slots).unsqueeze(-1)
    slot = here[..., None, None]
    return AttentionRing(
        torch.where(slot, k, old.k), torch.where(slot, v, old.v),
        torch.where(here, at.position, old.position), at.next,
    )  # fmt: skip


def write(old: Cache, k: Tensor, v: Tensor, at: Place) -> AttentionRing:
    """Return the ring after a chunk: in each slot the latest position of the last document."""
    rows, slots, length = k.shape[0], old.k.shape[1], k.shape[1]
    after, end = at.next.expand(rows), at.end.expand(rows)
    if not length:
        return AttentionRing(*old)
    latest = (after - 1).unsqueeze(-1)
    position = latest - (latest - torch.arange(slots, device=k.device)) % slots
    source = position - (after - end).unsqueeze(-1)  # index in the chunk; before it if negative
    first = at.position.new_zeros(rows, 1)
    continues = torch.ones_like(first, dtype=torch.bool)
    if at.last is not None:
        continues = (at.last == 0).expand(rows, 1)
        first = torch.where(continues, 0, end.unsqueeze(-1) - after.unsqueeze(-1))
    fresh = (source >= first) & (position >= 0)
    kept = ~fresh & continues & (position >= 0)
    index = source.clamp(0, length - 1)[..., None, None]

    def merged(new: Tensor, before: Tensor) -> Tensor:
        taken = new.gather(1, index.expand(-1, -1, *new.shape[2:]))
        before = torch.where(kept[..., None, None], before, 0)
        return torch.where(fresh[..., None, None], taken, before)

    return AttentionRing(merged(k, old.k), merged(v, old.v), position.clamp(min=-1), after)


def in_order(ring: Cache) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and positions of a ring, the oldest first; empty slots lead."""
    slots = ring.k.shape[1]
    order = (ring.next.unsqueeze(-1) + torch.arange(slots, device=ring.k.device)) % slots
    at = order[..., None, None].expand(ring.k.shape)
    return ring.k.gather(1, at), ring.v.gather(1, at), ring.position.gather(1, order)
