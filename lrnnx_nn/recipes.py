# SPDX-License-Identifier: MIT
"""The defaults of `lrnnx train`. Nothing heavy is imported here, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

DEFAULT_DATASET = "JapaneseVowels"
DEFAULT_LAYER = "s5"

MODEL: Mapping[str, Any] = {
    "d_model": 64,
    "d_state": 64,
    "n_layer": 2,
    "norm": "layer",
    "activation": "half_glu1",
    "dropout": 0.2,
    "pooling": "max",
}
"""Of the classifier, whatever the layer."""

LAYER_MODEL: Mapping[str, Mapping[str, Any]] = {
    "s4": {"d_state": 16},
    "s4d": {"d_state": 16},
    "centaurus": {"d_state": 16},
    "mamba": {"d_state": 16},
    "mamba2": {"d_state": 32},
    "stream": {"d_state": 16},
}
"""What differs for one layer: some keep d_state numbers for every channel, others for all."""

LAYER_OPTIONS: Mapping[str, Mapping[str, Any]] = {}
"""Options of a layer that differ from the model's own defaults."""

PUBLISHED: Mapping[str, tuple[str, float]] = {"JapaneseVowels": ("InceptionTime", 0.9919)}
"""A published test accuracy to stand beside ours: method and figure."""


def model_defaults(layer: str) -> dict[str, Any]:
    """Return the classifier's defaults for a layer, by the registry's name."""
    return {**MODEL, **LAYER_MODEL.get(layer, {})}


LM: Mapping[str, Any] = {
    "mixer": "rglru",
    "d_model": 128,
    "n_layer": 3,
    "d_intermediate": 256,
    "norm": "rms",
    "mlp": "swiglu",
    "dropout": 0.0,
    "context": 256,
    "windows": "random",
    "validation_fraction": 0.01,
    "test_fraction": 0.05,
    "sample": 300,
    "temperature": 0.7,
}
"""Of `lrnnx train --task lm`; state sizes are those of `model_defaults`."""

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long and how fast `lrnnx_nn.training.engine.fit` trains.

    Attributes:
        steps: optimizer steps.
        batch_size: rows (windows, stretches) of the batch of one step.
        accumulate: compute the batch in so many parts one after another: the same step in less
            memory. Batch norms see the parts.
        precision: ``float32``, or ``bfloat16`` or ``float16`` for matrix products (autocast);
            weights, state-space parameters, states and sums stay float32.
        lr: peak learning rate, after warm-up; it falls to zero as a half cosine.
        ssm_lr: the same for the state-space parameters.
        weight_decay: of AdamW, on what is neither a state-space parameter nor a norm nor a bias.
        warmup: part of all steps in which the rate rises.
        clip: largest norm of the gradient.
        evaluate_every: steps between evaluations, after each of which the run can go on later; the
            last step is always followed by one.
        patience: stop after this many evaluations without a better one; 0 never stops.
        seed: of the initial values and of every draw.

    Raises:
        ValueError: a number outside its range.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    precision: str = "float32"
    lr: float = 2e-3
    ssm_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 100
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "accumulate": 1 <= self.accumulate <= self.batch_size,
            "precision": self.precision in PRECISIONS,
            "lr": self.lr > 0,
            "ssm_lr": self.ssm_lr >= 0,
            "weight_decay": self.weight_decay >= 0,
            "warmup": 0 <= self.warmup < 1,
            "clip": self.clip > 0,
            "evaluate_every": self.evaluate_every >= 1,
            "patience": self.patience >= 0,
            "seed": 0 <= self.seed < 2**63,
        }
        _refuse(self, ranges)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a classifier is trained.

    Attributes:
        epochs: largest number of passes over the training part.
        batch_size: sequences a step.
        lr: peak learning rate, after warm-up; it falls to zero as a half cosine.
        ssm_lr: the same for the state-space parameters.
        weight_decay: of AdamW, on what is neither a state-space parameter nor a norm nor a bias.
        warmup: part of all steps in which the rate rises.
        clip: largest norm of the gradient.
        label_smoothing: share of the target spread over all classes.
        noise: deviation of noise added to the inputs, in units of each channel's deviation.
        crop: training sequences are cut to a random stretch, at most this share shorter.
        validation_fraction: of each class of the training part, set aside for every choice.
        patience: stop after this many epochs without a better validation result; 0 never stops.
        refit: train again on training and validation part together for the epochs that validation
            chose, and keep that network.
        seed: of the splits, the initial values, the order and the noise.
        accumulate: compute the batch of a step in so many parts one after another.
        precision: ``float32``, or ``bfloat16`` or ``float16`` for matrix products (autocast).

    Raises:
        ValueError: a number outside its range.
    """

    epochs: int = 40
    batch_size: int = 32
    lr: float = 4e-3
    ssm_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    label_smoothing: float = 0.1
    noise: float = 0.3
    crop: float = 0.0
    validation_fraction: float = 0.2
    patience: int = 20
    refit: bool = True
    seed: int = 0
    accumulate: int = 1
    precision: str = "float32"

    def __post_init__(self) -> None:
        ranges = {
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "lr": self.lr > 0,
            "ssm_lr": self.ssm_lr >= 0,
            "weight_decay": self.weight_decay >= 0,
            "warmup": 0 <= self.warmup < 1,
            "clip": self.clip > 0,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "noise": self.noise >= 0,
            "crop": 0 <= self.crop < 1,
            "validation_fraction": 0 < self.validation_fraction < 1,
            "patience": self.patience >= 0,
            "seed": 0 <= self.seed < 2**63,
            "accumulate": 1 <= self.accumulate <= self.batch_size,
            "precision": self.precision in PRECISIONS,
        }
        _refuse(self, ranges)


def _refuse(config: Any, ranges: Mapping[str, bool]) -> None:
    """Raise a ValueError for the first value that does not fit."""
    for name, fits in ranges.items():
        if not fits:
            raise ValueError(f"{name} = {getattr(config, name)}, expected {_EXPECTED[name]}")


_EXPECTED = {
    "steps": "an integer >= 1",
    "evaluate_every": "an integer >= 1",
    "accumulate": "1 <= accumulate <= batch_size",
    "precision": f"one of {', '.join(PRECISIONS)}",
    "epochs": "an integer >= 1",
    "batch_size": "an integer >= 1",
    "lr": "a number > 0",
    "ssm_lr": "a number >= 0",
    "weight_decay": "a number >= 0",
    "warmup": "0 <= warmup < 1",
    "clip": "a number > 0",
    "label_smoothing": "0 <= label_smoothing < 1",
    "noise": "a number >= 0",
    "crop": "0 <= crop < 1",
    "validation_fraction": "0 < validation_fraction < 1",
    "patience": "an integer >= 0",
    "seed": "0 <= seed < 2^63",
}

LM_FIT = FitConfig(
    steps=1000, batch_size=16, lr=4e-3, weight_decay=0.1, warmup=0.05, evaluate_every=100
)
"""How a language model is trained."""
