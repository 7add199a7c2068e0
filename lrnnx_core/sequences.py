# SPDX-License-Identifier: MIT
"""Which samples of a batch count, where documents start, and when samples were taken.

The conventions, the same for every model:

* ``lengths (...)``: right padding; row i has ``lengths[i]`` samples.
* ``mask (..., L)``: bool, False is padding, on either side. At padding the state is untouched and
  the output is zero.
* ``reset (..., L)``: bool, the state is cleared before that sample.
* ``integration_timesteps (..., L)``: the time elapsed *before* each sample.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The checked sequence arguments of a `scan`."""

    lengths: Tensor | None
    mask: Tensor | None
    reset: Tensor | None
    timesteps: Tensor | None

    @property
    def uniform(self) -> bool:
        """Whether every sample meets the same recurrence (padding on the right aside)."""
        return self.mask is None and self.reset is None and self.timesteps is None

    def valid(self, length: int) -> Tensor | None:
        """Return the (..., L) mask of samples that count, or None if all do."""
        if self.lengths is None:
            return self.mask
        within = valid_mask(self.lengths, length)
        return within if self.mask is None else within & self.mask

    def resets(self, length: int) -> Tensor | None:
        """Return where the state is cleared: at resets that are not padding."""
        valid = self.valid(length)
        return self.reset if self.reset is None or valid is None else self.reset & valid

    def reversed(self, length: int) -> Layout:
        """Return the layout of the sequence flipped in time.

        Padding moves to the other side, where the zero state passes it untouched. A document that
        starts at one sample ends, read backwards, before the valid sample in front of it. The time
        elapsed before a sample is now the gap to its successor in the document; the last sample of
        a document has none, and takes the first gap of the document.
        """
        valid, reset, gaps = self.valid(length), self.resets(length), self.timesteps
        if length and (reset is not None or (valid is not None and gaps is not None)):
            known = [t for t in (valid, reset, gaps) if t is not None]
            shape = torch.broadcast_shapes(*(t.shape for t in known))
            every = torch.ones(shape, dtype=torch.bool, device=known[0].device)
            counted = every if valid is None else valid.expand(shape)
            opening = ~every if reset is None else reset.expand(shape)
            follower, start = _neighbours(counted, opening)
            # one step past the end stands for "no successor"
            ends = torch.cat([opening, ~every[..., :1]], dim=-1).gather(-1, follower) & counted
            if gaps is not None:
                last = ends | (follower == length)
                source = torch.where(last, start, follower.clamp(max=length - 1))
                gaps = gaps.expand(shape).gather(-1, source).flip(-1)
            if reset is not None:
                reset = ends.flip(-1)
        elif gaps is not None and length:
            gaps = torch.cat([gaps[..., 1:], gaps[..., :1]], dim=-1).flip(-1)
        return Layout(None, None if valid is None else valid.flip(-1), reset, gaps)

    def backwards(self, length: int) -> Layout:
        """Return `reversed` for a run from the zero state over an input that is zero at padding.

        Right padding stands in front then and leaves that state alone: it needs no mask.
        """
        flipped = self.reversed(length)
        return flipped._replace(mask=None) if self.mask is None else flipped

    def mirrored(self, length: int) -> Layout:
        """Return `reversed` for an input reversed by `mirror`: right padding stays on the right."""
        flipped = self.reversed(length)
        if self.lengths is None or self.mask is not None:
            return flipped
        index = _mirror_index(self.lengths, length)

        def closed(t: Tensor | None) -> Tensor | None:
            return t if t is None or not length else t.flip(-1).gather(-1, index)

        return Layout(self.lengths, None, closed(flipped.reset), closed(flipped.timesteps))

    def mirror(self, x: Tensor) -> Tensor:
        """Reverse x (*batch, L, H) in time, each row within its own length; twice is nothing.

        Under a mask the whole row is reversed, padding included, as `mirrored` expects.
        """
        if self.lengths is None or self.mask is not None:
            return x.flip(-2)
        return _along_time(x, _mirror_index(self.lengths, x.shape[-2]))


def _mirror_index(lengths: Tensor, length: int) -> Tensor:
    """Return where each sample (..., L) of rows reversed within their lengths comes from."""
    index = torch.arange(length, device=lengths.device)
    back = lengths.unsqueeze(-1) - 1 - index
    return torch.where(back >= 0, back, index)


