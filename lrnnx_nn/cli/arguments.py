# SPDX-License-Identifier: MIT
"""Options that several tasks of `lrnnx train` share. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrnnx_nn.recipes import FitConfig


def integer(text: str) -> int:
    """Read an integer; argparse names this function in its message."""
    return int(text)


def number(text: str) -> float:
    """Read a number; argparse names this function in its message."""
    return float(text)


KINDS: dict[type, tuple[Any, str]] = {
    int: (integer, "N"),
    float: (number, "X"),
    str: (str, "NAME"),
}
"""How argparse reads a value like that of a config's field, and what it calls it."""

_TEXTS = {
    "steps": "optimizer steps",
    "batch_size": "rows of the batch of a step",
    "accumulate": "compute the batch in so many parts, for the same step in less memory",
    "precision": "float32, or bfloat16 or float16 for matrix products",
    "lr": "peak learning rate of AdamW",
    "ssm_lr": "the same for state-space parameters",
    "weight_decay": "of what is not a state-space parameter, a norm or a bias",
    "warmup": "part of the steps in which the rate rises",
    "clip": "largest norm of the gradient",
    "evaluate_every": "steps between evaluations, after which the run can be resumed",
    "patience": "stop after so many evaluations without a better one; 0: never",
    "seed": "of the initial values and of every draw",
}


def flag(name: str) -> str:
    """Return the option of a config's field."""
    return "--" + name.replace("_", "-")


def add_training_options(parser: Any, defaults: FitConfig) -> None:
    """Add a group with an option for every field of `FitConfig`, with these defaults."""
    group = parser.add_argument_group("training")
    for field in dataclasses.fields(FitConfig):
        value = getattr(defaults, field.name)
        kind, metavar = KINDS[type(value)]
        group.add_argument(
            flag(field.name), type=kind, default=value, metavar=metavar,
            help=f"{_TEXTS[field.name]} (default: %(default)s)",
        )  # fmt: skip


def fit_config(arguments: argparse.Namespace) -> FitConfig:
    """Return the `FitConfig` of what was asked.

    Raises:
        ValueError: a number outside its range.
    """
    return FitConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(FitConfig)})


def new_folder(*words: str | int) -> Path:
    """Return a folder that does not exist yet: runs/WORD-WORD-...-TIME."""
    name = "-".join(re.sub(r"[^\w.-]+", "_", str(word)) for word in words)
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = Path("runs") / stem, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{stem}-{number}"
    return folder


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run with so many CPU threads; 0 leaves torch's choice.

    Raises:
        ValueError: a negative number.
    """
    import torch

    if count < 0:
        raise ValueError(f"--threads {count}, expected >= 0")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table(lines: list[tuple[str, str]]) -> str:
    """Return labels and values in two columns."""
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)
