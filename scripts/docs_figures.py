# SPDX-License-Identifier: MIT
"""Draw the figures of docs/frequency.md: python scripts/docs_figures.py [FOLDER].

The filter is the one that the page trains, with its seed and its steps.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from lrnnx_core import lru
from lrnnx_nn import LRU, S4D, S5, viz

CUTOFF = 0.2 * math.pi


def target(omega: Tensor) -> Tensor:
    """Return the magnitude of a Butterworth low-pass of order four."""
    return (1 + (torch.tan(omega / 2) / math.tan(CUTOFF / 2)) ** 8).rsqrt()


def train_filter(steps: int = 500) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fit the magnitude of an LRU; return its parameters before and after."""
    torch.manual_seed(0)
    params = {k: v.requires_grad_() for k, v in lru.init(1, 8).items()}
    before = {k: v.detach().clone() for k, v in params.items()}
    omega = torch.linspace(0.01, math.pi, 200)
    optimizer = torch.optim.Adam(params.values(), lr=0.02)
    for _ in range(steps):
        H = lru.frequency_response(params, omega).flatten()
        loss = (H.abs() - target(omega)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, {k: v.detach() for k, v in params.items()}


def main(folder: Path) -> None:
    """Write the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    before, after = train_filter()
    omega = torch.logspace(-2, math.log10(math.pi), 400, dtype=torch.float64)
    responses = {
        name: viz.frequency_responses(params, omega, "lru")["LRU"]
        for name, params in (("before", before), ("after 500 steps", after))
    }
    bode = viz.plot_bode(responses, omega, "An LRU of eight states becomes a low-pass filter")
    for axes in bode.axes[:2]:
        wanted = 20 * torch.log10(target(omega))
        axes.lines[0].set_label("LRU")
        axes.plot(omega, wanted, color=viz.ORANGE, ls="--", label="Butterworth, order 4")
        axes.set_ylim(-60, 15)
        axes.legend(loc="lower left", frameon=False, fontsize=9)
    viz.save_figure(bode, folder / "frequency-bode.png")

    values = [viz.eigenvalues(params, "lru") for params in (before, after)]
    figure = viz.plot_eigenvalues(*values, "Eigenvalues of the filter")
    viz.save_figure(figure, folder / "frequency-eigenvalues.png")

    torch.manual_seed(0)
    fresh = {
        "S4D(64, 64)": viz.eigenvalues(S4D(64, 64))["S4D"],
        "S5(64, 64)": viz.eigenvalues(S5(64, 64))["S5"],
        "LRU(64, 64, r_min=0.9)": viz.eigenvalues(LRU(64, 64, r_min=0.9))["LRU"],
    }
    figure = viz.plot_time_constants(fresh, title="Time constants of fresh layers")
    viz.save_figure(figure, folder / "frequency-time-constants.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/figures"))
