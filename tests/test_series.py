"""Series: CSV files in every shape, gaps three ways, time stamps, and all that is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_nn.data.series import (
    STATSMODELS,
    Series,
    load_series,
    read_csv,
    split_in_time,
    statistics,
)

same = torch.testing.assert_close


def T(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def written(path: Path, text: str) -> Path:
    file = path / "mine.csv"
    file.write_text(text, encoding="utf-8")
    return file


def read(path: Path, text: str, *columns: str, **options: Any) -> Series:
    return read_csv(written(path, text), columns, **options)


# ------------------------------------------------------------------------------- known sets


def test_sunspots() -> None:
    pytest.importorskip("statsmodels")
    series = load_series("Sunspots")
    assert (len(series), series.columns, series.equally_spaced) == (309, ("SUNACTIVITY",), True)
    same(series.values[:3, 0], T(5, 11, 16))
    assert series.labels(series.positions[[0, -1]]) == ["1700", "2008"]
    same(series.integration_timesteps, torch.ones(309).double())
    with pytest.raises(ValueError, match="time_format is for CSV"):
        load_series("sunspots", time_format="%Y")


def test_co2_has_its_real_gaps_as_time() -> None:
    pytest.importorskip("statsmodels")
    series = load_series("co2")
    assert (len(series), series.regular, series.equally_spaced) == (2284 - 59, True, False)
    assert series.clock.period == "7 days"
    assert int(series.positions[-1]) == 2283
    assert series.labels(series.positions[[0, 6, -1]]) == ["1958-03-29", "1958-05-17", "2001-12-29"]
    gaps = series.integration_timesteps
    assert float(gaps.sum()) == 2284
    assert (float(gaps[6]), float(gaps.max())) == (2.0, 19.0)
    filled = load_series("co2", on_gap="interpolate")
    assert (len(filled), int(filled.observed.sum()), filled.equally_spaced) == (2284, 2225, True)
    same(filled.values[6], (filled.values[5] + filled.values[7]) / 2)
    with pytest.raises(ValueError, match=r"co2, line 8: no value of 'co2' \(59 missing in all\)"):
        load_series("co2", on_gap="error")


def test_names_and_seasons() -> None:
    assert {name: known.season for name, known in STATSMODELS.items()} == {
        "sunspots": 11,
        "co2": 52,
    }
    with pytest.raises(ValueError, match="no such file, and no known name; known are sunspots, co"):
        load_series("sunspot")
    with pytest.raises(ValueError, match=r"nothing\.csv: no such file"):
        load_series("nothing.csv")


# ------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", [True, False])
def test_columns_by_name_and_number(tmp_path: Path, separator: str, header: bool) -> None:
    lines = ["t,a,b"] * header + ["0,1.5,-1", "1,2,-2", "2,2.5e0,-3"]
    text = "\n".join(lines).replace(",", separator)
    wanted = ("b", "a") if header else ("3", "2")
    series = read(tmp_path, text, *wanted, time="t" if header else "1")
    same(series.values, torch.stack([T(-1, -2, -3), T(1.5, 2, 2.5)], -1))
    assert series.columns == wanted
    assert (series.name, series.clock.period) == ("mine", "1")
    assert series.equally_spaced
    if header:
        same(read(tmp_path, text, "3", time="1").values[:, 0], T(-1, -2, -3))


def test_the_only_column_needs_no_name(tmp_path: Path) -> None:
    series = read(tmp_path, "1\n2\n4\n")
    same(series.values, T(1, 2, 4)[:, None])
    assert (series.columns, series.clock.period) == (("1",), "1 row")
    same(read(tmp_path, "date,y\n2020-01-01,3\n2020-01-02,4\n", time="date").values[:, 0], T(3, 4))


def test_comments_quotes_and_empty_lines(tmp_path: Path) -> None:
    text = '# a comment, with a comma\n\n"y","note, long"\n1,"a ""b"""\n\n2,c\n# end\n'
    same(read(tmp_path, text, "y").values[:, 0], T(1, 2))
    with pytest.raises(ValueError, match="line 8: 'x' in column 'y', expected a finite number"):
        read(tmp_path, text + "x,d\n", "y")


# --------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("stamps", "period", "label"),
    [
        (["2020-01-01", "2020-01-02", "2020-01-03"], "1 day", "2020-01-03"),
        (["2020-01-30T10:00", "2020-01-30T11:00", "2020-01-30T12:00"], "1 hour",
         "2020-01-30T12:00:00"),
        (["2020-01-01 00:00:00", "2020-01-01 00:15:00", "2020-01-01 00:30:00"], "15 minutes",
         "2020-01-01T00:30:00"),
        (["2019-12", "2020-01", "2020-02"], "1 month", "2020-02"),
        (["2019-01-31", "2019-02-28", "2019-03-31"], "1 month", "2019-03"),
        (["2019-01-01", "2019-04-01", "2019-07-01"], "3 months", "2019-07"),
        (["1999", "2000", "2001"], "1", "2001"),
        (["1959.083", "1959.167", "1959.25"], "0.0835", "1959.25"),
        (["-1e-3", "0", "0.001"], "0.001", "0.001"),
    ],
)  # fmt: skip
def test_sampling_periods(tmp_path: Path, stamps: list[str], period: str, label: str) -> None:
    text = "".join(f"{stamp},{i}\n" for i, stamp in enumerate(stamps))
    series = read(tmp_path, text, time="1")
    same(series.positions, T(0, 1, 2))
    assert series.clock.period == period
    assert series.labels(series.positions)[-1] == label


