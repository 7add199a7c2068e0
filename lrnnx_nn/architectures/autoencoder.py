# SPDX-License-Identifier: MIT
"""An autoencoder along time: a short sequence of latent vectors, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrnnx_nn.architectures import checkpoint
from lrnnx_nn.architectures.latent import (
    AutoencoderConfig,
    Latent,
    LatentDecoder,
    LatentDecoderState,
    LatentEncoder,
    LatentEncoderState,
)
from lrnnx_nn.architectures.multirate import check_sequence, check_streaming
from lrnnx_nn.blocks import reset_parts
from lrnnx_nn.pieces import Signal, Waiting, join, nothing, split

__all__ = ["Autoencoder", "AutoencoderConfig", "AutoencoderState", "Latent"]

ARCHITECTURE = "autoencoder"


class AutoencoderState(NamedTuple):
    """The state of an `Autoencoder`: of both halves, and gaps of samples not yet encoded."""

    encoder: LatentEncoderState
    gaps: Waiting
    decoder: LatentDecoderState


class Autoencoder(nn.Module):
    """Encode sequences (..., L, d_input) to (..., ceil(L / total_factor), d_latent), and back.

    The parts are those of a `lrnnx_nn.UNet`, without skips: all that the decoder knows of a
    sequence is the latent one.

    Args:
        config: sizes and choices.

    A length that is no multiple of ``config.total_factor`` is continued with zeros and the result
    cut. Rows of a padded batch are what they are alone. ``lookahead`` is the config's: how many
    samples later an output comes, at most.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.lookahead = config.lookahead
        self.encoder = LatentEncoder(config)
        self.decoder = LatentDecoder(config)

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place."""
        reset_parts(*self.children())

    def encode(
        self,
        u: Tensor,
        *,
        lengths: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Latent:
        """Return the latent sequence.

        Args:
            u: (..., L, d_input).
            lengths: (...), samples per row of a right-padded batch.
            integration_timesteps: (..., L), time elapsed before each sample, in units of dt.
                Coarser levels get the mean over each group: gaps of one are the same as none.
            dt_scale: multiplies the step of every layer.

        Returns:
            `Latent` of z (..., ceil(L / total_factor), d_latent) and its rows' lengths. Padding is
            zero.

        Raises:
            ValueError: shapes that do not fit.
        """
        return self.encoder(
            u, lengths=lengths, integration_timesteps=integration_timesteps, dt_scale=dt_scale
        )

    def decode(
        self,
        z: Tensor,
        *,
        length: int | None = None,
        lengths: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Return the sequence (..., length, d_input) of a latent one.

        Args:
            z: (..., m, d_latent).
            length: samples of the sequence that was encoded; all of ``total_factor m`` if None.
            lengths: (...), samples per row of that sequence; zeros beyond.
            integration_timesteps: (..., length), as given to `encode`.
            dt_scale: multiplies the step of every layer.

        Raises:
            ValueError: shapes that do not fit, a length that z does not cover.
        """
        return self.decoder(
            z, length=length, lengths=lengths, integration_timesteps=integration_timesteps,
            dt_scale=dt_scale,
        )  # fmt: skip

    def forward(
        self,
        u: Tensor,
        *,
        lengths: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Return u (..., L, d_input) encoded and decoded. Arguments as `encode`'s."""
        latent = self.encode(
            u, lengths=lengths, integration_timesteps=integration_timesteps, dt_scale=dt_scale
        )
        return self.decode(
            latent.z, length=u.shape[-2], lengths=lengths,
            integration_timesteps=integration_timesteps, dt_scale=dt_scale,
        )  # fmt: skip

    def init_state(self, batch_shape: Sequence[int] = ()) -> AutoencoderState:
        """Return the state before any sample.

        Raises:
            ValueError: a bidirectional layer.
        """
        return AutoencoderState(
            self.encoder.init_state(batch_shape),
            nothing(self.encoder.latent.weight, batch_shape, 0),
            self.decoder.init_state(batch_shape),
        )

    def prefill(
        self,
        u: Tensor,
        state: AutoencoderState | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, AutoencoderState]:
        """Take the next piece of a stream through both halves; return what is complete with it.

        The outputs of all pieces, and of `finish` behind them, make up what `forward` returns for
        the pieces together. Output t comes with input ``t + lookahead`` at the latest. To send the
        latent sequence elsewhere, use ``encoder.prefill`` here and ``decoder.prefill`` there.

        Args:
            u: (..., L, d_input), of any length.
            state: from `init_state` or the piece before; the beginning if None.
            integration_timesteps: (..., L), in every piece or in none.
            dt_scale: multiplies the step of every layer.

        Raises:
            ValueError: shapes that do not fit, a bidirectional layer.
        """
        check_streaming("Autoencoder.prefill", self.config)
        check_sequence("Autoencoder.prefill", u, self.config.d_input, None, integration_timesteps)
        state = self.init_state(u.shape[:-2]) if state is None else state
        return self._advance(Signal(u, None, integration_timesteps), state, dt_scale, last=False)

    def finish(self, state: AutoencoderState, *, dt_scale: float | Tensor = 1.0) -> Tensor:
        """Return the outputs (..., M, d_input) that a stream which ends here still owes."""
        check_streaming("Autoencoder.finish", self.config)
        rest = self.encoder.down.rest_of_frame(state.encoder.down, self.config.d_input)
        y, _ = self._advance(rest, state, dt_scale, last=True)
        return y.narrow(-2, 0, y.shape[-2] - rest.x.shape[-2])

    def save(self, folder: Path | str) -> None:
        """Write config and weights into a folder; see `checkpoint.save`."""
        checkpoint.save(folder, ARCHITECTURE, self.config.to_dict(), self)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Autoencoder:
        """Read what `save` wrote; the network is in evaluation mode. See `checkpoint.load`.

        Raises:
            ValueError: not such a folder, a truncated or corrupt file; the message names it.
        """
        return checkpoint.load(
            folder, ARCHITECTURE, lambda values: cls(AutoencoderConfig.from_dict(values)),
            device=device, dtype=dtype,
        )  # fmt: skip

    def _advance(
        self, signal: Signal, state: AutoencoderState, dt_scale: float | Tensor, last: bool
    ) -> tuple[Tensor, AutoencoderState]:
        samples = signal._replace(x=signal.x.narrow(-1, 0, 0))
        z, encoder = self.encoder.advance(signal, state.encoder, dt_scale, last)
        queue = join("Autoencoder", state.gaps, samples)
        taken, waiting = split(queue, z.shape[-2] * self.config.total_factor)
        y, decoder = self.decoder.advance(z, taken, state.decoder, dt_scale, last)
        return y, AutoencoderState(encoder, waiting, decoder)
