# SPDX-License-Identifier: MIT
"""The way down to coarser rates, and the way up.

Level 0 is the rate of the input; level i has one sample for ``factors[0] * ... * factors[i-1]`` of
them. Both ways run over whole sequences (`forward`) and over pieces of a stream (`prefill`, where
``last`` says that nothing follows). Padding is zero behind every part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from lrnnx_nn.architectures._rate_blocks import Number, StageBlocks, StageBlockState
from lrnnx_nn.pieces import Signal, Waiting, join, nothing, split
from lrnnx_nn.resample import Downsample, Upsample


class DownState(NamedTuple):
    """The state of one level on the way down: the blocks', and samples short of a group."""

    blocks: tuple[StageBlockState, ...]
    group: Waiting


class Contraction(nn.Module):
    """The way down: at each level blocks, then one sample for each group.

    Args:
        blocks: the blocks of each level, finest first.
        downsamples: what leads from each level to the next.
    """

    def __init__(self, blocks: Sequence[StageBlocks], downsamples: Sequence[Downsample]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.down = nn.ModuleList(downsamples)
        self.factor = math.prod(down.factor for down in downsamples)

    def _levels(self) -> list[tuple[StageBlocks, Downsample]]:
        return list(zip(self.blocks, self.down, strict=True))  # pyright: ignore[reportReturnType]

    def init_state(self, batch_shape: Sequence[int] = ()) -> tuple[DownState, ...]:
        """Return the state of every level before any sample."""
        return tuple(
            DownState(blocks.init_state(batch_shape), down.init_state(batch_shape))
            for blocks, down in self._levels()
        )

    def forward(self, signal: Signal, dt_scale: Number) -> tuple[Signal, list[Signal]]:
        """Run over whole groups; return the coarsest signal, and what entered every level."""
        entered: list[Signal] = []
        for blocks, down in self._levels():
            entered.append(signal)
            signal = down.whole(blocks(signal, dt_scale))
        return signal, entered

    def prefill(
        self, signal: Signal, states: Sequence[DownState], dt_scale: Number, last: bool
    ) -> tuple[Signal, list[Signal], tuple[DownState, ...]]:
        """Run over a piece of a stream; also return what entered every level."""
        entered: list[Signal] = []
        after: list[DownState] = []
        for (blocks, down), state in zip(self._levels(), states, strict=True):
            entered.append(signal)
            signal, inner = blocks.prefill(signal, state.blocks, dt_scale, last)
            signal, group = down.prefill(
                signal.x, state.group, integration_timesteps=signal.integration_timesteps
            )
            after.append(DownState(inner, group))
        return signal, entered, tuple(after)

    def phase(self, states: Sequence[DownState]) -> int:
        """Return how many samples have come in, modulo the product of the factors."""
        count = 0
        for (_, down), state in reversed(list(zip(self._levels(), states, strict=True))):
            held = sum(block.held.samples for block in state.blocks)
            count = held + state.group.samples + down.factor * count
        return count % self.factor

    def rest_of_frame(self, states: Sequence[DownState], channels: int) -> Signal:
        """Return the zeros, and gaps of one, that complete the frame which has begun."""
        group, count = states[0].group.x, -self.phase(states) % self.factor
        shape = (*group.shape[:-2], count)
        waiting = [block.held for state in states for block in state.blocks]
        waiting += [state.group for state in states]
        timed = [w.integration_timesteps for w in waiting if w.timed]
        gaps = timed[0].new_ones(shape) if timed else None
        return Signal(group.new_zeros(*shape, channels), None, gaps)


class UpState(NamedTuple):
    """The state of one level on the way up: what waits on the skip, and the blocks'."""

    skip: Waiting
    blocks: tuple[StageBlockState, ...]


class Expansion(nn.Module):
    """The way up: at each level a group for each sample, the skip added, then blocks.

    Args:
        upsamples: what leads to each level from the next coarser one, finest first.
        blocks: the blocks of each level.
        additive: whether skips are added; else they bring the gaps alone, and have no channels.
    """

    def __init__(
        self, upsamples: Sequence[Upsample], blocks: Sequence[StageBlocks], *, additive: bool
    ) -> None:
        super().__init__()
        self.up = nn.ModuleList(upsamples)
        self.blocks = nn.ModuleList(blocks)
        self.additive = additive

    def _levels(self) -> list[tuple[Upsample, StageBlocks]]:
        return list(zip(self.up, self.blocks, strict=True))  # pyright: ignore[reportReturnType]

    def init_state(self, batch_shape: Sequence[int] = ()) -> tuple[UpState, ...]:
        """Return the state of every level before any sample."""
        return tuple(
            UpState(
                nothing(up.projection.weight, batch_shape, up.d_output * self.additive),
                blocks.init_state(batch_shape),
            )
            for up, blocks in self._levels()
        )

    def forward(self, signal: Signal, skips: Sequence[Signal], dt_scale: Number) -> Signal:
        """Run over whole sequences; skips are what entered each level on the way down."""
        for (up, blocks), skip in zip(reversed(self._levels()), reversed(skips), strict=True):
            y = up(signal.x)
            signal = skip._replace(x=y + skip.x if self.additive else y)
            signal = blocks(signal, dt_scale)
        return signal

    def prefill(
        self,
        signal: Signal,
        skips: Sequence[Signal],
        states: Sequence[UpState],
        dt_scale: Number,
        last: bool,
    ) -> tuple[Signal, tuple[UpState, ...]]:
        """Run over a piece of a stream. A skip never comes later than what it is added to."""
        after: list[UpState] = []
        levels = zip(reversed(self._levels()), reversed(skips), reversed(states), strict=True)
        for (up, blocks), skip, state in levels:
            y = up(signal.x)
            taken, waiting = split(join("Expansion", state.skip, skip), y.shape[-2])
            signal = taken._replace(x=y + taken.x if self.additive else y)
            signal, inner = blocks.prefill(signal, state.blocks, dt_scale, last)
            after.append(UpState(waiting, inner))
        return signal, tuple(reversed(after))
