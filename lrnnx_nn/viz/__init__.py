# SPDX-License-Identifier: MIT
"""Pictures: of a training run, and of the linear systems that time-invariant layers are.

What is drawn is computed first, by `eigenvalues`, `kernels`, `step_responses` and
`frequency_responses`, from a network, a layer or a parameter dict; the ``plot_`` functions return a
``matplotlib.figure.Figure``. Colours are those of Okabe and Ito, which colour-blind readers can
tell apart. Needs matplotlib.
"""

from lrnnx_nn.layers.base import Layer
from lrnnx_nn.viz._style import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, save_figure
from lrnnx_nn.viz.dynamics import (
    plot_bode,
    plot_eigenvalues,
    plot_kernels,
    plot_step_responses,
    plot_time_constants,
)
from lrnnx_nn.viz.runs import plot_confusion_matrix, plot_learning_curve
from lrnnx_nn.viz.signals import plot_error_by_step, plot_forecasts, plot_spectrograms
from lrnnx_nn.viz.systems import (
    System,
    eigenvalues,
    frequency_responses,
    kernels,
    layers_of,
    step_responses,
    systems_of,
)
from lrnnx_nn.viz.text import plot_bits

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "RED",
    "Layer",
    "System",
    "eigenvalues",
    "frequency_responses",
    "kernels",
    "layers_of",
    "plot_bits",
    "plot_bode",
    "plot_confusion_matrix",
    "plot_eigenvalues",
    "plot_error_by_step",
    "plot_forecasts",
    "plot_kernels",
    "plot_learning_curve",
    "plot_spectrograms",
    "plot_step_responses",
    "plot_time_constants",
    "save_figure",
    "step_responses",
    "systems_of",
]
