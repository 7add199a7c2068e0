# SPDX-License-Identifier: MIT
"""What a forecaster is trained and chosen by."""

from __future__ import annotations

import torch
from torch import Tensor

from lrnnx_nn.architectures.regressor import Regressor
from lrnnx_nn.data.series import Series, Split, statistics
from lrnnx_nn.signal_recipes import ForecastConfig
from lrnnx_nn.training.engine import BaseTask, to_device
from lrnnx_nn.training.forecast_scores import season_scale
from lrnnx_nn.training.forecaster import (
    Forecaster,
    Windows,
    forecast,
    one_step_and_rollout,
    windows,
)

VALIDATION_ORIGINS = 64
"""At most so many origins, evenly spread, judge the network while it is trained."""


class ForecastTask(BaseTask):
    """Windows of the training part, and the MASE of free-running forecasts of the validation part.

    Args:
        series: the whole.
        split: its parts.
        config: horizon and the like.

    Raises:
        ValueError: a part too short for its windows.
    """

    metric = "validation_mase"

    def __init__(self, series: Series, split: Split, config: ForecastConfig) -> None:
        self.series, self.config = series, config
        length = config.context + config.horizon
        if len(split.train) < length:
            raise ValueError(
                f"{series.name}: {len(split.train)} rows to train on, expected at least context + "
                f"horizon = {config.context} + {config.horizon}"
            )
        for name, part in (("validation", split.validation), ("test", split.test)):
            if len(part) < config.horizon:
                raise ValueError(
                    f"{series.name}: {len(part)} rows in the {name} part, expected at least the "
                    f"horizon, {config.horizon}"
                )
        self.scale = season_scale(split.train, config.season)
        first = len(split.train)
        self.starts = torch.arange(config.context, first - config.horizon + 1)
        last = first + len(split.validation) - config.horizon
        self.origins = spread(torch.arange(first, last + 1), VALIDATION_ORIGINS)
        self.mean, self.std = statistics(split.train)
        everything = self.windows(self.starts).u.double()
        self.input_std = _deviation(everything.flatten(0, 1))
        changes = everything.diff(dim=1).flatten(0, 1)
        self.change_mean, self.change_std = changes.mean(0), _deviation(changes)
        self.unit = torch.where(self.scale > 0, self.scale, self.std)

    def windows(self, origins: Tensor) -> Windows:
        """Return the windows with these origins."""
        config = self.config
        return windows(
            self.series, origins, config.context, config.horizon, normalize=config.normalize,
            mean=self.mean, std=self.std,
        )  # fmt: skip

    def set_statistics(self, regressor: Regressor) -> None:
        """Tell a regressor the size of centred windows and of changes from row to row."""
        zero = torch.zeros_like(self.input_std)
        values = (zero, self.input_std, self.change_mean, self.change_std)
        regressor.set_statistics(*(value.float() for value in values))

    def batch(self, generator: torch.Generator) -> Windows:
        """Return windows with origins drawn anywhere in the training part."""
        drawn = torch.randint(len(self.starts), (self.batch_size,), generator=generator)
        return self.windows(self.starts[drawn])

    batch_size = 32

    def loss(self, model: Forecaster, batch: Windows) -> Tensor:
        """Return the mean absolute error one step ahead plus that of the free run, in MASE units.

        With ``unroll = 0``: one step ahead alone, over context and horizon.
        """
        data = to_device(batch, model.regressor.input_mean.device)
        unit, context = (self.unit / data.scale.cpu()).to(data.u)[:, None], self.config.context
        counts = data.counts.unsqueeze(-1).expand_as(data.u)
        if not self.config.unroll:
            gaps = {} if data.gaps is None else {"integration_timesteps": data.gaps}
            error = (model(data.u[:, :-1], **gaps) - data.u[:, 1:]).abs() / unit
            return _mean(error, counts[:, 1:])
        stop = context + self.config.unroll
        known, ahead = one_step_and_rollout(model, data.u, data.gaps, context, self.config.unroll)
        near = (known - data.u[:, 1:context]).abs() / unit
        far = (ahead - data.u[:, context:stop]).abs() / unit
        return _mean(near, counts[:, 1:context]) + _mean(far, counts[:, context:stop])

    def evaluate(self, model: Forecaster) -> dict[str, float]:
        """Return the MASE of forecasts from origins in the validation part."""
        data, context = self.windows(self.origins), self.config.context
        error = forecast(model, data, context) - self._truth(self.origins)
        counts = data.counts[:, context:].unsqueeze(-1).expand_as(error)
        return {self.metric: float(_mean(error.abs() / self.unit, counts))}

    def _truth(self, origins: Tensor) -> Tensor:
        return self.series.values[origins[:, None] + torch.arange(self.config.horizon)]


def spread(rows: Tensor, most: int) -> Tensor:
    """Return at most so many of ``rows`` (n,), the first and the last among them, evenly spread."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).round().long()]


def _deviation(x: Tensor) -> Tensor:
    std = x.std(0, correction=0)
    return torch.where(std > 1e-12 * (1 + x.abs().amax(0)), std, torch.ones_like(std))


def _mean(error: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, error, torch.zeros_like(error)).sum() / counts.sum().clamp(min=1)