def test_time_format(tmp_path: Path) -> None:
    text = "31.12.2019;1\n01.01.2020;2\n"
    series = read(tmp_path, text, time="1", time_format="%d.%m.%Y")
    assert series.labels(series.positions) == ["2019-12-31", "2020-01-01"]
    with pytest.raises(ValueError, match=r"line 1: time '31\.12\.2019', expected a number or an I"):
        read(tmp_path, text, time="1")
    with pytest.raises(ValueError, match="no column of time to read with it"):
        read(tmp_path, "1\n2\n", time_format="%Y")


def test_rounded_stamps_do_not_drift(tmp_path: Path) -> None:
    """Monthly decimal years of three digits: each difference is 0.083 or 0.084."""
    text = "".join(f"{1959 + i / 12:.3f},{i}\n" for i in range(120))
    series = read(tmp_path, text, time="1")
    same(series.positions, torch.arange(120).double())
    assert float(series.clock.step) == pytest.approx(1 / 12, rel=1e-4)


# --------------------------------------------------------------------------------------- gaps

GAPPY = "day,y,z\n2020-01-01,1,5\n2020-01-02,,6\n2020-01-03,3,7\n2020-01-06,9,NA\n2020-01-07,7,9\n"


def test_gaps_as_timesteps(tmp_path: Path) -> None:
    series = read(tmp_path, GAPPY, "y", time="day", on_gap="timesteps")
    same(series.values[:, 0], T(1, 3, 9, 7))
    same(series.positions, T(0, 2, 5, 6))
    same(series.integration_timesteps, T(1, 2, 3, 1))
    assert (series.gaps, series.regular, series.equally_spaced) == (2, True, False)
    positions, grid = series.grid()
    same(positions, torch.arange(7).double())
    same(grid[:, 0].nan_to_num(-1), T(1, -1, 3, -1, -1, 9, 7))
    both = read(tmp_path, GAPPY, "y", "z", time="day", on_gap="timesteps")
    same(both.positions, T(0, 2, 6))  # complete rows alone
    same(both.part(1).grid()[0], T(2, 3, 4, 5, 6))


def test_gaps_interpolated(tmp_path: Path) -> None:
    series = read(tmp_path, GAPPY, "y", time="day", on_gap="interpolate")
    same(series.values[:, 0], T(1, 2, 3, 5, 7, 9, 7))
    assert series.observed.tolist() == [True, False, True, False, False, True, True]
    assert series.equally_spaced
    mean, std = statistics(series)
    same(mean, T(5))
    same(std, T(math.sqrt(10)))


def test_gaps_without_time_stamps(tmp_path: Path) -> None:
    series = read(tmp_path, "y,x\n,1\n1,1\n-99.99,1\n4,1\n,1\n", "y", on_gap="timesteps",
                  missing=["-99.99"])  # fmt: skip
    same(series.positions, T(0, 2))
    assert series.labels(series.positions) == ["1", "3"]  # the first row has no value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GAPPY,
            r"mine\.csv, line 3: no value of 'y' \(1 missing in all\); choose on-gap t",
        ),
        (
            GAPPY.replace(",,", ",2,"),
            r"line 5: 3 sampling periods of 1 day since the row bef",
        ),
        (
            "t,y\n0,1\n1,2\n2.3,3\n3.3,3\n",
            r"line 4: the time stamps are not equally spaced \(1\.3",
        ),
    ],
)
def test_gaps_are_refused_by_default(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, "y", time="1")


def test_stamps_off_the_grid(tmp_path: Path) -> None:
    text = "t,y\n0,1\n1,2\n2.25,3\n3.25,4\n"
    series = read(tmp_path, text, time="t", on_gap="timesteps")
    same(series.positions, T(0, 1, 2.25, 3.25))
    assert not series.regular
    with pytest.raises(ValueError, match="off the grid"):
        series.grid()
    even = read(tmp_path, text, time="t", on_gap="interpolate")
    same(even.positions, T(0, 1, 2, 3))
    same(even.values[:, 0], T(1, 2, 2.8, 3.75))
    assert bool(even.observed.all())


