# SPDX-License-Identifier: MIT
"""What all pictures share: colours, panels, legends.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrnnx_nn.optional import require

BLUE, ORANGE, GREEN, RED, PURPLE, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#222222",
)  # fmt: skip
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, BLACK)


def save_figure(figure: Any, path: Path | str) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=130)


def figure_of(width: float, height: float, title: str) -> Any:
    """Return an empty figure of a size in inches."""
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def grid(
    names: Sequence[str], width: float, height: float, title: str
) -> tuple[Any, dict[str, Any]]:
    """Return a figure with a panel for each name, at most three a row, and the panels."""
    columns = max(1, min(3, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = figure_of(columns * width, rows * height, title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for spare in axes[len(names) :]:
        spare.axis("off")
    return figure, dict(zip(names, axes, strict=False))


def finish(axes: Any, legend: bool = True) -> None:
    """Give a panel its grid and take two of its spines."""
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9)


def legend_below(figure: Any, panels: Mapping[str, Any]) -> None:
    """Put the first panel's legend under all of them."""
    for axes in list(panels.values())[:1]:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
