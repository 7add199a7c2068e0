# SPDX-License-Identifier: MIT
"""What a network has to beat: classical forecasts of series, classical noise reduction."""

from lrnnx_nn.baselines.filters import (
    FRAME,
    HOP,
    estimate_noise,
    noise_spectrum,
    spectral_subtraction,
    wiener,
)
from lrnnx_nn.baselines.series import (
    Autoregression,
    drift,
    interpolate,
    naive,
    seasonal_changes,
    seasonal_drift,
    seasonal_naive,
)

__all__ = [
    "FRAME",
    "HOP",
    "Autoregression",
    "drift",
    "estimate_noise",
    "interpolate",
    "naive",
    "noise_spectrum",
    "seasonal_changes",
    "seasonal_drift",
    "seasonal_naive",
    "spectral_subtraction",
    "wiener",
]