def _neighbours(valid: Tensor, opening: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the next valid sample is (L if none), and where one's own document starts."""
    length = valid.shape[-1]
    index = torch.arange(length, device=valid.device).expand(valid.shape)
    upcoming = torch.where(valid, index, length)
    upcoming = torch.cat([upcoming[..., 1:], torch.full_like(index[..., :1], length)], dim=-1)
    follower = upcoming.flip(-1).cummin(-1).values.flip(-1)
    first = torch.argmax(valid.to(torch.uint8), dim=-1, keepdim=True)
    start = torch.where(opening & valid, index, first).cummax(-1).values
    return follower, start


def layout(
    where: str,
    u: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    integration_timesteps: Tensor | None = None,
) -> Layout:
    """Check the sequence arguments of ``where`` against u (..., L, H) and bundle them.

    Raises:
        ValueError: a shape that does not broadcast to u's, a wrong dtype, another device.
    """
    batch, length = u.shape[:-2], u.shape[-2]
    given = {
        "lengths": (lengths, batch),
        "mask": (mask, (*batch, length)),
        "reset": (reset, (*batch, length)),
        "integration_timesteps": (integration_timesteps, (*batch, length)),
    }
    for name, (value, shape) in given.items():
        if value is None:
            continue
        check_tensor(where, name, value)
        if value.device != u.device:
            raise ValueError(f"{where}: {name} is on {value.device} and u on {u.device}")
        timed = name != "lengths"
        if (timed and value.shape[-1:] != (length,)) or not _fits(value.shape, shape):
            raise ValueError(
                f"{where}: {name} {tuple(value.shape)} does not fit u {tuple(u.shape)}; "
                f"expected {tuple(shape)} or fewer batch axes"
            )
        if name in ("mask", "reset") and value.dtype != torch.bool:
            raise ValueError(f"{where}: {name} has dtype {value.dtype}, expected bool")
        if name == "lengths" and (value.is_floating_point() or value.dtype == torch.bool):
            raise ValueError(f"{where}: lengths has dtype {value.dtype}, expected an integer one")
        if name == "integration_timesteps" and not value.is_floating_point():
            raise ValueError(f"{where}: {name} has dtype {value.dtype}, expected a floating one")
    if lengths is not None:
        lengths = lengths.to(torch.int64).expand(batch)  # narrower ones do not index in every place
    found = Layout(lengths, mask, reset, integration_timesteps)
    if integration_timesteps is None or (valid := found.valid(length)) is None:
        return found
    # whatever stands at padding, even NaN, reaches no gradient either
    counted = torch.where(valid, integration_timesteps, torch.ones_like(integration_timesteps))
    return found._replace(timesteps=counted)


def check_tensor(where: str, name: str, value: object) -> None:
    """Raise unless it is a Tensor: a list, a number and a NumPy array are not."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{where}: {name} is a {type(value).__name__}, expected a Tensor")


def _fits(shape: torch.Size, target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(target), strict=False)
    )


def valid_mask(lengths: Tensor, length: int) -> Tensor:
    """Return the bool mask (..., L) of the first ``lengths`` samples of each row."""
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(-1)


def at_length(h: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
    """Return h at the last valid sample of each row, or ``before`` where a row is empty.

    Args:
        h: (*batch, L, *S) states after each sample.
        lengths: (*batch), integer.
        before: (*batch, *S) states before the first sample.
    """
    axis = lengths.ndim
    if h.shape[axis] == 0:
        return before
    rest = (1,) * (before.ndim - axis)
    index = (lengths - 1).clamp(min=0).reshape(lengths.shape + (1,) + rest)
    last = h.gather(axis, index.expand(lengths.shape + (1,) + before.shape[axis:])).squeeze(axis)
    return torch.where((lengths > 0).reshape(lengths.shape + rest), last, before)


def align_right(x: Tensor, lengths: Tensor) -> Tensor:
    """Shift each row of x (*batch, L, H) so that it ends at L; zeros come in on the left."""
    length = x.shape[-2]
    source = torch.arange(length, device=x.device) - (length - lengths.unsqueeze(-1))
    moved = x.gather(-2, source.clamp(min=0).unsqueeze(-1).expand(x.shape))
    return torch.where((source >= 0).unsqueeze(-1), moved, torch.zeros_like(moved))


class Compaction(NamedTuple):
    """How the valid samples of a mask move to the front of each row, and back.

    A model with more than one kind of state (a convolution's tail beside a recurrence) meets holes
    in a mask by closing them: padding then touches no state at all.
    """

    order: Tensor
    position: Tensor
    mask: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Compaction:
        """Return the compaction of a bool mask (..., L)."""
        order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
        position = (mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
        return cls(order, position, mask, mask.sum(-1))

    def close(self, x: Tensor) -> Tensor:
        """Move valid samples of x (..., L) or (..., L, H) to the front."""
        return _along_time(x, self.order)

    def open(self, y: Tensor) -> Tensor:
        """Move results (..., L, H) back to where their samples were; zero at padding."""
        moved = _along_time(y, self.position)
        return torch.where(self.mask.unsqueeze(-1), moved, torch.zeros_like(moved))


def _along_time(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the time axis of (..., L) or, with one more axis than the index, (..., L, H)."""
    if x.ndim == index.ndim:
        return x.gather(-1, index)
    return x.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def timesteps_from_timestamps(
    timestamps: Tensor,
    last: Tensor | float | None = None,
    first: float = 1.0,
    convention: Literal["before", "after"] = "before",
) -> Tensor:
    """Turn time stamps into `integration_timesteps`.

    Args:
        timestamps: (..., L), nondecreasing, in any unit; dt is then in the same unit. Differences
            of integers are exact. A float32 knows a time stamp to seven digits alone: keep stamps
            as integers or float64, as `lrnnx_core.events` does.
        last: (...) or a number, the time stamp of the sample before these, when a stream goes on.
        first: the gap before the first sample where ``last`` is None.
        convention: ``"before"`` pairs sample k with t_k - t_{k-1}, as the recurrence needs.
            ``"after"`` pairs it with t_{k+1} - t_k and has no gap for the last sample; it serves to
            reproduce weights trained so (the released Event-SSM loader).

    Returns:
        (..., L), or (..., L - 1) for ``"after"``: drop the last sample then, as that loader does.
        In the dtype of floating time stamps, float64 for integers.

    Raises:
        ValueError: no time axis, an unknown convention, or ``last`` given with ``"after"``.
    """
    if timestamps.ndim == 0:
        raise ValueError("timesteps_from_timestamps: timestamps () needs a time axis")
    integral = not timestamps.is_floating_point()
    if integral:
        timestamps = timestamps.to(torch.int64)  # float64 is exact to 2^53 alone
    dtype = torch.float64 if integral else timestamps.dtype
    if convention == "after":
        if last is not None:
            raise ValueError(
                "timesteps_from_timestamps: last has no meaning with convention='after'"
            )
        return timestamps.diff(dim=-1).to(dtype)
    if convention != "before":
        raise ValueError(
            f"timesteps_from_timestamps: convention {convention!r}, expected 'before' or 'after'"
        )
    start = timestamps[..., :1]
    if last is None:
        gap = torch.full_like(start, first, dtype=dtype)
    else:
        kind = torch.int64 if isinstance(last, int) else torch.float64
        before = last if isinstance(last, Tensor) else torch.tensor(last, dtype=kind)
        before = before.to(start.device)
        if before.is_floating_point() or not integral:
            start, before = start.to(dtype), before.to(dtype)
        gap = (start - before.unsqueeze(-1)).to(dtype)
    return torch.cat([gap, timestamps.diff(dim=-1).to(dtype)], dim=-1)


def reset_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the reset flags (length,) of documents packed end to end.

    Args:
        cu_seqlens: (S + 1,) integer, 0 = c_0 <= c_1 <= ... <= c_S = length; document s is samples
            c_s ... c_{s+1} - 1. Empty documents are allowed.
        length: total number of samples.

    Raises:
        ValueError: not a one-dimensional integer tensor. (Values: see `lrnnx_core.checks`.)
    """
    _check_cu_seqlens(cu_seqlens)
    flags = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    return flags.index_fill(0, cu_seqlens.long(), True)[:length]


def gather_final_states(h: Tensor, cu_seqlens: Tensor, before: Tensor | None = None) -> Tensor:
    """Return the state after each packed document.

    Args:
        h: (L, *S), states after every sample of the packed sequence.
        cu_seqlens: (S + 1,), see `reset_from_cu_seqlens`.
        before: (documents, *S), what an empty document returns; zeros if None.

    Returns:
        (documents, *S).
    """
    _check_cu_seqlens(cu_seqlens)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if before is None:
        before = h.new_zeros((len(starts), *h.shape[1:]))
    if h.shape[0] == 0:
        return before
    states = h[(ends - 1).clamp(min=0)]
    return torch.where((ends > starts).reshape((-1,) + (1,) * (h.ndim - 1)), states, before)


def _check_cu_seqlens(cu_seqlens: Tensor) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens: shape {tuple(cu_seqlens.shape)}, dtype {cu_seqlens.dtype}; expected a "
            "one-dimensional integer tensor of at least one element"
        )
