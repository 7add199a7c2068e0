# SPDX-License-Identifier: MIT
"""Sequences at one rate, and the pieces of streams that networks with several rates keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_core import checks
from lrnnx_core.backends.transforms import transform_active
from lrnnx_core.sequences import layout, valid_mask


class Signal(NamedTuple):
    """Sequences at one rate.

    Attributes:
        x: (..., L, C) samples.
        lengths: (...) samples of each row that count, or None if all do.
        integration_timesteps: (..., L) gap before each sample, in units of this rate's own step, or
            None where every gap is one.
    """

    x: Tensor
    lengths: Tensor | None = None
    integration_timesteps: Tensor | None = None


class Waiting(NamedTuple):
    """Samples of a stream that wait for later ones.

    Attributes:
        x: (..., m, C) samples, oldest first.
        integration_timesteps: (..., m) their gaps, or (..., 0) where there are none.
    """

    x: Tensor
    integration_timesteps: Tensor

    @property
    def samples(self) -> int:
        """How many wait."""
        return self.x.shape[-2]

    @property
    def timed(self) -> bool:
        """Whether some wait, and with gaps."""
        return self.integration_timesteps.shape[-1] > 0

    def signal(self) -> Signal:
        """Return all that waits."""
        return Signal(self.x, None, self.integration_timesteps if self.timed else None)


def nothing(like: Tensor, batch_shape: Sequence[int], channels: int) -> Waiting:
    """Return no samples of so many channels, with like's dtype and device."""
    return Waiting(like.new_zeros(*batch_shape, 0, channels), like.new_zeros(*batch_shape, 0))


def join(where: str, waiting: Waiting, piece: Signal) -> Waiting:
    """Return what waits, and a piece of the stream behind it.

    Raises:
        ValueError: another batch shape; gaps with one of them alone.
    """
    x, gaps = piece.x, piece.integration_timesteps
    before = waiting.x
    if before.shape[:-2] != x.shape[:-2] or before.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{where}: a state of {tuple(before.shape)}, and x is {tuple(x.shape)}; expected the "
            "same batch and channels"
        )
    if not x.shape[-2]:
        return waiting
    if waiting.samples and waiting.timed != (gaps is not None):
        raise ValueError(
            f"{where}: integration_timesteps in some pieces of a stream only, expected in all or "
            "in none"
        )
    both = torch.cat([before, x], dim=-2) if waiting.samples else x
    if gaps is None:
        return Waiting(both, waiting.integration_timesteps)
    earlier = waiting.integration_timesteps.to(gaps.dtype)
    return Waiting(both, torch.cat([earlier, gaps.expand(x.shape[:-1])], dim=-1))


def split(waiting: Waiting, count: int) -> tuple[Signal, Waiting]:
    """Return the first ``count`` samples, and the rest as a state to keep."""
    x, gaps = waiting
    rest = x.shape[-2] - count
    first = Signal(x.narrow(-2, 0, count))
    if waiting.timed:
        first = first._replace(integration_timesteps=gaps.narrow(-1, 0, count))
        gaps = gaps.narrow(-1, count, rest)
    # copies: as a view the state would keep the whole piece in memory
    return first, Waiting(x.narrow(-2, count, rest).clone(), gaps.clone())


def pad(signal: Signal, factor: int) -> Signal:
    """Continue every row with zeros, and gaps of one, to a whole number of groups."""
    x, lengths, gaps = signal
    length = x.shape[-2]
    if gaps is not None and lengths is not None:
        within = valid_mask(lengths, length)
        gaps = torch.where(within, gaps, torch.ones_like(gaps))
    x, extra = zero_padding(x, lengths), -length % factor
    if extra:
        x = F.pad(x, (0, 0, 0, extra))
        gaps = None if gaps is None else F.pad(gaps, (0, extra), value=1.0)
    if lengths is not None:
        lengths = (lengths.to(torch.int64) + factor - 1) // factor * factor  # a uint8 would wrap
    return Signal(x, lengths, gaps)


def zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return x (..., L, C) with zeros beyond each row's length."""
    if lengths is None:
        return x
    return torch.where(valid_mask(lengths, x.shape[-2]).unsqueeze(-1), x, torch.zeros_like(x))


def check_layout(
    where: str, x: Tensor, lengths: Tensor | None, integration_timesteps: Tensor | None
) -> None:
    """Raise unless lengths and gaps fit x (..., L, C); their values too, eagerly on a CPU."""
    layout(where, x, lengths=lengths, integration_timesteps=integration_timesteps)
    if x.device.type != "cpu" or transform_active() or torch.compiler.is_compiling():
        return
    if lengths is not None:
        checks.lengths(lengths, x.shape[-2])
    if integration_timesteps is not None:
        checks.integration_timesteps(integration_timesteps)
