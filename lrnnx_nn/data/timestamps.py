# SPDX-License-Identifier: MIT
"""A column of time as positions in units of its sampling period."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import torch
from torch import Tensor

ON_GRID = 0.1
"""How far a difference may be from a whole number of sampling periods, in periods."""

FIRST_YEAR, LAST_YEAR = 2, 9998
"""Of dates: a day more or less still has a calendar there."""

LARGEST = 1e300
"""Of times as numbers, so that every difference is finite."""

_MONTH = re.compile(r"\d{4}-\d{2}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Clock(NamedTuple):
    """Where position 0 lies and how long a sampling period is.

    Attributes:
        unit: ``count``, ``number``, ``seconds`` (since 1970) or ``months`` (since year 0).
        start: the time at position 0, in that unit.
        step: the sampling period, in that unit.
    """

    unit: str
    start: float
    step: float

    @classmethod
    def counting(cls) -> Clock:
        """Return the clock of rows without time stamps."""
        return cls("count", 0.0, 1.0)

    def moved(self, positions: float) -> Clock:
        """Return the clock whose position 0 is ``positions`` later."""
        return self._replace(start=self.start + positions * self.step)

    @property
    def period(self) -> str:
        """The sampling period as text."""
        if self.unit == "count":
            return "1 row"
        if self.unit == "months":
            return f"{self.step:g} month" + ("s" if self.step != 1 else "")
        if self.unit == "number":
            return f"{self.step:g}"
        units = ((86400, "day"), (3600, "hour"), (60, "minute"))
        seconds, name = next((u for u in units if self.step >= u[0]), (1, "second"))
        count = self.step / seconds
        return f"{count:g} {name}" + ("s" if count != 1 else "")

    def labels(self, positions: Tensor) -> list[str]:
        """Return the time at positions (n,) as text."""
        return [self._label(self.start + self.step * p) for p in positions.tolist()]

    def _label(self, time: float) -> str:
        if self.unit == "months":
            months = round(time)
            return f"{months // 12:04d}-{months % 12 + 1:02d}"
        if self.unit == "seconds":
            moment = _EPOCH + timedelta(seconds=round(time, 3))
            text = moment.replace(tzinfo=None).isoformat()
            return text.removesuffix("T00:00:00")
        return f"{time:.10g}"


def parse_times(
    name: str, texts: Sequence[str], lines: Sequence[int], time_format: str | None = None
) -> tuple[Tensor, Clock, bool]:
    """Turn a column of time into positions.

    Args:
        name: of the file, for messages.
        texts: numbers, or dates in ISO 8601, all of one kind.
        lines: the line of each.
        time_format: of dates that are not ISO 8601.

    Returns:
        Positions (L,) from 0, the clock, and whether all positions are whole numbers.

    Raises:
        ValueError: fewer than two; a cell that is neither, a time that repeats or runs backwards;
            the message says which line.
    """
    if len(texts) < 2:
        raise ValueError(f"{name}: {len(texts)} rows, expected at least two")
    moments: list[datetime] = []
    times: list[float] = []
    numeric = time_format is None and _number(texts[0]) is not None
    for text, line in zip(texts, lines, strict=True):
        if numeric:
            value = _number(text)
            if value is None:
                raise ValueError(f"{name}, line {line}: time {text!r}, expected a number")
            times.append(value)
        else:
            moments.append(_moment(name, text, line, time_format))
            times.append((moments[-1] - _EPOCH).total_seconds())
    for i in range(1, len(times)):
        if times[i] == times[i - 1]:
            raise ValueError(
                f"{name}, line {lines[i]}: time {texts[i]!r} again, as in line {lines[i - 1]}; "
                "expected one row for each time"
            )
        if times[i] < times[i - 1]:
            raise ValueError(
                f"{name}, line {lines[i]}: time {texts[i]!r} is before {texts[i - 1]!r} in line "
                f"{lines[i - 1]}; expected rows sorted by time"
            )
    unit = "number" if numeric else "seconds"
    if not numeric and _whole_months(moments):
        unit = "months"
        times = [12.0 * m.year + m.month - 1 for m in moments]
    return _positions(times, unit)


def _positions(times: Sequence[float], unit: str) -> tuple[Tensor, Clock, bool]:
    stamps = torch.tensor(times, dtype=torch.float64)
    gaps = stamps.diff()
    step = float(gaps.median())
    if unit == "months":
        step = float(math.gcd(*(int(g) for g in gaps.tolist())))
    counts = gaps / step
    whole = counts.round()
    regular = bool(((counts - whole).abs() <= ON_GRID).all() and (whole >= 1).all())
    if regular:
        # differences of rounded stamps (1959.083, 1959.167) do not add up: count, then measure
        step = float((stamps[-1] - stamps[0]) / whole.sum())
        counts = whole
    positions = torch.cat([stamps.new_zeros(1), counts.cumsum(0)])
    return positions, Clock(unit, float(stamps[0]), step), regular


def _whole_months(moments: Sequence[datetime]) -> bool:
    """Return whether all dates lie on one day of the month, or on its last day, at midnight."""
    if any((m.hour, m.minute, m.second, m.microsecond) != (0, 0, 0, 0) for m in moments):
        return False
    if len({m.day for m in moments}) == 1:
        return True
    return all((m + timedelta(days=1)).day == 1 for m in moments)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST else None


def _moment(name: str, text: str, line: int, time_format: str | None) -> datetime:
    try:
        if time_format is not None:
            moment = datetime.strptime(text, time_format)
        else:
            moment = datetime.fromisoformat(f"{text}-01" if _MONTH.fullmatch(text) else text)
    except ValueError as error:
        expected = "a number or an ISO 8601 date" if time_format is None else repr(time_format)
        raise ValueError(f"{name}, line {line}: time {text!r}, expected {expected}") from error
    if not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise ValueError(
            f"{name}, line {line}: time {text!r}, expected a year from {FIRST_YEAR} to {LAST_YEAR}"
        )
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
