# SPDX-License-Identifier: MIT
"""A U-Net along time: down to a coarse rate and back up, with skips; for denoising and the like."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lrnnx_core.models._common import check_choice, check_sizes
from lrnnx_nn.architectures import checkpoint
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
from lrnnx_nn.blocks import reset_parts
from lrnnx_nn.pieces import Signal, pad, zero_padding

ARCHITECTURE = "unet"
PUBLISHED: dict[str, dict[str, Any]] = {
    "attenuate": {"layer_options": {"variant": "pointwise", "sub_state_dim": 16, "tied_dt": False}}
}
"""Published configurations by name: what each sets beside the defaults."""


@dataclasses.dataclass(frozen=True)
class UNetConfig(MultirateConfig):
    """What a `UNet` is built from: the attributes of `MultirateConfig`, and this one.

    Attributes:
        d_output: channels of the result; d_input if None. Where level 0 has another width, a linear
            map leads there at the end.

    Raises:
        ValueError: what `MultirateConfig` refuses, d_output < 1.
    """

    d_output: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_output is not None:
            check_sizes("UNetConfig", d_output=self.d_output)

    @classmethod
    def named(cls, name: str, **changes: Any) -> Self:
        """Return a published configuration.

        Args:
            name: ``attenuate``, the denoiser for speech at 16 kHz of Pei et al. 2024.
            **changes: attributes to set otherwise, such as ``causal=True``.

        Raises:
            ValueError: an unknown name, or a bad value.
        """
        check_choice("UNetConfig.named", "name", name, PUBLISHED)
        return cls.from_dict({**PUBLISHED[name], **changes})


class UNetState(NamedTuple):
    """The state of a `UNet` between two pieces of a stream."""

    down: tuple[DownState, ...]
    neck: tuple[StageBlockState, ...]
    up: tuple[UpState, ...]
    output: tuple[StageBlockState, ...]


class UNet(nn.Module):
    """Map sequences (..., L, d_input) to (..., L, d_output) by way of coarser rates.

    Down: blocks, then one sample for each group of ``factors[i]``. Neck: blocks. Up: a group for
    each sample, the input of that level added, then blocks. At the end the output blocks. See
    `UNetConfig` for what a block is.

    Args:
        config: sizes and choices.

    A length that is no multiple of ``config.total_factor`` is continued with zeros and the result
    cut. Rows of a padded batch are what they are alone. ``lookahead`` is the config's: how many
    samples later an output comes, at most.

    Source: aTENNuate (Pei et al. 2024, arXiv:2409.03377) and the authors' package.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.lookahead = config.lookahead
        width = config.widths[0]
        d_output = config.d_input if config.d_output is None else config.d_output
        self.stem = None if config.d_stem is None else nn.Linear(config.d_input, width)
        self.down = make_contraction(config)
        self.neck = make_blocks(config, len(config.channels), config.n_neck)
        self.up = make_expansion(config, additive=True)
        self.output = make_blocks(config, 0, config.n_output, plain=True)
        mapped = config.d_stem is not None or d_output != width
        self.head = nn.Linear(width, d_output) if mapped else None

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place."""
        reset_parts(*self.children())

    def init_state(self, batch_shape: Sequence[int] = ()) -> UNetState:
        """Return the state before any sample.

        Raises:
            ValueError: a bidirectional layer.
        """
        check_streaming("UNet.init_state", self.config)
        return UNetState(
            self.down.init_state(batch_shape),
            self.neck.init_state(batch_shape),
            self.up.init_state(batch_shape),
            self.output.init_state(batch_shape),
        )

    def forward(
        self,
        u: Tensor,
        *,
        lengths: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Return y (..., L, d_output).

        Args:
            u: (..., L, d_input).
            lengths: (...), samples per row of a right-padded batch; the result is zero beyond.
            integration_timesteps: (..., L), time elapsed before each sample, in units of dt.
                Coarser levels get the mean over each group: gaps of one are the same as none.
            dt_scale: multiplies the step of every layer.

        Raises:
            ValueError: shapes that do not fit.
        """
        check_sequence("UNet", u, self.config.d_input, lengths, integration_timesteps)
        signal = pad(Signal(u, lengths, integration_timesteps), self.config.total_factor)
        signal, skips = self.down(self._enter(signal), dt_scale)
        signal = self.up(self.neck(signal, dt_scale), skips, dt_scale)
        y = self._leave(self.output(signal, dt_scale).x.narrow(-2, 0, u.shape[-2]))
        return zero_padding(y, lengths)

    def prefill(
        self,
        u: Tensor,
        state: UNetState | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, UNetState]:
        """Take the next piece of a stream; return all outputs that are complete with it.

        The outputs of all pieces, and of `finish` behind them, make up what `forward` returns for
        the pieces together. Output t comes with input ``t + lookahead`` at the latest. Rows go on
        in lockstep; one that has ended is fed zeros.

        Args:
            u: (..., L, d_input), of any length.
            state: from `init_state` or the piece before; the beginning if None.
            integration_timesteps: (..., L), in every piece or in none.
            dt_scale: multiplies the step of every layer.

        Returns:
            y (..., M, d_output), M from zero on, and the state.

        Raises:
            ValueError: shapes that do not fit, a bidirectional layer.
        """
        check_streaming("UNet.prefill", self.config)
        check_sequence("UNet.prefill", u, self.config.d_input, None, integration_timesteps)
        state = self.init_state(u.shape[:-2]) if state is None else state
        return self._advance(Signal(u, None, integration_timesteps), state, dt_scale, last=False)

    def finish(self, state: UNetState, *, dt_scale: float | Tensor = 1.0) -> Tensor:
        """Return the outputs (..., M, d_output) that a stream which ends here still owes."""
        check_streaming("UNet.finish", self.config)
        rest = self.down.rest_of_frame(state.down, self.config.d_input)
        y, _ = self._advance(rest, state, dt_scale, last=True)
        return y.narrow(-2, 0, y.shape[-2] - rest.x.shape[-2])

    def step(
        self,
        frame: Tensor,
        state: UNetState,
        *,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, UNetState]:
        """Take one frame of ``config.total_factor`` samples; return its outputs and the state.

        This is `prefill` for streams cut into frames, where every call has the same shapes.

        Raises:
            ValueError: another length, a state within a frame, or convolutions that look ahead, so
                that a frame is not complete when it has come in.
        """
        size = self.config.total_factor
        if self.lookahead != size - 1:
            raise ValueError(
                f"UNet.step: lookahead {self.lookahead} with frames of {size} samples, expected "
                "causal = True or preconv = 0; use prefill"
            )
        begun = self.down.phase(state.down)
        if frame.ndim < 2 or frame.shape[-2] != size or begun:
            raise ValueError(
                f"UNet.step: frame {tuple(frame.shape)} after {begun} samples of a frame, expected "
                f"(..., {size}, {self.config.d_input}) after none"
            )
        return self.prefill(
            frame, state, integration_timesteps=integration_timesteps, dt_scale=dt_scale
        )

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
    ) -> UNet:
        """Read what `save` wrote; the network is in evaluation mode. See `checkpoint.load`.

        Raises:
            ValueError: not such a folder, a truncated or corrupt file; the message names it.
        """
        return checkpoint.load(
            folder, ARCHITECTURE, lambda values: cls(UNetConfig.from_dict(values)),
            device=device, dtype=dtype,
        )  # fmt: skip

    def _advance(
        self, signal: Signal, state: UNetState, dt_scale: float | Tensor, last: bool
    ) -> tuple[Tensor, UNetState]:
        signal, skips, down = self.down.prefill(self._enter(signal), state.down, dt_scale, last)
        signal, neck = self.neck.prefill(signal, state.neck, dt_scale, last)
        signal, up = self.up.prefill(signal, skips, state.up, dt_scale, last)
        signal, output = self.output.prefill(signal, state.output, dt_scale, last)
        return self._leave(signal.x), UNetState(down, neck, up, output)

    def _enter(self, signal: Signal) -> Signal:
        if self.stem is None:
            return signal
        return signal._replace(x=zero_padding(self.stem(signal.x), signal.lengths))

    def _leave(self, x: Tensor) -> Tensor:
        return x if self.head is None else self.head(x)
