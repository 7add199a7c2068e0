# SPDX-License-Identifier: MIT
"""A picture of a language model's training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrnnx_nn.viz._style import BLUE, CYCLE, RED, figure_of, finish


def plot_bits(
    rows: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, float] | None = None,
    title: str = "",
) -> Any:
    """Draw loss and validation bits per byte over steps, with a line for each baseline.

    Args:
        rows: the lines of metrics.jsonl: ``step``, ``loss`` (nats per token), and
            ``validation_bits_per_byte`` where something was held out.
        baselines: bits per byte by name.
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = figure_of(9, 3.6, title)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    left.plot(steps, [row["loss"] for row in rows], color=BLUE, label="training")
    left.set(xlabel="step", ylabel="cross entropy (nats per token)")
    key = "validation_bits_per_byte"
    judged = [row for row in rows if key in row]
    right.plot(
        [row["step"] for row in judged], [row[key] for row in judged], color=RED,
        label="validation",
    )  # fmt: skip
    for (name, value), color in zip((baselines or {}).items(), CYCLE[1:] * 9, strict=False):
        right.axhline(value, color=color, ls=":", label=f"{name} (test part)")
    right.set(xlabel="step", ylabel="bits per byte")
    for axes in (left, right):
        finish(axes)
    return figure
