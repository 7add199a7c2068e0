# SPDX-License-Identifier: MIT
"""Time series: CSV files, statsmodels' data sets, gaps as elapsed time, and splits in time.

A series is a list of observed rows with positions: times in units of the sampling period, counted
from the first row. A missing value or a missing row is a jump of the positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lrnnx_nn.baselines import interpolate
from lrnnx_nn.data.csv_table import Table, read_table
from lrnnx_nn.data.timestamps import Clock, parse_times
from lrnnx_nn.optional import require

OnGap = Literal["error", "timesteps", "interpolate"]


MOST_EMPTY, MOST_EMPTY_SHARE = 1_000_000, 100
"""A series may span so many sampling periods, or so many for each of its rows."""


class KnownSet(NamedTuple):
    """A data set of statsmodels: its column of time (None: the index), of values, and a season."""

    time: str | None
    column: str
    season: int


STATSMODELS: dict[str, KnownSet] = {
    "sunspots": KnownSet("YEAR", "SUNACTIVITY", 11),
    "co2": KnownSet(None, "co2", 52),
}
"""What `load_series` knows by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Observed rows of one or several columns.

    Attributes:
        name: of the file or set.
        columns: names of the C columns.
        values: (L, C) float64.
        positions: (L,) float64, increasing, in sampling periods since the first row.
        observed: (L,) bool, False where a row was interpolated.
        clock: turns positions back into labels.
        regular: whether all positions are whole numbers.
    """

    name: str
    columns: tuple[str, ...]
    values: Tensor
    positions: Tensor
    observed: Tensor
    clock: Clock
    regular: bool

    def __len__(self) -> int:
        return len(self.values)

    @property
    def gaps(self) -> int:
        """Number of jumps of more than one sampling period (and a half, off the grid)."""
        return int((self.positions.diff() > 1.5).sum())

    @property
    def equally_spaced(self) -> bool:
        """Whether every row follows the one before by one sampling period."""
        return self.regular and self.gaps == 0

    @property
    def integration_timesteps(self) -> Tensor:
        """(L,) sampling periods elapsed before each row; one before the first."""
        first = self.positions.new_ones(min(len(self), 1))
        return torch.cat([first, self.positions.diff()])

    def part(self, start: int, stop: int | None = None) -> Series:
        """Return the rows from ``start`` up to ``stop``, their positions as they were."""
        rows = slice(start, stop)
        return dataclasses.replace(
            self,
            values=self.values[rows],
            positions=self.positions[rows],
            observed=self.observed[rows],
        )

    def labels(self, positions: Tensor) -> list[str]:
        """Return dates or numbers for positions (n,)."""
        return self.clock.labels(positions)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return whole positions (G,) and values (G, C) there, NaN where nothing was observed.

        Raises:
            ValueError: positions that are not whole numbers.
        """
        if not self.regular:
            raise ValueError(f"{self.name}: time stamps off the grid, expected equal spacing")
        index = (self.positions - self.positions[0]).round().long()
        count = int(index[-1]) + 1
        values = self.values.new_full((count, self.values.shape[1]), math.nan)
        values[index] = self.values
        return torch.arange(count).double() + self.positions[0], values


class Split(NamedTuple):
    """A series in three parts, one after the other."""

    train: Series
    validation: Series
    test: Series


def load_series(
    source: str | Path,
    columns: Sequence[str] = (),
    time: str | None = None,
    *,
    on_gap: OnGap | None = None,
    missing: Sequence[str] = (),
    time_format: str | None = None,
) -> Series:
    """Load a series by name or from a CSV file.

    Args:
        source: ``sunspots`` (yearly, 1700 to 2008) or ``co2`` (weekly, Mauna Loa, 1958 to 2001,
            with 59 weeks missing), which come with statsmodels, or a CSV file (see `read_csv`).
        columns: names or numbers, counted from 1, of the columns to read; a set's own if none, and
            of a file the only one besides the time.
        time: name or number of the column of time; a set's own, and of a file none, if None.
        on_gap: see `read_csv`; None is ``timesteps`` for a set by name, ``error`` for a file.
        missing: see `read_csv`.
        time_format: see `read_csv`.

    Raises:
        ValueError: an unknown name, a bad file; see `read_csv`.
        MissingDependencyError: a set by name, and statsmodels is not installed.
    """
    known = STATSMODELS.get(str(source).lower())
    if known is not None:
        table = _from_statsmodels(str(source).lower(), known)
        columns, time = tuple(columns) or (known.column,), time or "time"
        if time_format is not None:
            raise ValueError(f"{source}: time_format is for CSV files")
        return _build(table, columns, time, on_gap or "timesteps", None)
    path = Path(source)
    if not path.suffix and not path.exists():
        raise ValueError(
            f"series {str(source)!r}: no such file, and no known name; known are "
            f"{', '.join(STATSMODELS)}"
        )
    return read_csv(
        path, columns, time, on_gap=on_gap or "error", missing=missing, time_format=time_format
    )


