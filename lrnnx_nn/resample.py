# SPDX-License-Identifier: MIT
"""Fewer and more samples along time, by linear maps of groups of samples; channels-last.

A group is ``factor`` samples in a row. `Downsample` maps each group to one sample, `Upsample` each
sample to a group. A stream may come in pieces of any length: what does not fill a group waits in
the state, and the result comes with the sample that fills it, which is ``factor - 1`` samples after
the group's first one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrnnx_core.models._common import check_sizes
from lrnnx_nn.pieces import (
    Signal,
    Waiting,
    check_layout,
    join,
    nothing,
    pad,
    split,
    zero_padding,
)


class Downsample(nn.Module):
    """Map each group of ``factor`` samples to one, by one linear map without bias.

        y_t = W [x_{rt}, ..., x_{rt+r-1}]

    Args:
        d_input: channels of x.
        d_output: channels of y.
        factor: samples a group, r.
        device: where the weight is made.
        dtype: its dtype.

    Raises:
        ValueError: a size < 1.

    A sequence that ends within a group is continued with zeros (and gaps of one). Weights are
    uniform with variance 1 / (r d_input), which keeps the variance of white noise.
    """

    def __init__(
        self,
        d_input: int,
        d_output: int,
        factor: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("Downsample", d_input=d_input, d_output=d_output, factor=factor)
        self.d_input, self.d_output, self.factor = d_input, d_output, factor
        self.projection = LinearMap(factor * d_input, d_output, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weight again, in place."""
        self.projection.reset_parameters()

    def init_state(self, batch_shape: Sequence[int] = ()) -> Waiting:
        """Return the state before any sample: nothing waits."""
        return nothing(self.projection.weight, batch_shape, self.d_input)

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
    ) -> Signal:
        """Return one sample for each group of whole sequences.

        Args:
            x: (..., L, d_input).
            lengths: (...) samples per row of a right-padded batch; values at padding do not matter.
            integration_timesteps: (..., L) gaps; those of a group are averaged, which is their sum
                in units of the coarser step.

        Returns:
            `Signal` of x (..., ceil(L / r), d_output), its lengths and its gaps. Padding is zero.

        Raises:
            ValueError: shapes that do not fit; lengths beyond L (eager, on a CPU).
        """
        self._check(x)
        where = "Downsample"
        check_layout(where, x, lengths, integration_timesteps)
        padded = pad(Signal(x, lengths, integration_timesteps), self.factor)
        return self.whole(padded)

    def whole(self, signal: Signal) -> Signal:
        """Return one sample for each group, where every row ends with a group."""
        x, lengths, gaps = signal
        groups = x.shape[-2] // self.factor
        y = self.projection(x.reshape(*x.shape[:-2], groups, self.factor * self.d_input))
        if gaps is not None:
            gaps = gaps.reshape(*gaps.shape[:-1], groups, self.factor).mean(-1)
        return Signal(y, None if lengths is None else lengths // self.factor, gaps)

    def prefill(
        self,
        x: Tensor,
        state: Waiting | None = None,
        *,
        integration_timesteps: Tensor | None = None,
    ) -> tuple[Signal, Waiting]:
        """Return one sample for each group that is full now, and what waits for the next piece.

        Args:
            x: (..., L, d_input), the next piece of the stream, of any length.
            state: from `init_state` or the piece before; the beginning if None.
            integration_timesteps: (..., L), in every piece or in none.

        Raises:
            ValueError: shapes that do not fit.
        """
        self._check(x)
        check_layout("Downsample", x, None, integration_timesteps)
        state = self.init_state(x.shape[:-2]) if state is None else state
        joined = join("Downsample", state, Signal(x, None, integration_timesteps))
        full, rest = split(joined, joined.samples // self.factor * self.factor)
        return self.whole(full), rest

    def finish(self, state: Waiting) -> Signal:
        """Return the last sample of a stream, if a group has begun: (..., 0 or 1, d_output)."""
        return self.whole(pad(state.signal(), self.factor))

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{self.d_input}, {self.d_output}, factor={self.factor}"

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[-1] != self.d_input:
            raise ValueError(f"Downsample: x {tuple(x.shape)}, expected (..., L, {self.d_input})")


class Upsample(nn.Module):
    """Map each sample to a group of ``factor``, by one linear map without bias.

        [y_{rt}, ..., y_{rt+r-1}] = W x_t

    Args:
        d_input: channels of x.
        d_output: channels of y.
        factor: samples a group, r.
        device: where the weight is made.
        dtype: its dtype.

    Raises:
        ValueError: a size < 1.

    It has no state: pieces of a stream are mapped by `forward`. Weights are uniform with variance
    1 / d_input, which keeps the variance.
    """

    def __init__(
        self,
        d_input: int,
        d_output: int,
        factor: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("Upsample", d_input=d_input, d_output=d_output, factor=factor)
        self.d_input, self.d_output, self.factor = d_input, d_output, factor
        self.projection = LinearMap(d_input, factor * d_output, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weight again, in place."""
        self.projection.reset_parameters()

    def forward(
        self, x: Tensor, *, length: int | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Return ``factor`` samples for each of x (..., n, d_input).

        Args:
            x: (..., n, d_input).
            length: samples to return, from the beginning; factor n if None.
            lengths: (...) samples of each row of the *result*; zeros beyond.

        Returns:
            y (..., length, d_output).

        Raises:
            ValueError: shapes that do not fit, a length that x does not cover.
        """
        if x.ndim < 2 or x.shape[-1] != self.d_input:
            raise ValueError(f"Upsample: x {tuple(x.shape)}, expected (..., n, {self.d_input})")
        n = x.shape[-2]
        if length is not None and not 0 <= length <= n * self.factor:
            raise ValueError(f"Upsample: length = {length}, expected 0 ... {n * self.factor}")
        y = self.projection(x).reshape(*x.shape[:-2], n * self.factor, self.d_output)
        y = y if length is None else y.narrow(-2, 0, length)
        check_layout("Upsample", y, lengths, None)
        return zero_padding(y, lengths)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{self.d_input}, {self.d_output}, factor={self.factor}"


class LinearMap(nn.Linear):
    """An ``nn.Linear`` without bias whose initial weights keep the variance of its input."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weight again, uniform with variance 1 / in_features."""
        bound = (3 / self.in_features) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
