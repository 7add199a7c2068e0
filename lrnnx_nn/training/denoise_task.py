# SPDX-License-Identifier: MIT
"""What a denoiser is trained and chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_nn.data.audio import (
    FileSplit,
    RecordedNoise,
    Recordings,
    pink_noise,
    read_folder,
    split_by_file,
    white_noise,
)
from lrnnx_nn.metrics import si_snr, snr
from lrnnx_nn.signal_recipes import DenoiseConfig, SoundSource
from lrnnx_nn.training.denoiser import (
    Batch,
    Denoiser,
    Noise,
    Pair,
    Stretches,
    denoise_all,
    fixed_pairs,
)
from lrnnx_nn.training.engine import BaseTask, to_device

VALIDATION_FILES = 24
"""At most so many files judge the network while it is trained."""
GENERATED = {"white": white_noise, "pink": pink_noise}


class Sounds(NamedTuple):
    """What a run works on.

    Attributes:
        clean: the recordings.
        split: in three parts.
        noise: of each part.
        shared_noise: whether all parts draw from the same recordings of noise.
    """

    clean: Recordings
    split: FileSplit
    noise: tuple[Noise, Noise, Noise]
    shared_noise: bool


class DenoiseTask(BaseTask):
    """Stretches of the training part with fresh noise; SI-SNR of whole validation files.

    Args:
        sounds: from `read`.
        config: ratios, length of stretches, loss.
        batch_size: stretches a step.
    """

    metric = "validation_si_snr"
    maximize = True

    def __init__(self, sounds: Sounds, config: DenoiseConfig, batch_size: int) -> None:
        self.config, self.batch_size = config, batch_size
        length = max(1, round(config.segment * sounds.clean.rate))
        items = sounds.split.train
        self.stretches = Stretches(items, sounds.noise[0], config.snr, length)
        power = sum(float(item.samples.double().square().sum()) for item in items)
        self.gain = (power / sum(len(item.samples) for item in items)) ** -0.5
        validation = fixed_pairs(
            sounds.split.validation, sounds.noise[1], config.snr, config.split_seed
        )
        self.validation = validation[:VALIDATION_FILES]

    def batch(self, generator: torch.Generator) -> Batch:
        """Return stretches from anywhere in the training part."""
        return self.stretches.draw(self.batch_size, generator)

    def loss(self, model: Denoiser, batch: Batch) -> Tensor:
        """Return the mean loss that the config names."""
        noisy, clean, lengths = to_device(batch, next(model.parameters()).device)
        estimate = model(noisy, lengths=lengths).float()
        if self.config.loss == "l1":
            return (estimate - clean).abs().sum() * self.gain / lengths.sum()
        metric = snr if self.config.loss == "snr" else si_snr
        return -metric(estimate, clean, lengths=lengths).mean()

    def evaluate(self, model: Denoiser) -> dict[str, float]:
        """Return the mean SI-SNR over the validation files, and by how much it rose."""
        device = next(model.parameters()).device
        cleaned = denoise_all(model, [pair.noisy for pair in self.validation], device)
        after = mean(each(si_snr, cleaned, self.validation))
        before = mean(each(si_snr, [pair.noisy for pair in self.validation], self.validation))
        return {self.metric: after, "validation_improvement": after - before}


def each(metric: Any, estimates: Sequence[Tensor], pairs: Sequence[Pair]) -> list[float]:
    """Return a metric of every sound against its clean one, in float64."""
    return [
        float(metric(x.double(), pair.clean.double()))
        for x, pair in zip(estimates, pairs, strict=True)
    ]


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def read(source: SoundSource, config: DenoiseConfig) -> Sounds:
    """Read recordings and noise, and split both by file.

    Fewer than three recordings of noise cannot be split: all parts share them.

    Raises:
        ValueError: a bad folder or file, too few recordings.
    """
    options: dict[str, Any] = {"on_rate": source.on_rate, "channel": source.channel}
    clean = read_folder(source.wav, rate=source.rate, **options)
    shares = config.validation_fraction, config.test_fraction
    split = split_by_file(clean.items, *shares, seed=config.split_seed)
    generated = GENERATED.get(source.noise)
    if generated is not None:
        return Sounds(clean, split, (generated, generated, generated), False)
    try:
        noise = read_folder(source.noise, rate=clean.rate, trim=False, **options).items
    except ValueError as error:
        raise ValueError(f"noise: {error} (expected white, pink or a folder of WAVs)") from error
    if len(noise) < 3:
        shared = RecordedNoise(noise)
        return Sounds(clean, split, (shared, shared, shared), True)
    parts = split_by_file(noise, *shares, seed=config.split_seed)
    train, validation, test = (RecordedNoise(part) for part in parts)
    return Sounds(clean, split, (train, validation, test), False)
