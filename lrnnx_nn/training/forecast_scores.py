# SPDX-License-Identifier: MIT
"""Forecasts from many origins, the baselines' from the same ones, and how far all are off."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnnx_nn import baselines
from lrnnx_nn.baselines import Autoregression
from lrnnx_nn.data.series import Series
from lrnnx_nn.files import write_atomically
from lrnnx_nn.metrics import mae, mase, rmse

NETWORK, SEASONAL = "network", "seasonal naive"


def season_scale(train: Series, season: int) -> Tensor:
    """Return the unit of the MASE for each column, (C,): see `lrnnx_nn.metrics.seasonal_scale`.

    Rows a season apart count where both were observed; of time stamps off the grid, the earlier one
    is interpolated.

    Raises:
        ValueError: no two rows a season apart.
    """
    values, times = train.values[train.observed], train.positions[train.observed]
    changes = baselines.seasonal_changes(values, times, season)
    if train.regular and len(changes):
        later = times[times >= times[0] + season - 1e-6 * season]
        changes = changes[torch.isin((later - season).round(), times.round())]
    if not len(changes):
        raise ValueError(
            f"{train.name}: the training part spans {float(times[-1] - times[0]):g} sampling "
            f"periods, expected two observed rows a season of {season} apart"
        )
    return changes.abs().mean(0)


def baseline_forecasts(
    series: Series, origins: Tensor, horizon: int, season: int, fitted: Series
) -> dict[str, Tensor]:
    """Forecast by every baseline from the whole history before each origin.

    Args:
        series: all rows.
        origins: (O,) first rows to be forecast.
        horizon: rows from there on.
        season: sampling periods.
        fitted: what the autoregression is fitted to, once; its order has the least AIC.

    Returns:
        (O, horizon, C) by name. The autoregression is missing where rows are off the grid.
    """
    found: dict[str, list[Tensor]] = {
        "naive": [], "drift": [], SEASONAL: [], "seasonal drift": [],
    }  # fmt: skip
    fits = _autoregressions(fitted, season) if series.regular else []
    regressed: list[Tensor] = []
    for origin in origins.tolist():
        values, times = series.values[:origin], series.positions[:origin]
        future = series.positions[origin : origin + horizon]
        found["naive"].append(baselines.naive(values, times, future))
        found["drift"].append(baselines.drift(values, times, future))
        found[SEASONAL].append(baselines.seasonal_naive(values, times, future, season))
        found["seasonal drift"].append(baselines.seasonal_drift(values, times, future, season))
        if fits:
            regressed.append(_regressed(series.part(0, origin), future, fits))
    named = {name: torch.stack(rows) for name, rows in found.items()}
    if fits:
        orders = "/".join(str(fit.order) for fit in fits)
        named[f"AR({orders})"] = torch.stack(regressed)
    return named


def _autoregressions(series: Series, season: int) -> list[Autoregression]:
    if not series.regular:
        return []
    _, values = series.grid()
    highest = max(30, season + 4)
    return [Autoregression.fit(column, max_order=highest) for column in values.unbind(-1)]


def _regressed(history: Series, future: Tensor, fits: Sequence[Autoregression]) -> Tensor:
    _, values = history.grid()
    ahead = (future - history.positions[-1]).round().long()
    runs = [
        fit.forecast(column, int(ahead[-1]))[ahead - 1]
        for fit, column in zip(fits, values.unbind(-1), strict=True)
    ]
    return torch.stack(runs, -1)


def scores(
    forecasts: Mapping[str, Tensor],
    truth: Tensor,
    counts: Tensor,
    scale: Tensor,
    columns: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Judge forecasts.

    Args:
        forecasts: (O, horizon, C) by method.
        truth: (O, horizon, C).
        counts: (O, horizon) bool, which rows were observed.
        scale: (C,) unit of the MASE.
        columns: names of the C columns.

    Returns:
        For each method ``mase`` (over all columns), ``mase_by_step`` (horizon), and for each column
        ``mase``, ``mae`` and ``rmse``; None where a figure is not finite.
    """
    found: dict[str, dict[str, Any]] = {}
    mask = counts.flatten()
    for name, given in forecasts.items():
        each: dict[str, dict[str, float | None]] = {}
        by_step: list[Tensor] = []
        for c, column in enumerate(columns):
            x, y = given[..., c], truth[..., c]
            flat = (x.flatten(), y.flatten())
            each[column] = {
                "mase": _finite(mase(*flat, scale[c], mask=mask)),
                "mae": _finite(mae(*flat, mask=mask)),
                "rmse": _finite(rmse(*flat, mask=mask)),
            }
            by_step.append(mase(x.T, y.T, scale[c], mask=counts.T))
        whole = [values["mase"] for values in each.values()]
        known = [value for value in whole if value is not None]
        found[name] = {
            "mase": sum(known) / len(known) if len(known) == len(whole) else None,
            "mase_by_step": [_finite(v) for v in torch.stack(by_step).mean(0)],
            "columns": each,
        }
    return found


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def write_forecasts(
    path: Path, series: Series, origins: Tensor, forecasts: Mapping[str, Tensor]
) -> None:
    """Write every forecast as CSV: one line for each origin, step and column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["origin", "step", "time", "column", "truth", *forecasts])
    labels = series.labels(series.positions)
    for i, origin in enumerate(origins.tolist()):
        horizon = next(iter(forecasts.values())).shape[1]
        for k in range(horizon):
            row = origin + k
            for c, column in enumerate(series.columns):
                truth = f"{float(series.values[row, c]):.6g}" if bool(series.observed[row]) else ""
                values = [f"{float(given[i, k, c]):.6g}" for given in forecasts.values()]
                writer.writerow([labels[origin - 1], k + 1, labels[row], column, truth, *values])
    write_atomically(path, text.getvalue())