@pytest.mark.parametrize("on_gap", ["timesteps", "interpolate"])
def test_a_leap_that_would_fill_the_memory(tmp_path: Path, on_gap: str) -> None:
    text = "t,y\n0,1\n1,2\n2,4\n{},3\n"
    with pytest.raises(ValueError, match=r"line 5: 1e\+12 sampling periods of 1 since the row be"):
        read(tmp_path, text.format(10**12 + 2), time="t", on_gap=on_gap)
    assert len(read(tmp_path, text.format(10**5), time="t", on_gap=on_gap)) in (4, 10**5 + 1)
    # off the grid no grid is made
    bursts = read(tmp_path, "t,y\n0,1\n1,2\n2.4,4\n1e12,3\n", time="t", on_gap="timesteps")
    assert not bursts.regular


def test_interpolation_takes_memory_by_the_row(tmp_path: Path) -> None:
    n = 40_000  # rows times rows would be 12.8 GB
    text = "".join(f"{t},{t % 7}\n" for t in range(n) if t % 1000 != 5)
    series = read(tmp_path, text, "2", time="1", on_gap="interpolate")
    assert (len(series), int((~series.observed).sum())) == (n, n // 1000)
    assert not bool(series.observed[5])


# ------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "no rows"),
        ("# nothing\n", {}, "no rows"),
        ("a,b\n", {}, "a line of names and no rows"),
        ("a\n1\n", {}, "1 complete rows, expected at least two"),
        ("a\n1\n\n,\n", {}, r"line 4: 2 cells, expected 1"),
        ("a,b\n1,2\n3\n", {"columns": ["a"]}, r"line 3: 1 cells, expected 2"),
        ("a,b\n1,2\n3,4\n", {}, r"2 columns \(a, b\); say which one to read"),
        ("a,b\n1,2\n3,4\n", {"columns": ["c"]}, "no column 'c', expected names a, b or numbers 1"),
        ("1,2\n3,4\n", {"columns": ["3"]}, "no column '3', expected numbers 1 to 2"),
        ("a,a\n1,2\n3,4\n", {"columns": ["a"]}, "2 columns are called 'a'"),
        ("a,b\n1,2\n3,4\n", {"columns": ["a", "1"]}, "column 'a' is asked for twice"),
        ("a,b\n1,2\n3,4\n", {"columns": ["a"], "time": "a"}, "column 'a' is asked for twice"),
        ("a\n1\n2,5\n", {}, "line 3: 2 cells, expected 1"),
        ("a\n1\ntwo\n", {}, "line 3: 'two' in column 'a', expected a finite number"),
        ("a\n1\n-inf\n", {}, "line 3: '-inf' in column 'a', expected a finite number"),
        ("t,a\n0,1\n0,2\n", {"time": "t"}, "line 3: time '0' again, as in line 2"),
        ("t,a\n0,1\n2,2\n1,3\n", {"time": "t"}, "line 4: time '1' is before '2' in line 3"),
        ("t,a\n0,1\nx,2\n", {"time": "t"}, "line 3: time 'x', expected a number"),
        ("t,a\n0,1\nnan,2\n", {"time": "t"}, "line 3: time 'nan', expected a number"),
        ("t,a\n2020-13-01,1\n2020-14-01,2\n", {"time": "t"}, "line 2: time '2020-13-01', expected"),
        (
            "t,a\n2020-01-01,1\n2,2\n",
            {"time": "t"},
            "line 3: time '2', expected a number or an ISO",
        ),
        ("t,a\n-1.7e308,1\n1.7e308,2\n", {"time": "t"}, "line 2: time '-1.7e308', expected"),
        ("t,a\n9999-11-30,1\n9999-12-31,2\n", {"time": "t"}, "line 2: .* a year from 2 to 9998"),
        ("t,a\n1,1\n", {"time": "t"}, "1 rows, expected at least two"),
        ('a\n1\n"2\n', {}, "not a readable CSV file"),
        ("a\n1\n2\n", {"on_gap": "ignore"}, "on_gap = 'ignore', expected one of"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_csv(written(tmp_path, text), **options)


def test_not_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"mine\.csv: not UTF-8 text"):
        read_csv(tmp_path / "mine.csv")
    with pytest.raises(ValueError, match="no such file"):
        read_csv(tmp_path)


# -------------------------------------------------------------------------------------- parts


def test_split_in_time(tmp_path: Path) -> None:
    series = read(tmp_path, "".join(f"{i * 2},{i}\n" for i in range(20)), time="1")
    train, validation, test = split_in_time(series, 0.2, 0.25)
    assert [len(part) for part in (train, validation, test)] == [11, 4, 5]
    joined = torch.cat([part.values for part in (train, validation, test)])
    same(joined, series.values)
    assert test.labels(test.positions)[0] == "30"
    for shares in ((0.0, 0.5), (0.5, 0.5), (0.1, -0.1), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="split_in_time: validation"):
            split_in_time(series, *shares)
    with pytest.raises(ValueError, match="3 rows, too few"):
        split_in_time(series.part(0, 3), 0.1, 0.1)


def test_statistics_of_a_constant(tmp_path: Path) -> None:
    mean, std = statistics(read(tmp_path, "5\n5\n5\n"))
    same(mean, T(5))
    same(std, T(1))
