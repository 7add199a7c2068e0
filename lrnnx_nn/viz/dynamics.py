# SPDX-License-Identifier: MIT
"""Pictures of linear systems: eigenvalues, time constants, kernels, step responses, Bode plots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrnnx_core import frequency
from lrnnx_nn.viz._style import (
    BLUE,
    CYCLE,
    ORANGE,
    figure_of,
    finish,
    grid,
    legend_below,
)


def plot_eigenvalues(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor] | None = None, title: str = ""
) -> Any:
    """Draw discrete eigenvalues on the unit disc, one panel a layer; outside it lies growth.

    Args:
        before: from `eigenvalues`.
        after: the same, of the same layers after training; None draws ``before`` alone.
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure, panels = grid(list(before if after is None else after), 4.4, 4.9, title)
    angle = np.linspace(0, 2 * np.pi, 361)
    for name, axes in panels.items():
        last = (before if after is None else after)[name]
        new = torch.view_as_real(last).numpy().T
        count = new.shape[1]
        size, alpha = (26, 0.9) if count <= 200 else (9, 0.6)
        axes.plot(np.cos(angle), np.sin(angle), color="0.55", lw=1, label="unit circle")
        drawn = [new]
        if after is not None:
            old = torch.view_as_real(before[name]).numpy().T
            drawn.append(old)
            axes.scatter(
                *old, s=size, facecolors="none", edgecolors=ORANGE, alpha=alpha,
                label="before training",
            )  # fmt: skip
        label = "eigenvalues" if after is None else "after"
        axes.scatter(*new, s=size, marker="x", color=BLUE, lw=1, alpha=alpha, label=label)
        axes.axhline(0, color="0.85", lw=0.8, zorder=0)
        axes.axvline(0, color="0.85", lw=0.8, zorder=0)
        reach = max(1.08, 1.05 * float(max(np.abs(x).max() for x in drawn)))
        axes.set(
            xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal",
            xlabel="real part", ylabel="imaginary part",
        )  # fmt: skip
        axes.set_title(f"{name}: {count} stored eigenvalues{_unstable(last)}", fontsize=10)
    legend_below(figure, panels)
    return figure


def plot_time_constants(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor] | None = None,
    title: str = "",
    dt: float = 1.0,
    unit: str = "samples",
) -> Any:
    """Draw how long modes remember: a histogram of -1/log|A_bar|, one panel a layer.

    Args:
        before: eigenvalues from `eigenvalues`.
        after: the same, of the same layers after training; None draws ``before`` alone.
        title: of the figure.
        dt: length of a sample in ``unit``.
        unit: of time.

    Returns:
        A ``matplotlib.figure.Figure``. Modes that do not decay are counted in the panel's title.
    """
    figure, panels = grid(list(before if after is None else after), 4.6, 3.7, title)
    for name, axes in panels.items():
        sets = {"before training": (before[name], ORANGE)}
        if after is None:
            sets = {"modes": (before[name], BLUE)}
        else:
            sets["after"] = (after[name], BLUE)
        times = {label: _decaying(values) * dt for label, (values, _) in sets.items()}
        every = np.concatenate(list(times.values()))
        low, high = (every.min(), every.max()) if len(every) else (dt, 10 * dt)
        bins = int(np.clip(2 * np.sqrt(len(every)), 8, 30))
        edges = np.geomspace(low / 1.1, high * 1.1, bins + 1)
        for label, (_, colour) in sets.items():
            filled = label != "before training"
            axes.hist(
                times[label], edges, label=label, color=colour, lw=1.5,
                histtype="stepfilled" if filled else "step", alpha=0.75 if filled else 1.0,
            )  # fmt: skip
        axes.set(xscale="log", xlabel=f"time constant ({unit})", ylabel="modes")
        axes.yaxis.get_major_locator().set_params(integer=True)
        last = (before if after is None else after)[name]
        axes.set_title(f"{name}: {last.numel()} stored modes{_unstable(last)}", fontsize=10)
        finish(axes, legend=False)
    if after is not None:
        legend_below(figure, panels)
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
    return _curves(found, title, shown, f"lag ({unit})", "response to a unit impulse")


