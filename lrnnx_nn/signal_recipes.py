# SPDX-License-Identifier: MIT
"""What `lrnnx train` asks for --task forecast and denoise. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lrnnx_nn.recipes import FitConfig

NORMALIZE = ("window", "last", "train")
ON_GAP = ("error", "timesteps", "interpolate")
ON_RATE = ("error", "resample")
CHANNELS = ("mean", "left", "right")
LOSSES = ("snr", "si_snr", "l1")

FORECAST_MODEL: Mapping[str, Any] = {
    "layer": "s5",
    "d_model": 32,
    "d_state": 32,
    "n_layer": 2,
    "norm": "layer",
    "activation": "half_glu1",
    "dropout": 0.1,
}
FORECAST_LAYER_OPTIONS: Mapping[str, Mapping[str, Any]] = {"s5": {"clip_eigs": True}}
"""A free run must not grow: options of a layer that differ from its own defaults."""
FORECAST_FIT = FitConfig(steps=300, batch_size=32, lr=4e-3, evaluate_every=25, patience=6)


DENOISE_MODEL: Mapping[str, Any] = {
    "layer": "s5",
    "d_state": 32,
    "channels": (16, 32, 64),
    "factors": (4, 4, 2),
    "n_layer": 1,
    "n_neck": 2,
    "n_output": 1,
    "d_stem": 8,
    "preconv": 3,
    "norm": "layer",
    "activation": "silu",
    "residual": True,
    "causal": False,
}
DENOISE_FIT = FitConfig(steps=900, batch_size=8, lr=4e-3, evaluate_every=100)


@dataclasses.dataclass(frozen=True)
class SeriesSource:
    """Where a series comes from: the arguments of `lrnnx_nn.data.series.load_series`."""

    source: str
    columns: tuple[str, ...] = ()
    time: str | None = None
    on_gap: str | None = None
    missing: tuple[str, ...] = ()
    time_format: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "missing", tuple(self.missing))
        _check_texts(self, ("source", "columns", "missing"), ("time", "time_format"))
        if self.on_gap is not None:
            _check("on_gap", self.on_gap in ON_GAP, self.on_gap, f"one of {', '.join(ON_GAP)}")


@dataclasses.dataclass(frozen=True)
class ForecastConfig:
    """What is forecast, and how the forecasts are judged.

    Attributes:
        horizon: rows ahead.
        season: sampling periods a season, for the seasonal naive forecast and the unit of the MASE.
        context: rows that a forecast starts from.
        unroll: rows over which training runs the network on its own outputs; 0 trains one step
            ahead alone. At most the horizon.
        normalize: what a window is centred on and divided by before the network reads it: mean and
            deviation of its own context (``window``), its ``last`` value before the forecast and
            the deviation of the training part, or mean and deviation of the training part
            (``train``).
        validation_fraction: share of the rows behind the training part.
        test_fraction: share of the rows at the end.
        stride: rows between two origins of forecasts in the test part.

    Raises:
        ValueError: a number outside its range.
    """

    horizon: int = 24
    season: int = 1
    context: int = 48
    unroll: int = 24
    normalize: str = "window"
    validation_fraction: float = 0.15
    test_fraction: float = 0.15
    stride: int = 1

    def __post_init__(self) -> None:
        _check("horizon", self.horizon >= 1, self.horizon, "an integer >= 1")
        _check("season", self.season >= 1, self.season, "an integer >= 1")
        _check("context", self.context >= 2, self.context, "an integer >= 2")
        fits = 0 <= self.unroll <= self.horizon
        _check("unroll", fits, self.unroll, f"0 ... horizon = {self.horizon}")
        fits = self.normalize in NORMALIZE
        _check("normalize", fits, self.normalize, f"one of {', '.join(NORMALIZE)}")
        _check_shares(self.validation_fraction, self.test_fraction)
        _check("stride", self.stride >= 1, self.stride, "an integer >= 1")


@dataclasses.dataclass(frozen=True)
class SoundSource:
    """Where recordings and noise come from: arguments of `lrnnx_nn.data.audio.read_folder`.

    Attributes:
        wav: folder of clean recordings.
        noise: ``white``, ``pink``, or a folder of recordings of noise.
        rate: samples a second; that of the first clean file if None.
        on_rate: whether a file of another rate is refused or resampled.
        channel: what becomes of several channels.
    """

    wav: str
    noise: str = "white"
    rate: int | None = None
    on_rate: str = "error"
    channel: str = "mean"

    def __post_init__(self) -> None:
        _check_texts(self, ("wav", "noise"), ())
        _check("rate", self.rate is None or self.rate >= 1, self.rate, "an integer >= 1")
        for name, allowed in (("on_rate", ON_RATE), ("channel", CHANNELS)):
            value = getattr(self, name)
            _check(name, value in allowed, value, f"one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class DenoiseConfig:
    """How clean speech is made noisy, and what training makes small.

    Attributes:
        snr: lowest and highest signal-to-noise ratio in dB. Training draws evenly between them;
            the files of the validation and the test part take five values in turn.
        segment: seconds of a stretch that training reads.
        loss: ``snr`` or ``si_snr``, turned negative, or ``l1``, the mean absolute error in units of
            the training part's deviation.
        validation_fraction: share of the files.
        test_fraction: share of the files.
        split_seed: of the draw of the three parts, and of the noise of two of them: runs with other
            seeds are tested on the same sounds.
        examples: test files of which noisy, denoised and clean sounds are written.

    Raises:
        ValueError: a number outside its range.
    """

    snr: tuple[float, float] = (0.0, 10.0)
    segment: float = 0.5
    loss: str = "snr"
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    examples: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "snr", tuple(self.snr))
        fits = len(self.snr) == 2 and -100 <= self.snr[0] <= self.snr[-1] <= 100
        _check("snr", fits, self.snr, "-100 <= lowest <= highest <= 100 dB")
        _check("segment", 0 < self.segment <= 3600, self.segment, "0 < segment <= 3600 seconds")
        _check("loss", self.loss in LOSSES, self.loss, f"one of {', '.join(LOSSES)}")
        _check_shares(self.validation_fraction, self.test_fraction)
        _check("split_seed", self.split_seed >= 0, self.split_seed, "an integer >= 0")
        _check("examples", self.examples >= 0, self.examples, "an integer >= 0")


def _check_shares(validation: float, test: float) -> None:
    _check("validation_fraction", 0 < validation < 1, validation, "0 < validation_fraction < 1")
    fits = test > 0 and validation + test < 1
    _check("test_fraction", fits, test, "0 < test_fraction < 1 - validation_fraction")


def _check_texts(config: Any, always: tuple[str, ...], maybe: tuple[str, ...]) -> None:
    """Refuse what is no text, as of a config.json that was edited."""
    for name in (*always, *maybe):
        value = getattr(config, name)
        texts = value if isinstance(value, tuple) else (value,)
        fits = all(isinstance(text, str) for text in texts) or (value is None and name in maybe)
        _check(name, fits, value, "text")


def _check(name: str, fits: bool, value: object, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} = {value}, expected {expected}")
