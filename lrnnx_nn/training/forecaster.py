# SPDX-License-Identifier: MIT
"""A regressor that forecasts: windows of a series in, the next value out, its own outputs fed back.

A sample goes in with the time until the sample that it is to predict: the state is carried over
that gap with the sample as its input, and is read at the time of the prediction. So a forecast
knows how far ahead it looks, across gaps of the series too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrnnx_nn.architectures.regressor import Regressor
from lrnnx_nn.data.series import Series
from lrnnx_nn.generation import rollout


class Forecaster(nn.Module):
    """Predict each next sample as this one plus what a regressor says; a `lrnnx_nn.Mixer`.

    Args:
        regressor: a causal one with ``output="sequence"`` and as many targets as inputs.

    Raises:
        ValueError: another regressor.
    """

    def __init__(self, regressor: Regressor) -> None:
        super().__init__()
        config = regressor.config
        if config.output != "sequence" or config.d_target != config.d_input:
            raise ValueError(
                f"Forecaster: output = {config.output!r} with {config.d_input} inputs and "
                f"{config.d_target} targets, expected 'sequence' and as many of both"
            )
        self.regressor = regressor

    def init_state(self, batch_shape: Sequence[int] = ()) -> Any:
        """Return the state before any sample."""
        return self.regressor.init_state(batch_shape)

    def forward(self, u: Tensor, **options: Any) -> Tensor:
        """Return the prediction of the next sample for every sample of u (..., L, C)."""
        return u + self.regressor(u, **options)

    def prefill(self, u: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        """Do the same for a part of a series; return also the state after it."""
        y, state = self.regressor.prefill(u, state, **options)
        return u + y, state

    def step(self, u_t: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        """Take one step: u_t (..., C)."""
        y, state = self.regressor.step(u_t, state, **options)
        return u_t + y, state


class Windows(NamedTuple):
    """Stretches of a series, centred; the last ``horizon`` rows are what is to be forecast.

    Attributes:
        u: (B, context + horizon, C) float32: values less ``offset``, over ``scale``.
        counts: (B, context + horizon) bool, False where a row was interpolated.
        offset: (B, C) float64.
        scale: (B, C) float64.
        gaps: (B, context + horizon - 1), sampling periods from each row to the next; None if all
            of them are one.
    """

    u: Tensor
    counts: Tensor
    offset: Tensor
    scale: Tensor
    gaps: Tensor | None


def windows(
    series: Series,
    origins: Tensor,
    context: int,
    horizon: int,
    *,
    normalize: str,
    mean: Tensor,
    std: Tensor,
) -> Windows:
    """Cut windows out of a series.

    Args:
        series: any.
        origins: (B,) the first row of each that is to be forecast.
        context: rows before it.
        horizon: rows from it on.
        normalize: see `ForecastConfig`.
        mean: (C,) of the training part.
        std: (C,) of the training part.
    """
    rows = origins[:, None] + torch.arange(-context, horizon)
    values = series.values[rows]
    offset, scale = mean.expand(len(origins), -1), std.expand(len(origins), -1)
    if normalize == "last":
        offset = values[:, context - 1]
    elif normalize == "window":
        offset = values[:, :context].mean(1)
        # a context that does not move keeps a hundredth of the training part's deviation
        scale = values[:, :context].std(1, correction=0).maximum(0.01 * std)
    gaps = None if series.equally_spaced else series.positions[rows].diff(dim=-1).float()
    u = ((values - offset[:, None]) / scale[:, None]).float()
    return Windows(u, series.observed[rows], offset, scale, gaps)


def one_step_and_rollout(
    model: Forecaster, u: Tensor, gaps: Tensor | None, context: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Predict rows 1 ... context - 1 one step ahead, and the ``steps`` rows after them freely.

    Args:
        model: the network.
        u: (B, context, C) or longer.
        gaps: as `Windows.gaps`, or None.
        context: rows to read.
        steps: rows to run on.

    Returns:
        (B, context - 1, C) and (B, steps, C).
    """

    def between(start: int, stop: int) -> dict[str, Any]:
        return {} if gaps is None else {"integration_timesteps": gaps[:, start:stop]}

    last = context - 1
    known, state = model.prefill(u[:, :last], **between(0, last))
    ahead, _ = rollout(model, u[:, last:context], steps, state, **between(last, last + steps))
    return known, ahead


@torch.no_grad()
def forecast(model: Forecaster, data: Windows, context: int) -> Tensor:
    """Run freely from the end of each context over the horizon.

    Args:
        model: in evaluation mode, on any device.
        data: windows; what stands in the horizon is not read, its times are.
        context: rows before the origin.

    Returns:
        (B, horizon, C) float64, in the series' own unit.
    """
    device = model.regressor.input_mean.device
    horizon = data.u.shape[1] - context
    gaps = None if data.gaps is None else data.gaps.to(device)
    _, ahead = one_step_and_rollout(model, data.u[:, :context].to(device), gaps, context, horizon)
    return ahead.double().cpu() * data.scale[:, None] + data.offset[:, None]