def plot_step_responses(
    found: Mapping[str, Tensor], title: str = "", shown: int = 5, unit: str = "samples"
) -> Any:
    """Draw the step responses of largest norm, one panel a layer.

    Args:
        found: from `step_responses`.
        title: of the figure.
        shown: curves a panel.
        unit: of time.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    return _curves(found, title, shown, f"time since the step ({unit})", "response to a unit step")


def plot_bode(
    found: Mapping[str, Tensor],
    omega: Tensor,
    title: str = "",
    shown: int = 5,
    sampling_rate: float | None = None,
) -> Any:
    """Draw magnitude and phase of the responses of largest peak, one column a layer.

    Args:
        found: from `frequency_responses`.
        omega: (W,), the radians a sample they are taken at, rising and above 0.
        title: of the figure.
        shown: curves a column.
        sampling_rate: in hertz; frequencies are then hertz, else radians a sample.

    Returns:
        A ``matplotlib.figure.Figure``. Phases are unwrapped along the frequency.

    Raises:
        ValueError: frequencies that are not above 0 and rising; they stand on a logarithmic axis.
    """
    w = omega.detach().cpu().double().numpy()
    if w.ndim != 1 or not len(w) or w[0] <= 0 or (np.diff(w) <= 0).any():
        raise ValueError(
            f"plot_bode: omega {tuple(w.shape)}, expected (W,), above 0 and rising: the axis is "
            "logarithmic"
        )
    scale, unit = 1.0, "rad/sample"
    if sampling_rate is not None:
        scale, unit = sampling_rate / (2 * math.pi), "Hz"
    columns = max(1, len(found))
    figure = figure_of(4.8 * columns, 6.2, title)
    axes = figure.subplots(2, columns, squeeze=False, sharex="col")
    for (name, H), (top, bottom) in zip(found.items(), axes.T, strict=False):
        rows = H.reshape(-1, H.shape[-1])
        largest = rows.abs().amax(-1).argsort(descending=True)[:shown]
        for index, colour in zip(largest.tolist(), itertools.cycle(CYCLE), strict=False):
            row = rows[index].numpy()
            decibels = 20 * np.log10(np.abs(row) + np.finfo(np.float64).tiny)
            top.plot(scale * w, decibels, color=colour, lw=1.4, label=_label(index, H))
            phase = np.degrees(np.unwrap(np.angle(row)))
            turn = 360 if phase[0] < -179.5 else 0  # a negative gain begins at 180, not by chance
            bottom.plot(scale * w, phase + turn, color=colour, lw=1.4)
        top.set_ylabel("magnitude (dB)")
        bottom.set(xscale="log", xlabel=f"frequency ({unit})", ylabel="phase (degrees)")
        bottom.yaxis.get_major_locator().set_params(steps=[1, 1.5, 3, 4.5, 9, 10])
        top.set_title(_title(name, len(largest), len(rows)), fontsize=10)
        for panel in (top, bottom):
            finish(panel, legend=False)
            if scale * w[0] < scale * math.pi <= 1.001 * scale * w[-1]:
                panel.axvline(scale * math.pi, color="0.6", lw=0.8, ls=":")
        _legend_under(bottom, top, H)
    return figure


def _curves(found: Mapping[str, Tensor], title: str, shown: int, time: str, what: str) -> Any:
    figure, panels = grid(list(found), 4.6, 4.4, title)
    for name, axes in panels.items():
        K = found[name]
        rows = K.reshape(-1, K.shape[-1])
        largest = rows.norm(dim=-1).argsort(descending=True)[:shown]
        for index, colour in zip(largest.tolist(), itertools.cycle(CYCLE), strict=False):
            mark = {"marker": ".", "ms": 3} if rows.shape[-1] <= 100 else {}
            axes.plot(rows[index].numpy(), color=colour, lw=1.2, label=_label(index, K), **mark)
        axes.axhline(0, color="0.85", lw=0.8, zorder=0)
        axes.set(xlabel=time, ylabel=what)
        axes.set_title(_title(name, len(largest), len(rows)), fontsize=10)
        finish(axes, legend=False)
        _legend_under(axes, axes, K)
    return figure


def _title(name: str, shown: int, count: int) -> str:
    return name if shown == count else f"{name}: the {shown} largest of {count}"


def _label(index: int, found: Tensor) -> str:
    """Name a row of (channels, L) or of (out, in, L)."""
    if found.ndim == 3:
        return f"{index % found.shape[1]} \u2192 {index // found.shape[1]}"
    return f"channel {index}"


def _legend_under(axes: Any, source: Any, found: Tensor) -> None:
    handles, labels = source.get_legend_handles_labels()
    if len(labels) == 1:
        return
    axes.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False,
        fontsize=9, title="input \u2192 output channel" if found.ndim == 3 else None,
        title_fontsize=9,
    )  # fmt: skip


def _decaying(eigenvalues: Tensor) -> np.ndarray:
    """Return the time constants that are positive and finite."""
    times = frequency.decay_times(eigenvalues)
    return times[torch.isfinite(times) & (times > 0)].numpy()


def _unstable(eigenvalues: Tensor) -> str:
    count = int((eigenvalues.abs() > 1).sum())
    return f", {count} unstable" if count else ""
