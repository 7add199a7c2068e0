# SPDX-License-Identifier: MIT
"""The two halves of an autoencoder along time: to a short sequence of latent vectors, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lrnnx_core.models._common import check_sizes
from lrnnx_nn.architectures._rate_blocks import StageBlockState
from lrnnx_nn.architectures._ways import DownState, UpState
from lrnnx_nn.architectures.multirate import (
    MultirateConfig,
    check_sequence,
    check_streaming,
    make_blocks,
    make_contraction,
    make_expansion,
)
from lrnnx_nn.pieces import Signal, pad, zero_padding


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(MultirateConfig):
    """What an `Autoencoder` is built from: the attributes of `MultirateConfig`, and this one.

    The neck has ``n_neck`` blocks on either side of the bottleneck.

    Attributes:
        d_latent: channels of the latent sequence, the width of the bottleneck.

    Raises:
        ValueError: what `MultirateConfig` refuses, d_latent < 1.
    """

    n_neck: int = 1
    d_latent: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("AutoencoderConfig", d_latent=self.d_latent)

    @property
    def compression(self) -> float:
        """Numbers that come in for each that the latent sequence has."""
        return self.d_input * self.total_factor / self.d_latent

    @property
    def _blocks_in_neck(self) -> int:
        return 2 * self.n_neck


class Latent(NamedTuple):
    """What a sequence was encoded to.

    Attributes:
        z: (..., ceil(L / total_factor), d_latent).
        lengths: (...) latent vectors of each row, or None if all count.
    """

    z: Tensor
    lengths: Tensor | None = None


class LatentEncoderState(NamedTuple):
    """The state of an `LatentEncoder` between two pieces of a stream."""

    down: tuple[DownState, ...]
    neck: tuple[StageBlockState, ...]


class LatentDecoderState(NamedTuple):
    """The state of a `LatentDecoder` between two pieces of a stream."""

    neck: tuple[StageBlockState, ...]
    up: tuple[UpState, ...]
    output: tuple[StageBlockState, ...]


class LatentEncoder(nn.Module):
    """The first half of an `Autoencoder`, which can run where the other half is not."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.stem = None if config.d_stem is None else nn.Linear(config.d_input, width)
        self.down = make_contraction(config)
        self.neck = make_blocks(config, len(config.channels), config.n_neck)
        self.latent = nn.Linear(config.channels[-1], config.d_latent)

    def init_state(self, batch_shape: Sequence[int] = ()) -> LatentEncoderState:
        """Return the state before any sample.

        Raises:
            ValueError: a bidirectional layer.
        """
        check_streaming("LatentEncoder.init_state", self.config)
        return LatentEncoderState(
            self.down.init_state(batch_shape), self.neck.init_state(batch_shape)
        )

    def forward(
        self,
        u: Tensor,
        *,
        lengths: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Latent:
        """See `Autoencoder.encode`."""
        check_sequence("LatentEncoder", u, self.config.d_input, lengths, integration_timesteps)
        signal = pad(Signal(u, lengths, integration_timesteps), self.config.total_factor)
        signal, _ = self.down(self._enter(signal), dt_scale)
        signal = self.neck(signal, dt_scale)
        return Latent(zero_padding(self.latent(signal.x), signal.lengths), signal.lengths)

    def prefill(
        self,
        u: Tensor,
        state: LatentEncoderState | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, LatentEncoderState]:
        """Take a piece of a stream u (..., L, d_input); return the latent vectors complete with it.

        Raises:
            ValueError: shapes that do not fit, a bidirectional layer.
        """
        check_streaming("LatentEncoder.prefill", self.config)
        check_sequence("LatentEncoder.prefill", u, self.config.d_input, None, integration_timesteps)
        state = self.init_state(u.shape[:-2]) if state is None else state
        return self.advance(Signal(u, None, integration_timesteps), state, dt_scale, last=False)

    def finish(self, state: LatentEncoderState, *, dt_scale: float | Tensor = 1.0) -> Tensor:
        """Return the latent vectors of a stream that ends here which have not come yet."""
        check_streaming("LatentEncoder.finish", self.config)
        rest = self.down.rest_of_frame(state.down, self.config.d_input)
        return self.advance(rest, state, dt_scale, last=True)[0]

    def advance(
        self, signal: Signal, state: LatentEncoderState, dt_scale: float | Tensor, last: bool
    ) -> tuple[Tensor, LatentEncoderState]:
        """Run over a piece of a stream, the end of it if ``last``."""
        signal, _, down = self.down.prefill(self._enter(signal), state.down, dt_scale, last)
        signal, neck = self.neck.prefill(signal, state.neck, dt_scale, last)
        return self.latent(signal.x), LatentEncoderState(down, neck)

    def _enter(self, signal: Signal) -> Signal:
        if self.stem is None:
            return signal
        return signal._replace(x=zero_padding(self.stem(signal.x), signal.lengths))


class LatentDecoder(nn.Module):
    """The second half of an `Autoencoder`, which can run where the other half is not."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.latent = nn.Linear(config.d_latent, config.channels[-1])
        self.neck = make_blocks(config, len(config.channels), config.n_neck)
        self.up = make_expansion(config, additive=False)
        self.output = make_blocks(config, 0, config.n_output, plain=True)
        stem = config.d_stem
        self.head = None if stem is None else nn.Linear(stem, config.d_input)

    def init_state(self, batch_shape: Sequence[int] = ()) -> LatentDecoderState:
        """Return the state before any latent vector.

        Raises:
            ValueError: a bidirectional layer.
        """
        check_streaming("LatentDecoder.init_state", self.config)
        return LatentDecoderState(
            self.neck.init_state(batch_shape),
            self.up.init_state(batch_shape),
            self.output.init_state(batch_shape),
        )

    def forward(
        self,
        z: Tensor,
        *,
        length: int | None = None,
        lengths: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """See `Autoencoder.decode`."""
        where, factor = "LatentDecoder", self.config.total_factor
        check_sequence(where, z, self.config.d_latent)
        whole = z.shape[-2] * factor
        length = whole if length is None else length
        if not 0 <= length <= whole:
            raise ValueError(
                f"{where}: length = {length} of {z.shape[-2]} latent vectors, expected 0 ... "
                f"{whole}"
            )
        # samples without channels: lengths and gaps at the rate of the result
        empty = z.new_zeros(*z.shape[:-2], length, 0)
        check_sequence(where, empty, 0, lengths, integration_timesteps)
        samples = pad(Signal(empty, lengths, integration_timesteps), factor)
        signal, skips = self._down_to_latent(
            samples, z.narrow(-2, 0, samples.x.shape[-2] // factor)
        )
        signal = self.up(self.neck(signal, dt_scale), skips, dt_scale)
        y = self._leave(self.output(signal, dt_scale).x.narrow(-2, 0, length))
        return zero_padding(y, lengths)

    def prefill(
        self,
        z: Tensor,
        state: LatentDecoderState | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, LatentDecoderState]:
        """Take the next latent vectors of a stream; return the samples complete with them.

        Args:
            z: (..., m, d_latent).
            state: from `init_state` or the piece before; the beginning if None.
            integration_timesteps: (..., total_factor m), of the samples z stands for.
            dt_scale: multiplies the step of every layer.

        Raises:
            ValueError: shapes that do not fit, a bidirectional layer.
        """
        check_streaming("LatentDecoder.prefill", self.config)
        check_sequence("LatentDecoder.prefill", z, self.config.d_latent)
        empty = z.new_zeros(*z.shape[:-2], z.shape[-2] * self.config.total_factor, 0)
        check_sequence("LatentDecoder.prefill", empty, 0, None, integration_timesteps)
        state = self.init_state(z.shape[:-2]) if state is None else state
        return self.advance(z, Signal(empty, None, integration_timesteps), state, dt_scale, False)

    def finish(self, state: LatentDecoderState, *, dt_scale: float | Tensor = 1.0) -> Tensor:
        """Return the samples that a stream of latent vectors still owes, to the end of a frame."""
        check_streaming("LatentDecoder.finish", self.config)
        batch = state.up[0].skip.x.shape[:-2]
        z = state.up[0].skip.x.new_zeros(*batch, 0, self.config.d_latent)
        return self.advance(z, Signal(z.narrow(-1, 0, 0)), state, dt_scale, True)[0]

    def advance(
        self,
        z: Tensor,
        samples: Signal,
        state: LatentDecoderState,
        dt_scale: float | Tensor,
        last: bool,
    ) -> tuple[Tensor, LatentDecoderState]:
        """Run over latent vectors; ``samples`` holds the gaps of what they stand for."""
        signal, skips = self._down_to_latent(samples, z)
        signal, neck = self.neck.prefill(signal, state.neck, dt_scale, last)
        signal, up = self.up.prefill(signal, skips, state.up, dt_scale, last)
        signal, output = self.output.prefill(signal, state.output, dt_scale, last)
        return self._leave(signal.x), LatentDecoderState(neck, up, output)

    def _down_to_latent(self, samples: Signal, z: Tensor) -> tuple[Signal, list[Signal]]:
        """Return the neck's signal, and lengths and gaps at every level above."""
        skips: list[Signal] = []
        x, lengths, gaps = samples
        for factor in self.config.factors:
            skips.append(Signal(x, lengths, gaps))
            groups = x.shape[-2] // factor
            x = x.narrow(-2, 0, groups)
            lengths = None if lengths is None else lengths // factor
            if gaps is not None:
                gaps = gaps.reshape(*gaps.shape[:-1], groups, factor).mean(-1)
        return Signal(zero_padding(self.latent(z), lengths), lengths, gaps), skips

    def _leave(self, x: Tensor) -> Tensor:
        return x if self.head is None else self.head(x)