def read_csv(
    path: str | Path,
    columns: Sequence[str] = (),
    time: str | None = None,
    *,
    on_gap: OnGap = "error",
    missing: Sequence[str] = (),
    time_format: str | None = None,
) -> Series:
    """Read columns of a CSV file, with or without a line of names.

    Commas, semicolons or tabs separate (what the first line has most of). Empty lines and lines
    that start with ``#`` are skipped. Empty cells, NA, N/A, NaN, null and none in any case are
    missing values.

    Args:
        path: the file, UTF-8.
        columns: names or numbers, counted from 1; may be left out where there is but one column
            besides the time.
        time: name or number of the column of time: numbers, or dates in ISO 8601 (also
            ``1958-03``). The sampling period is the median of the differences; whole calendar
            months count as such. Without it the rows are taken to be equally spaced.
        on_gap: what to do about missing values, missing rows and time stamps that are not equally
            spaced. ``error``: refuse them. ``timesteps``: leave rows with a missing value out and
            let the positions say how much time went by. ``interpolate``: put linearly interpolated
            rows, marked as not observed, on the grid.
        missing: further texts that stand for a missing value, such as ``-99.99``.
        time_format: of dates that are not ISO 8601, as for ``datetime.strptime``.

    Raises:
        ValueError: a missing or empty file, an unknown column, a cell that is no number or time
            stamp, an infinite number, time stamps that repeat or run backwards, rows of different
            lengths, fewer than two observed rows, and gaps under ``error``; the message names file
            and line.
    """
    table = read_table(Path(path), missing)
    return _build(table, columns, time, on_gap, time_format)


def split_in_time(series: Series, validation: float = 0.15, test: float = 0.15) -> Split:
    """Cut a series in three: the last rows are the test part, those before the validation part.

    Args:
        series: the whole.
        validation: share of the rows.
        test: share of the rows.

    Raises:
        ValueError: shares that are not positive or leave nothing to train on, an empty part.
    """
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError(
            f"split_in_time: validation = {validation}, test = {test}, expected both > 0 and "
            "their sum < 1"
        )
    count = len(series)
    first = count - round(count * (validation + test))
    second = count - round(count * test)
    if not 2 <= first < second < count:
        raise ValueError(f"{series.name}: {count} rows, too few to be cut into three parts")
    return Split(series.part(0, first), series.part(first, second), series.part(second))


def statistics(series: Series) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (C,) of the observed rows; a constant column's deviation is one."""
    values = series.values[series.observed]
    mean, std = values.mean(0), values.std(0, correction=0)
    return mean, torch.where(std > 1e-12 * (1 + mean.abs()), std, torch.ones_like(std))


# --------------------------------------------------------------------------------------- building


def _from_statsmodels(name: str, known: KnownSet) -> Table:
    frame = require(f"statsmodels.datasets.{name}", "demo").load().data
    times: Any = frame.index if known.time is None else frame[known.time]
    cells = [
        [t.isoformat() if known.time is None else repr(float(t))] + [repr(float(v)) for v in row]
        for t, row in zip(times, frame[[known.column]].to_numpy(), strict=True)
    ]
    rows = [["" if cell == "nan" else cell for cell in row] for row in cells]
    return Table(name, ("time", known.column), rows, list(range(2, len(rows) + 2)), frozenset({""}))


def _build(
    table: Table,
    columns: Sequence[str],
    time: str | None,
    on_gap: OnGap,
    time_format: str | None,
) -> Series:
    if on_gap not in get_args(OnGap):
        raise ValueError(f"on_gap = {on_gap!r}, expected one of {list(get_args(OnGap))}")
    if time is None and time_format is not None:
        raise ValueError("time_format: there is no column of time to read with it")
    when = None if time is None else table.find(time)
    chosen = _choose(table, columns, when)
    values = torch.tensor([table.numbers(i) for i in chosen], dtype=torch.float64).T
    if when is None:
        positions, clock, regular = torch.arange(len(values)).double(), Clock.counting(), True
    else:
        texts = table.cells(when)
        positions, clock, regular = parse_times(table.name, texts, table.lines, time_format)
    present = ~values.isnan().any(-1)
    if int(present.sum()) < 2:
        raise ValueError(f"{table.name}: {int(present.sum())} complete rows, expected at least two")
    if on_gap == "error":
        _refuse_gaps(table, chosen, values, positions, regular, clock)
    if regular or on_gap == "interpolate":
        _refuse_leaps(table, positions, clock)
    names = tuple(table.name_of(i) for i in chosen)
    name = Path(table.name).stem
    if on_gap == "interpolate":
        return _interpolated(name, names, values, positions, clock)
    positions, clock = _rebased(positions[present], clock)
    observed = torch.ones(len(positions), dtype=torch.bool)
    return Series(name, names, values[present], positions, observed, clock, regular)


