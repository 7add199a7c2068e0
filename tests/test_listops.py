# SPDX-License-Identifier: MIT
"""The ListOps benchmark: its grammar against a reader of its own, its data, one small run."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.listops.grammar import (
    CLOSE,
    N_TOKENS,
    OPERATORS,
    Task,
    apply,
    evaluate,
    expression,
    sequences,
)
from benchmarks.listops.train import Recipe, data, parts_of, train

SMALL = Task(shortest=10, longest=60, depth=4, most_arguments=5)
NAMES = {name: token for token, name in OPERATORS.items()}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("[MIN", [4, 2, 9], 2),
        ("[MAX", [4, 2, 9], 9),
        ("[SM", [4, 2, 9], 5),
        ("[MED", [4, 2, 9], 4),
        ("[MED", [1, 2, 5, 9], 3),  # rounded down
    ],
)
def test_operators(name: str, values: list[int], expected: int) -> None:
    assert apply(NAMES[name], values) == expected


def test_a_nested_expression_is_read() -> None:
    # [MAX 2 9 [MIN 4 7 ] 0 ]
    tokens = [NAMES["[MAX"], 3, 10, NAMES["[MIN"], 5, 8, CLOSE, 1, CLOSE]
    assert evaluate(tokens) == 9
    assert evaluate([8]) == 7
    with pytest.raises(ValueError, match="without its end"):
        evaluate(tokens[:-1])


def test_expressions_keep_to_the_task_and_have_the_value_they_say() -> None:
    draw = random.Random(0)
    for _ in range(300):
        tokens, value = expression(draw, SMALL)
        assert SMALL.shortest <= len(tokens) <= SMALL.longest
        assert evaluate(tokens) == value
        assert min(tokens) > 0
        assert max(tokens) < N_TOKENS
        deep = np.cumsum([(t in OPERATORS) - (t == CLOSE) for t in tokens])
        assert deep.max() < SMALL.depth
        assert deep[-1] == 0


def test_data_do_not_depend_on_processes_and_parts_differ(tmp_path: Path) -> None:
    one, two = data("train", 600, SMALL, 1), data("train", 600, SMALL, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one.tokens.shape == (600, 60)
    assert ((one.tokens != 0).sum(-1) == one.lengths).all()
    other = data("validation", 600, SMALL, 1)
    assert not torch.equal(one.tokens, other.tokens)
    values, counts = sequences(2000, 3, SMALL)[2], np.zeros(10)
    np.add.at(counts, values, 1)
    assert counts.min() > 50
    recipe = Recipe(sequences=20, held_out=10)
    drawn = parts_of(recipe, SMALL, 1, tmp_path / "data.npz")
    read = parts_of(recipe, SMALL, 1, tmp_path / "data.npz")
    assert all(torch.equal(a, b) for p in drawn for a, b in zip(drawn[p], read[p], strict=True))
    with pytest.raises(ValueError, match="other sizes"):
        parts_of(Recipe(sequences=30, held_out=10), SMALL, 1, tmp_path / "data.npz")


def test_a_small_network_learns_short_lists() -> None:
    task = Task(shortest=4, longest=12, depth=2, most_arguments=4)
    recipe = Recipe(
        sequences=2000, steps=150, batch_size=64, d_model=32, n_layer=2, held_out=500,
        evaluations=2, lr=5e-3,
    )  # fmt: skip
    parts = parts_of(recipe, task, 1, None)
    result = train("s5", 0, recipe, task, parts=parts, device="cpu", minutes=5)
    most = float(np.bincount(parts["test"].values.numpy()).max() / 500)
    assert result["test"] > most + 0.15
    assert [p["step"] for p in result["curve"]] == [75, 150]
