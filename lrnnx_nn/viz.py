# SPDX-License-Identifier: MIT
"""Pictures of a run: learning curve, confusion matrix, eigenvalues, kernels.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrnnx_nn.layers.base import Layer
from lrnnx_nn.optional import require

BLUE, ORANGE, GREEN, RED, PURPLE, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#222222",
)  # fmt: skip
_CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, BLACK)


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Return the time-invariant layers of a model by their module names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Layer) and module.model.kind == "lti"
    }


@torch.no_grad()
def eigenvalues(model: nn.Module) -> dict[str, Tensor]:
    """Return the discrete eigenvalues A_bar (n,), complex, of each time-invariant layer."""
    found: dict[str, Tensor] = {}
    for name, layer in layers_of(model).items():
        A_bar, _ = layer.model.discretize(layer.params, **layer._known("discretize"))
        found[name] = A_bar.detach().cpu().flatten().to(torch.complex128)
    return found


@torch.no_grad()
def kernels(model: nn.Module, length: int) -> dict[str, Tensor]:
    """Return the causal convolution kernels of each time-invariant layer, time last.

    They are (channels, length) for a single-input model, (out, in, length) for a multi-input one;
    of a bidirectional layer the forward half.
    """
    found: dict[str, Tensor] = {}
    for name, layer in layers_of(model).items():
        if layer.model.kernel is None:
            continue
        options = layer._known("kernel")
        K = layer.model.kernel(layer.params, length, **options)
        if options.get("bidirectional"):
            K = K[0]
        rows = K.movedim(-3, -1) if layer.model.connectivity == "mimo" else K.mT.reshape(-1, length)
        found[name] = rows.detach().cpu().double()
    return found


def plot_learning_curve(rows: Sequence[Mapping[str, Any]], title: str = "") -> Any:
    """Draw loss and validation accuracy over epochs.

    Args:
        rows: the lines of metrics.jsonl: ``phase``, ``epoch``, ``loss``, ``validation_loss``,
            ``validation_accuracy`` (None where nothing was held out).
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = _figure(9, 3.6, title)
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
        _finish(axes)
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
    figure = _figure(side + 0.9, side, title)
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


def plot_eigenvalues(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], title: str = ""
) -> Any:
    """Draw the discrete eigenvalues before and after training, one panel a layer.

    Args:
        before: from `eigenvalues`.
        after: the same, of the same layers.
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure, panels = _grid(list(after), 4.4, 4.9, title)
    angle = np.linspace(0, 2 * np.pi, 361)
    for name, axes in panels.items():
        old, new = (torch.view_as_real(values[name]).numpy().T for values in (before, after))
        count = new.shape[1]
        size, alpha = (26, 0.9) if count <= 200 else (9, 0.6)
        axes.plot(np.cos(angle), np.sin(angle), color="0.55", lw=1, label="unit circle")
        axes.scatter(
            *old, s=size, facecolors="none", edgecolors=ORANGE, alpha=alpha,
            label="before training",
        )  # fmt: skip
        axes.scatter(*new, s=size, marker="x", color=BLUE, lw=1, alpha=alpha, label="after")
        axes.axhline(0, color="0.85", lw=0.8, zorder=0)
        axes.axvline(0, color="0.85", lw=0.8, zorder=0)
        reach = max(1.08, 1.05 * float(max(np.abs(old).max(), np.abs(new).max())))
        axes.set(
            xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal",
            xlabel="real part", ylabel="imaginary part",
        )  # fmt: skip
        axes.set_title(f"{name}: {count} stored eigenvalues", fontsize=10)
    _legend_below(figure, panels)
    return figure


def plot_kernels(
    found: Mapping[str, Tensor], title: str = "", shown: int = 5, unit: str = "samples"
) -> Any:
    """Draw the kernels of largest norm, one panel a layer.

    Args:
        found: from `kernels`.
        title: of the figure.
        shown: kernels a panel.
        unit: of the lag.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure, panels = _grid(list(found), 4.6, 4.4, title)
    for name, axes in panels.items():
        K = found[name]
        rows = K.reshape(-1, K.shape[-1])
        largest = rows.norm(dim=-1).argsort(descending=True)[:shown]
        for index, colour in zip(largest.tolist(), _CYCLE, strict=False):
            label = f"channel {index}"
            if K.ndim == 3:
                label = f"{index % K.shape[1]} \u2192 {index // K.shape[1]}"
            axes.plot(rows[index].numpy(), color=colour, marker=".", ms=3, lw=1.2, label=label)
        axes.axhline(0, color="0.85", lw=0.8, zorder=0)
        axes.set(
            xlabel=f"lag ({unit})", ylabel="response to a unit impulse",
        )  # fmt: skip
        axes.set_title(f"{name}: the {len(largest)} largest of {len(rows)}", fontsize=10)
        _finish(axes, legend=False)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False, fontsize=9,
            title="input \u2192 output channel" if K.ndim == 3 else None, title_fontsize=9,
        )  # fmt: skip
    return figure


def save_figure(figure: Any, path: Path | str) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=130)


def _figure(width: float, height: float, title: str) -> Any:
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _grid(
    names: Sequence[str], width: float, height: float, title: str
) -> tuple[Any, dict[str, Any]]:
    columns = max(1, min(3, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = _figure(columns * width, rows * height, title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for spare in axes[len(names) :]:
        spare.axis("off")
    return figure, dict(zip(names, axes, strict=False))


def _finish(axes: Any, legend: bool = True) -> None:
    axes.grid(color="0.92", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9)


def _legend_below(figure: Any, panels: Mapping[str, Any]) -> None:
    for axes in list(panels.values())[:1]:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
