# SPDX-License-Identifier: MIT
"""The block of networks with several rates: convolution, layer, norm, activation.

It runs over whole sequences (`forward`) and over pieces of a stream (`prefill`, where ``last`` says
that nothing follows). Padding is zero behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrnnx_core.ops import causal_conv1d
from lrnnx_core.sequences import valid_mask
from lrnnx_nn.gated import ACTIVATIONS
from lrnnx_nn.norms import make_norm, normalize
from lrnnx_nn.pieces import Signal, Waiting, join, nothing, split, zero_padding

Number = float | Tensor


class DepthwiseConv(nn.Module):
    """A short convolution of each channel by itself, with zeros around the sequence.

    Args:
        channels: C.
        taps: its width K.
        causal: look at the past K - 1 samples; else at as many on either side, for an odd K.
    """

    def __init__(self, channels: int, taps: int, causal: bool) -> None:
        super().__init__()
        self.taps, self.ahead = taps, 0 if causal else taps // 2
        self.behind = taps - 1 - self.ahead
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Conv1d`` does: uniform within 1 / sqrt(K)."""
        bound = self.taps**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve whole sequences x (..., L, C); zeros are beyond both ends."""
        y, _ = causal_conv1d(F.pad(x, (0, 0, 0, self.ahead)), self.weight, self.bias)
        return y.narrow(-2, self.ahead, x.shape[-2])

    def inside(self, window: Tensor) -> Tensor:
        """Convolve (..., K - 1 + n, C) where nothing is missing; return (..., n, C)."""
        tail = window.narrow(-2, 0, self.taps - 1)
        rest = window.narrow(-2, self.taps - 1, window.shape[-2] - self.taps + 1)
        return causal_conv1d(rest, self.weight, self.bias, tail)[0]

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{self.weight.shape[0]}, taps={self.taps}, ahead={self.ahead}"


class StageBlockState(NamedTuple):
    """The state of a `StageBlock`: samples behind, samples that wait, and the mixer's state."""

    tail: Tensor
    held: Waiting
    mixer: Any


class StageBlock(nn.Module):
    """act(norm(mixer(conv(u)))), plus u if ``residual``.

    Args:
        width: channels.
        mixer: a layer of that width.
        taps: width of the depthwise convolution; 0 for none.
        causal: whether that convolution is.
        norm: see `lrnnx_nn.norms.make_norm`.
        activation: ``silu``, ``gelu``, ``relu`` or ``none``.
        residual: add the input.

    Raises:
        ValueError: a mixer with another number of output channels.
    """

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        *,
        taps: int,
        causal: bool,
        norm: str,
        activation: str,
        residual: bool,
    ) -> None:
        super().__init__()
        if getattr(mixer, "d_output", width) != width:
            raise ValueError(
                f"{type(mixer).__name__}: {mixer.d_output} channels come out, expected {width}"
            )
        self.width, self.activation, self.residual = width, activation, residual
        self.conv = DepthwiseConv(width, taps, causal) if taps else None
        self.mixer = mixer
        self.norm = make_norm(norm, width)

    @property
    def ahead(self) -> int:
        """Samples that the block looks ahead."""
        return 0 if self.conv is None else self.conv.ahead

    def init_state(self, batch_shape: Sequence[int] = ()) -> StageBlockState:
        """Return the state before any sample."""
        like = next(self.mixer.parameters()) if self.conv is None else self.conv.weight
        behind = 0 if self.conv is None else self.conv.behind
        tail = like.new_zeros(*batch_shape, behind, self.width)
        mixer: Any = self.mixer
        return StageBlockState(
            tail, nothing(like, batch_shape, self.width), mixer.init_state(batch_shape)
        )

    def forward(self, signal: Signal, dt_scale: Number) -> Signal:
        """Run over whole sequences."""
        u, lengths, gaps = signal
        if not u.shape[-2]:
            return signal
        y = u if self.conv is None else self.conv(u)
        y = self.mixer(y, integration_timesteps=gaps, lengths=lengths, dt_scale=dt_scale)
        valid = None if lengths is None else valid_mask(lengths, u.shape[-2])
        return signal._replace(x=zero_padding(self._after(u, y, valid), lengths))

    def prefill(
        self, signal: Signal, state: StageBlockState, dt_scale: Number, last: bool
    ) -> tuple[Signal, StageBlockState]:
        """Run over a piece of a stream; as many samples fewer come out as the block looks ahead."""
        joined = join("StageBlock", state.held, signal)
        total = joined.samples
        count = total if last else max(0, total - self.ahead)
        centre, held = split(joined, count)
        if not count:
            return centre, state._replace(held=held)
        u, tail = centre.x, state.tail
        y = u
        if self.conv is not None:
            window = torch.cat([tail.to(u.dtype), joined.x], dim=-2)
            needed = self.conv.behind + count + self.ahead
            missing = needed - window.shape[-2]
            window = F.pad(window, (0, 0, 0, missing)) if missing > 0 else window
            y = self.conv.inside(window.narrow(-2, 0, needed))
            tail = window.narrow(-2, count, self.conv.behind).clone()
        prefill: Any = self.mixer.prefill
        y, mixer = prefill(
            y, state.mixer, integration_timesteps=centre.integration_timesteps, dt_scale=dt_scale
        )
        return centre._replace(x=self._after(u, y, None)), StageBlockState(tail, held, mixer)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{self.width}, activation={self.activation!r}, residual={self.residual}"

    def _after(self, u: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        y = ACTIVATIONS[self.activation](normalize(self.norm, y, valid))
        return u + y if self.residual else y


class StageBlocks(nn.ModuleList):
    """Blocks at one rate, one after another."""

    def _blocks(self) -> list[StageBlock]:
        return [block for block in self if isinstance(block, StageBlock)]

    def init_state(self, batch_shape: Sequence[int] = ()) -> tuple[StageBlockState, ...]:
        """Return the states before any sample."""
        return tuple(block.init_state(batch_shape) for block in self._blocks())

    def forward(self, signal: Signal, dt_scale: Number) -> Signal:
        """Run over whole sequences."""
        for block in self:
            signal = block(signal, dt_scale)
        return signal

    def prefill(
        self, signal: Signal, states: Sequence[StageBlockState], dt_scale: Number, last: bool
    ) -> tuple[Signal, tuple[StageBlockState, ...]]:
        """Run over a piece of a stream."""
        after: list[StageBlockState] = []
        for block, state in zip(self._blocks(), states, strict=True):
            signal, new = block.prefill(signal, state, dt_scale, last)
            after.append(new)
        return signal, tuple(after)
