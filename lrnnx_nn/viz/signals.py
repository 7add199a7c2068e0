# SPDX-License-Identifier: MIT
"""Pictures of forecasts and of sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrnnx_nn.viz._style import BLACK, CYCLE, ORANGE, figure_of, finish

if TYPE_CHECKING:
    from lrnnx_nn.data.series import Series

_STYLES = {"network": (CYCLE[0], "-"), "seasonal naive": (ORANGE, "--")}


def plot_forecasts(
    series: Series, origins: Tensor, forecasts: Mapping[str, Tensor], title: str = ""
) -> Any:
    """Draw forecasts from three origins against what came: the first, the middle, the last.

    Args:
        series: the first of its columns is drawn.
        origins: (O,) the rows at which forecasts start.
        forecasts: (O, horizon, C) by name; ``network`` and ``seasonal naive`` are drawn.
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    chosen = sorted({0, len(origins) // 2, len(origins) - 1})
    figure = figure_of(9, 2.2 * len(chosen) + 0.6, title)
    panels = figure.subplots(len(chosen), 1, squeeze=False).flatten()
    positions = series.clock.start + series.clock.step * series.positions
    if series.clock.unit == "seconds":
        positions = 1970 + positions / (365.2425 * 86400)
    elif series.clock.unit == "months":
        positions = positions / 12
    for axes, i in zip(panels, chosen, strict=True):
        origin = int(origins[i])
        horizon = next(iter(forecasts.values())).shape[1]
        shown = slice(max(0, origin - 3 * horizon), origin + horizon)
        seen = series.observed[shown]
        axes.plot(
            positions[shown][seen], series.values[shown, 0][seen], color=BLACK, lw=1.2, marker=".",
            ms=3, label="observed",
        )  # fmt: skip
        for name, (colour, line) in _STYLES.items():
            if name in forecasts:
                times = positions[origin : origin + horizon]
                axes.plot(times, forecasts[name][i, :, 0], color=colour, ls=line, label=name)
        axes.axvline(float(positions[origin - 1]), color="0.6", lw=0.8)
        axes.set_ylabel(series.columns[0])
        finish(axes, legend=axes is panels[0])
    units = {"count": "row", "number": "time", "seconds": "year", "months": "year"}
    panels[-1].set_xlabel(units[series.clock.unit])
    return figure


def plot_error_by_step(errors: Mapping[str, Sequence[float | None]], title: str = "") -> Any:
    """Draw the error of each method against the step ahead.

    Args:
        errors: the MASE of steps 1, 2, ... by method, None where it is not finite.
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = figure_of(6.5, 3.8, title)
    axes = figure.subplots()
    for i, (name, values) in enumerate(errors.items()):
        known = [(k + 1, v) for k, v in enumerate(values) if v is not None]
        steps, heights = zip(*known, strict=True) if known else ((), ())
        axes.plot(
            steps, heights, color=CYCLE[i % len(CYCLE)], ls="-" if i == 0 else "--",
            lw=2 if i == 0 else 1.2, label=name,
        )  # fmt: skip
    axes.set(xlabel="rows ahead", ylabel="MASE")
    axes.set_ylim(bottom=0)
    finish(axes)
    return figure


def plot_spectrograms(sounds: Mapping[str, Tensor], rate: int, title: str = "") -> Any:
    """Draw the power of sounds over time and frequency, one above the other, on one scale.

    Args:
        sounds: (L,) samples by name.
        rate: samples a second.
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = figure_of(9, 1.9 * len(sounds) + 0.6, title)
    panels = figure.subplots(len(sounds), 1, squeeze=False, sharex=True).flatten()
    frame, hop = 256, 64
    window = torch.hann_window(frame)
    levels: dict[str, Tensor] = {}
    for name, x in sounds.items():
        spectrum = torch.stft(
            x.float(), frame, hop, window=window, pad_mode="constant", return_complex=True
        )
        levels[name] = 20 * torch.log10(spectrum.abs() + 1e-6)
    top = max(float(level.max()) for level in levels.values())
    image = None
    for axes, (name, level) in zip(panels, levels.items(), strict=True):
        extent = (0.0, level.shape[1] * hop / rate, 0.0, rate / 2000)
        image = axes.imshow(
            level.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma",
            vmin=top - 80, vmax=top,
        )  # fmt: skip
        axes.set_ylabel("kHz")
        axes.set_title(name, fontsize=9, loc="left")
    panels[-1].set_xlabel("seconds")
    figure.colorbar(image, ax=list(panels), label="dB", shrink=0.8)
    return figure
