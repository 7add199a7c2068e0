# SPDX-License-Identifier: MIT
"""Pictures of a training run: learning curve, confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lrnnx_nn.viz._style import BLACK, BLUE, GREEN, RED, figure_of, finish


def plot_learning_curve(rows: Sequence[Mapping[str, Any]], title: str = "") -> Any:
    """Draw loss and validation accuracy over epochs.

    Args:
        rows: the lines of metrics.jsonl: ``phase``, ``epoch``, ``loss``, ``validation_loss``,
            ``validation_accuracy`` (None where nothing was held out).
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = figure_of(9, 3.6, title)
    left, right = figure.subplots(1, 2)
    searched = [r for r in rows if r["validation_loss"] is not None]
    refitted = [r for r in rows if r["validation_loss"] is None]
    epochs = [r["epoch"] for r in searched]
    noisy = "training (noise, smoothing, dropout)"
    left.plot(epochs, [r["loss"] for r in searched], color=BLUE, label=noisy)
    left.plot(
        epochs, [r["validation_loss"] for r in searched], color=RED, ls="--", label="validation"
    )
    if refitted:
        left.plot(
            [r["epoch"] for r in refitted], [r["loss"] for r in refitted], color=GREEN, ls=":",
            lw=2, label="refit on training and validation",
        )  # fmt: skip
    left.set(xlabel="epoch", ylabel="cross entropy (nats)")
    left.set_ylim(bottom=0)
    accuracies = [100 * r["validation_accuracy"] for r in searched]
    right.plot(epochs, accuracies, color=RED, ls="--", label="validation")
    if searched:
        best = max(searched, key=lambda r: (r["validation_accuracy"], -r["validation_loss"]))
        x, y = best["epoch"], 100 * best["validation_accuracy"]
        right.plot([x], [y], "o", color=BLACK, ms=6, label=f"chosen: epoch {x}, {y:.1f} %")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (left, right):
        finish(axes)
    return figure


def plot_confusion_matrix(
    matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str = ""
) -> Any:
    """Draw how many sequences of each class (rows) got each answer (columns).

    Args:
        matrix: (n_classes, n_classes) counts.
        classes: their names.
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    counts = np.asarray(matrix)
    n = len(classes)
    side = min(4.2 + 0.35 * n, 14)
    figure = figure_of(side + 0.9, side, title)
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.85)
    if n <= 30:
        for i, j in np.argwhere(counts > 0):
            colour = "white" if share[i, j] > 0.5 else BLACK
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, fontsize=9)
    turned = max(map(len, classes)) > 3
    axes.set_xticks(
        range(n), classes, rotation=45 if turned else 0, ha="right" if turned else "center"
    )
    axes.set_yticks(range(n), classes)
    axes.set(xlabel="answer", ylabel="true class")
    return figure
