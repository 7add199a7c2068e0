# SPDX-License-Identifier: MIT
"""Classical forecasts of series.

`naive`, `drift`, `seasonal_naive` and `seasonal_drift` take observed values with their times and
need no equal spacing; `Autoregression` works on a grid, in which values may be missing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def naive(values: Tensor, times: Tensor, future: Tensor) -> Tensor:
    """Forecast that nothing changes.

    Args:
        values: (L,) or (L, C), observed.
        times: (L,), increasing.
        future: (F,), times after the last one.

    Returns:
        (F,) or (F, C), the last value.

    Raises:
        ValueError: no values, times that do not fit or are not after the history.
    """
    _check_series("naive", values, times, future, at_least=1)
    return values[-1].expand(future.shape + values.shape[1:]).clone()


def drift(values: Tensor, times: Tensor, future: Tensor) -> Tensor:
    """Go on along the straight line through the first and the last value.

    Arguments, result and errors as for `naive`; at least two values.
    """
    _check_series("drift", values, times, future, at_least=2)
    slope = (values[-1] - values[0]) / (times[-1] - times[0])
    ahead = (future - times[-1]).reshape(-1, *(1,) * (values.ndim - 1))
    return values[-1] + slope * ahead


def seasonal_naive(values: Tensor, times: Tensor, future: Tensor, season: float) -> Tensor:
    """Repeat the last season.

    The forecast for time t is the value at ``t - k * season``, with the smallest whole k >= 1 for
    which that is not after the last observation. Where nothing was observed at that very time (a
    gap, a season that is no multiple of the sampling period) it is interpolated linearly between
    the neighbours, both of them in the past.

    Args:
        values: (L,) or (L, C), observed.
        times: (L,), increasing.
        future: (F,), times after the last one.
        season: length of a season, in the unit of ``times``.

    Returns:
        (F,) or (F, C).

    Raises:
        ValueError: as `naive`; a season <= 0, a history shorter than the season it has to repeat.
    """
    if not season > 0:
        raise ValueError(f"seasonal_naive: season = {season}, expected > 0")
    _check_series("seasonal_naive", values, times, future, at_least=1)
    # A rounding error must not turn the last observation into one season earlier.
    seasons = ((future - times[-1]) / season - 1e-9).ceil().clamp(min=1)
    source = future - seasons * season
    slack = 1e-6 * season
    if bool((source < times[0] - slack).any()):
        raise ValueError(
            f"seasonal_naive: the history spans {float(times[-1] - times[0]):g}, expected at least "
            f"the last season of {season:g} before it ends"
        )
    return interpolate(values, times, source)


def seasonal_drift(values: Tensor, times: Tensor, future: Tensor, season: float) -> Tensor:
    """Repeat the last season, raised by the mean change from one season to the next.

    The forecast of `seasonal_naive` for time t repeats ``t - k * season``; to that comes k times
    the mean of ``y(s) - y(s - season)`` over all observed s of the history.

    Arguments, result and errors as for `seasonal_naive`.
    """
    repeated = seasonal_naive(values, times, future, season)
    change = seasonal_changes(values, times, season)
    if not len(change):
        return repeated
    seasons = ((future - times[-1]) / season - 1e-9).ceil().clamp(min=1)
    return repeated + seasons.reshape(-1, *(1,) * (values.ndim - 1)) * change.mean(0)


def seasonal_changes(values: Tensor, times: Tensor, season: float) -> Tensor:
    """Return ``y(t) - y(t - season)`` (M,) or (M, C), interpolated where nothing was observed.

    For every observed t at least a season after the first one.
    """
    earlier = times - season
    known = earlier >= times[0] - 1e-6 * season
    return values[known] - interpolate(values, times, earlier[known])


def interpolate(values: Tensor, times: Tensor, at: Tensor) -> Tensor:
    """Return values (L,) or (L, C) at other times (F,), linear between, constant outside."""
    right = torch.searchsorted(times.contiguous(), at.contiguous()).clamp(0, len(times) - 1)
    left = (right - 1).clamp(min=0)
    span = times[right] - times[left]
    share = (at - times[left]) / torch.where(span == 0, torch.ones_like(span), span)
    share = share.clamp(0, 1).reshape(-1, *(1,) * (values.ndim - 1))
    return values[left] + share * (values[right] - values[left])


class Autoregression(NamedTuple):
    """``y_t = intercept + sum_k coefficients[k] y_{t-1-k}``, on a grid of equal steps."""

    intercept: Tensor
    coefficients: Tensor
    """(order,), that of the latest value first."""

    @classmethod
    def fit(
        cls, values: Tensor, order: int | None = None, *, max_order: int = 30
    ) -> Autoregression:
        """Fit by least squares.

        Args:
            values: (L,), NaN where nothing was observed: an equation counts where all of its
                values were observed.
            order: number of lags; None takes the one of 1 ... ``max_order`` with the least AIC,
                all orders fitted to the same equations.
            max_order: the largest order tried, lowered where there are fewer than two equations
                for each coefficient.

        Raises:
            ValueError: fewer equations than coefficients.
        """
        y = values.double()
        if order is not None:
            if order < 1:
                raise ValueError(f"Autoregression: order = {order}, expected >= 1")
            X, target = _equations(y, order)
            if len(target) < order + 1:
                raise ValueError(
                    f"Autoregression: {len(target)} complete stretches of {order + 1} samples, "
                    f"expected at least {order + 1}"
                )
            return cls._solve(X, target)
        highest = max_order
        while highest > 1 and len(_equations(y, highest)[1]) < 2 * (highest + 1):
            highest -= 1
        X, target = _equations(y, highest)
        if len(target) < highest + 1:
            raise ValueError(f"Autoregression: {len(target)} equations, too few for any order")
        n, best, found = len(target), math.inf, None
        for p in range(1, highest + 1):
            model = cls._solve(X[:, : p + 1], target)
            residual = target - X[:, : p + 1] @ torch.cat(
                [model.intercept[None], model.coefficients]
            )
            power = max(float(residual.square().mean()), torch.finfo(torch.float64).tiny)
            criterion = n * math.log(power) + 2 * (p + 1)
            if criterion < best - 1e-9:
                best, found = criterion, p
        return cls.fit(values, found)

    @classmethod
    def _solve(cls, X: Tensor, target: Tensor) -> Autoregression:
        # gelsd: of a constant series the smallest of the many solutions
        solution = torch.linalg.lstsq(X, target.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        return cls(solution[0], solution[1:])

    @property
    def order(self) -> int:
        """Number of lags."""
        return len(self.coefficients)

    def forecast(self, values: Tensor, steps: int) -> Tensor:
        """Run on by ``steps`` from the end of a history.

        Args:
            values: (L,), the last one observed, NaN for missing ones, which are interpolated
                linearly from observed neighbours.
            steps: how many.

        Returns:
            (steps,).

        Raises:
            ValueError: fewer values than lags, a last value that is missing.
        """
        y = values.to(self.coefficients)
        observed = ~y.isnan()
        if len(y) < self.order or not bool(observed[-1:].all()):
            raise ValueError(
                f"Autoregression.forecast: {len(y)} values, expected at least {self.order} of "
                "which the last one is observed"
            )
        grid = torch.arange(len(y)).to(y)
        past = interpolate(y[observed], grid[observed], grid)[-self.order :].flip(0)
        out: list[Tensor] = []
        for _ in range(steps):
            new = self.intercept + self.coefficients @ past
            out.append(new)
            past = torch.cat([new[None], past[:-1]])
        return torch.stack(out) if out else y.new_empty(0)


def _equations(y: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Return the rows (1, y_{t-1}, ..., y_{t-order}) and targets y_t without missing values."""
    if len(y) <= order:
        return y.new_empty(0, order + 1), y.new_empty(0)
    windows = y.unfold(0, order + 1, 1).flip(-1)
    windows = windows[~windows.isnan().any(-1)]
    return torch.cat([torch.ones_like(windows[:, :1]), windows[:, 1:]], -1), windows[:, 0]


def _check_series(
    where: str, values: Tensor, times: Tensor, future: Tensor, *, at_least: int
) -> None:
    if values.ndim not in (1, 2) or times.shape != values.shape[:1] or future.ndim != 1:
        raise ValueError(
            f"{where}: values {tuple(values.shape)}, times {tuple(times.shape)}, future "
            f"{tuple(future.shape)}; expected (L,) or (L, C), (L,) and (F,)"
        )
    if len(values) < at_least:
        raise ValueError(f"{where}: {len(values)} values, expected at least {at_least}")
    if bool((times.diff() <= 0).any()):
        raise ValueError(f"{where}: times that do not increase")
    if bool((future <= times[-1]).any()):
        raise ValueError(f"{where}: future times, expected all after {float(times[-1]):g}")
