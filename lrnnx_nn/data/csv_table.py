# SPDX-License-Identifier: MIT
"""A CSV file as text cells that remember their line."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
"""What stands for a missing value, in any case."""


class Table(NamedTuple):
    """Rows of cells, all of one width.

    Attributes:
        name: for messages.
        header: names of the columns, or None.
        rows: the cells, stripped.
        lines: the line of the file that each row ends on.
        missing: texts of missing values, in lower case.
    """

    name: str
    header: tuple[str, ...] | None
    rows: list[list[str]]
    lines: list[int]
    missing: frozenset[str]

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.rows[0])

    def name_of(self, index: int) -> str:
        """Return a column's name, or its number counted from 1."""
        return str(index + 1) if self.header is None else self.header[index]

    def find(self, column: str) -> int:
        """Return the index of a column by name, else by number counted from 1.

        Raises:
            ValueError: no such column, or a name that two columns bear.
        """
        column = column.strip()
        names = self.header or ()
        if names.count(column) > 1:
            raise ValueError(f"{self.name}: {names.count(column)} columns are called {column!r}")
        if column in names:
            return names.index(column)
        if column.isdecimal() and 1 <= int(column) <= self.width:
            return int(column) - 1
        known = f"names {', '.join(names)} or " if names else ""
        raise ValueError(
            f"{self.name}: no column {column!r}, expected {known}numbers 1 to {self.width}"
        )

    def cells(self, index: int) -> list[str]:
        """Return a column as text."""
        return [row[index] for row in self.rows]

    def numbers(self, index: int) -> list[float]:
        """Return a column as numbers, NaN for missing ones.

        Raises:
            ValueError: a cell that is no finite number; the message says which line.
        """
        found: list[float] = []
        for line, row in zip(self.lines, self.rows, strict=True):
            text = row[index]
            if text.lower() in self.missing:
                found.append(math.nan)
                continue
            try:
                value = float(text)
            except ValueError:
                value = math.inf
            if not math.isfinite(value):
                raise ValueError(
                    f"{self.name}, line {line}: {text!r} in column {self.name_of(index)!r}, "
                    "expected a finite number"
                )
            found.append(value)
        return found


def read_table(path: Path, missing: Sequence[str] = ()) -> Table:
    """Read a file; the first line is one of names if none of its cells is a number or date.

    Raises:
        ValueError: no such file, no rows, rows of different widths, bytes that are not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows, lines = _read(str(path), file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not a readable CSV file ({error})") from error
    if not rows:
        raise ValueError(f"{path}: no rows")
    unknown = frozenset(MISSING | {text.strip().lower() for text in missing})
    header: tuple[str, ...] | None = None
    if not any(_is_value(cell, unknown) for cell in rows[0]):
        header = tuple(rows[0])
        rows, lines = rows[1:], lines[1:]
        if not rows:
            raise ValueError(f"{path}: a line of names and no rows")
    return Table(str(path), header, rows, lines, unknown)


def _read(name: str, file: Iterable[str]) -> tuple[list[list[str]], list[int]]:
    rows: list[list[str]] = []
    lines: list[int] = []
    text = list(file)
    first = next((line for line in text if line.strip() and not line.startswith("#")), "")
    delimiter = max(",;\t", key=first.count)
    # Commented and empty lines stay in as empty ones, so that line numbers are the file's.
    kept = ["\n" if line.startswith("#") else line for line in text]
    reader = csv.reader(kept, delimiter=delimiter, strict=True)
    for row in reader:
        cells = [cell.strip() for cell in row]
        if not any(cells) and len(cells) <= 1:
            continue
        if rows and len(cells) != len(rows[0]):
            raise ValueError(
                f"{name}, line {reader.line_num}: {len(cells)} cells, expected {len(rows[0])}"
            )
        rows.append(cells)
        lines.append(reader.line_num)
    return rows, lines


def _is_value(cell: str, missing: frozenset[str]) -> bool:
    """Return whether a cell starts like a number or a date; missing values tell nothing."""
    if cell.lower() in missing:
        return False
    try:
        float(cell)
    except ValueError:
        return cell[:1].isdigit() and any(mark in cell for mark in "-/:.")
    return True
