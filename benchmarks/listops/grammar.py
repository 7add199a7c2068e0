# SPDX-License-Identifier: MIT
"""ListOps: nested lists of digits under an operator, whose value is the class.

An expression is a digit, or ``[OP x_1 ... x_k ]`` with 2 to ``most_arguments`` expressions, no more
than ``depth`` lists deep; OP is MIN, MAX, MED (the median, rounded down) or SM (the sum modulo 10).
A list stands where a quarter of the draws fall, as long as the depth allows; expressions outside of
the wanted lengths are drawn again.

Source: Nangia & Bowman 2018 (ListOps), arXiv:1804.06028; the lengths and the ten arguments of Tay
et al. 2020 (Long Range Arena), arXiv:2011.04006, section 2.2.1.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np

PAD, CLOSE = 0, 15
OPERATORS = {11: "[MIN", 12: "[MAX", 13: "[MED", 14: "[SM"}
N_TOKENS = 16  # padding, ten digits at 1 ... 10, four operators, the closing bracket
LIST_SHARE = 0.25


class Task(NamedTuple):
    """Sizes of the expressions."""

    shortest: int = 500
    longest: int = 2000
    depth: int = 10
    most_arguments: int = 10


class _TooLong(Exception):
    pass


def expression(draw: random.Random, task: Task) -> tuple[list[int], int]:
    """Return the tokens of an expression and its value, 0 ... 9."""
    while True:
        tokens: list[int] = []
        try:
            value = _grow(draw, task, tokens, 1)
        except _TooLong:
            continue
        if len(tokens) >= task.shortest:
            return tokens, value


def _grow(draw: random.Random, task: Task, tokens: list[int], depth: int) -> int:
    if len(tokens) > task.longest:
        raise _TooLong
    if depth >= task.depth or draw.random() >= LIST_SHARE:
        digit = draw.randrange(10)
        tokens.append(1 + digit)
        return digit
    operator = draw.choice(tuple(OPERATORS))
    tokens.append(operator)
    count = draw.randint(2, task.most_arguments)
    values = [_grow(draw, task, tokens, depth + 1) for _ in range(count)]
    tokens.append(CLOSE)
    if len(tokens) > task.longest:
        raise _TooLong
    return apply(operator, values)


def apply(operator: int, values: list[int]) -> int:
    """Return the value of a list."""
    name = OPERATORS[operator]
    if name == "[MIN":
        return min(values)
    if name == "[MAX":
        return max(values)
    if name == "[SM":
        return sum(values) % 10
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def evaluate(tokens: list[int]) -> int:
    """Return the value of an expression, read with a stack: a check of `expression`."""
    stack: list[int | list[int]] = []
    operators: list[int] = []
    for token in tokens:
        if token in OPERATORS:
            operators.append(token)
            stack.append([])
            continue
        value = token - 1
        if token == CLOSE:
            values = stack.pop()
            value = apply(operators.pop(), values)  # type: ignore[arg-type]
        if not stack:
            return value
        stack[-1].append(value)  # type: ignore[union-attr]
    raise ValueError("listops: an expression without its end")


def sequences(count: int, seed: int, task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens (count, longest) uint8, padded with 0, lengths and values (count,)."""
    draw = random.Random(seed)
    tokens = np.zeros((count, task.longest), np.uint8)
    lengths, values = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for i in range(count):
        row, values[i] = expression(draw, task)
        lengths[i] = len(row)
        tokens[i, : len(row)] = row
    return tokens, lengths, values
