# SPDX-License-Identifier: MIT
"""Draw the figures of docs/frequency.md and docs/discretization.md.

    python scripts/docs_figures.py [FOLDER]

The filter is the one that the page on frequencies trains, with its seed and its steps.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from lrnnx_core import lru
from lrnnx_core.discretize import discretize
from lrnnx_nn import LRU, S4D, S5, viz
from lrnnx_nn.viz import _style

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


POLE = -0.3 + 1.0j
SCHEMES = ("zoh", "bilinear", "mamba", "euler")


def states(scheme: str, gaps: Tensor, u: Tensor) -> Tensor:
    """Return the states of dx/dt = POLE x + u after each sample."""
    A_bar, gamma = discretize(
        torch.tensor(POLE, dtype=torch.complex128), gaps.double(), discretization=scheme
    )
    x, found = torch.tensor(0j, dtype=torch.complex128), []
    for a, g, sample in zip(A_bar, gamma.expand_as(A_bar), u, strict=True):
        x = a * x + g * sample
        found.append(x)
    return torch.stack(found)


def draw_discretization(folder: Path) -> None:
    """Write the figures of the page on discretization."""
    t = torch.linspace(0, 15, 400, dtype=torch.float64)
    exact = (torch.exp(POLE * t) - 1) / POLE
    figure, panels = _style.grid(SCHEMES, 2.9, 2.3, "Re x under a constant input, dt = 0.6")
    for scheme, axes in panels.items():
        gaps = torch.full((25,), 0.6)
        axes.plot(t, exact.real, color=_style.BLACK, lw=1, label="continuous")
        samples = states(scheme, gaps, torch.ones(25)).real
        axes.plot(gaps.cumsum(0), samples, ".", color=_style.BLUE, label="sampled")
        axes.set(title=scheme, ylim=(-0.6, 2.2), xlabel="time")
        _style.finish(axes, legend=False)
    _style.legend_below(figure, panels)
    viz.save_figure(figure, folder / "discretization-step.png")

    names = {"zoh": "exp(dt A): zoh, dirac, mamba", "bilinear": "bilinear", "euler": "euler"}
    figure, panels = _style.grid(list(names), 2.9, 2.9, "Where A_bar lands, by Re(dt A)")
    angle = torch.linspace(-math.pi, math.pi, 400, dtype=torch.float64)
    for scheme, axes in panels.items():
        axes.plot(angle.cos(), angle.sin(), color=_style.BLACK, lw=1)
        damping = (0.0, -0.1, -0.5, -1.5)
        for real, color in zip(damping, _style.CYCLE, strict=False):
            line = torch.complex(torch.full_like(angle, real), angle)
            one = torch.ones((), dtype=torch.float64)
            image = discretize(line, one, discretization=scheme)[0]
            axes.plot(image.real, image.imag, color=color, lw=1.6, label=f"{real}")
        axes.set(title=names[scheme], xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
        _style.finish(axes, legend=False)
    _style.legend_below(figure, panels)
    viz.save_figure(figure, folder / "discretization-plane.png")

    gaps = torch.tensor([1.0, 3, 1, 2, 1, 5, 1, 1, 2, 1])
    u = torch.tensor([1.0, -1, 0.5, 1, -0.5, 1, -1, 0.5, 1, -1])
    times = gaps.cumsum(0)
    figure, panels = _style.grid(("zoh", "dirac"), 3.6, 2.4, "Ten samples at irregular times")
    for scheme, axes in panels.items():
        dense = torch.full((int(20 * times[-1]),), 1 / 20)
        clock = dense.cumsum(0)
        which = torch.searchsorted(times, clock - 1e-6)
        if scheme == "zoh":
            between = states("zoh", dense, u[which])
        else:
            arrived = (clock.unsqueeze(-1) - times).abs() < 0.01
            between = states("dirac", dense, (arrived * u).sum(-1))
        axes.plot(clock, between.real, color=_style.BLACK, lw=1, label="continuous time")
        axes.plot(times, states(scheme, gaps, u).real, "o", ms=4, color=_style.BLUE, label="steps")
        held = "held" if scheme == "zoh" else "impulses"
        axes.set(title=f"{scheme}: the input is {held}", xlabel="time")
        _style.finish(axes, legend=False)
    _style.legend_below(figure, panels)
    viz.save_figure(figure, folder / "discretization-gaps.png")


def main(folder: Path) -> None:
    """Write the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_discretization(folder)
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