def _refuse_leaps(table: Table, positions: Tensor, clock: Clock) -> None:
    """Refuse a series that is nearly nothing but one gap: its grid would not fit into memory."""
    if float(positions[-1]) <= max(MOST_EMPTY, MOST_EMPTY_SHARE * len(positions)):
        return
    row = int(positions.diff().argmax()) + 1
    raise ValueError(
        f"{table.name}, line {table.lines[row]}: "
        f"{float(positions[row] - positions[row - 1]):g} sampling periods of {clock.period} since "
        f"the row before, and {len(positions)} rows in all; expected a time stamp without an error"
    )


def _rebased(positions: Tensor, clock: Clock) -> tuple[Tensor, Clock]:
    return positions - positions[0], clock.moved(float(positions[0]))


def _choose(table: Table, columns: Sequence[str], when: int | None) -> list[int]:
    if columns:
        chosen = [table.find(column) for column in columns]
        for i in chosen:
            if chosen.count(i) > 1 or i == when:
                raise ValueError(f"{table.name}: column {table.name_of(i)!r} is asked for twice")
        return chosen
    others = [i for i in range(table.width) if i != when]
    if len(others) != 1:
        names = ", ".join(table.name_of(i) for i in range(table.width))
        raise ValueError(f"{table.name}: {table.width} columns ({names}); say which one to read")
    return others


def _refuse_gaps(
    table: Table,
    chosen: Sequence[int],
    values: Tensor,
    positions: Tensor,
    regular: bool,
    clock: Clock,
) -> None:
    remedy = "choose on-gap timesteps (elapsed time tells the model) or interpolate"
    lost = values.isnan().nonzero()
    if len(lost):
        row, column = (int(k) for k in lost[0])
        raise ValueError(
            f"{table.name}, line {table.lines[row]}: no value of "
            f"{table.name_of(chosen[column])!r} ({len(lost)} missing in all); {remedy}"
        )
    jumps = (positions.diff() > 1.5).nonzero()
    if len(jumps):
        row = int(jumps[0]) + 1
        raise ValueError(
            f"{table.name}, line {table.lines[row]}: "
            f"{float(positions[row] - positions[row - 1]):g} sampling periods of {clock.period} "
            f"since the row before ({len(jumps)} such gaps in all); {remedy}"
        )
    if not regular:
        row = int(((positions.diff() - 1).abs() > 1e-6).nonzero()[0]) + 1
        raise ValueError(
            f"{table.name}, line {table.lines[row]}: the time stamps are not equally spaced "
            f"({float(positions[row] - positions[row - 1]):g} sampling periods of {clock.period} "
            f"since the row before); {remedy}"
        )


def _interpolated(
    name: str, names: tuple[str, ...], values: Tensor, positions: Tensor, clock: Clock
) -> Series:
    """Put every column on the grid from the first complete row to the last one."""
    present = (~values.isnan().any(-1)).nonzero().flatten()
    first, last = float(positions[present[0]]), float(positions[present[-1]])
    grid = torch.arange(math.floor(last - first + 1e-6) + 1).double() + first
    columns: list[Tensor] = []
    observed = torch.ones(len(grid), dtype=torch.bool)
    for column in values.unbind(-1):
        known = ~column.isnan()
        columns.append(interpolate(column[known], positions[known], grid))
        # off the grid, a row counts as observed if a time stamp is nearest to it
        observed &= _distance(positions[known], grid) < 0.5
    positions, clock = _rebased(grid, clock)
    return Series(name, names, torch.stack(columns, -1), positions, observed, clock, True)


def _distance(times: Tensor, at: Tensor) -> Tensor:
    """Return how far each of ``at`` (G,) is from the nearest of ``times`` (L,), increasing."""
    right = torch.searchsorted(times, at).clamp(max=len(times) - 1)
    left = (right - 1).clamp(min=0)
    return torch.minimum((times[right] - at).abs(), (times[left] - at).abs())
