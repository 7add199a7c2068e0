# SPDX-License-Identifier: MIT
"""Recordings: folders of WAV files, silence, noise, and splits by file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lrnnx_nn.data.wav import Channel, Recording, read_wav, resample, write_wav

__all__ = [
    "Channel",
    "FileSplit",
    "OnRate",
    "RecordedNoise",
    "Recording",
    "Recordings",
    "mix",
    "pink_noise",
    "read_folder",
    "read_wav",
    "resample",
    "split_by_file",
    "trim_silence",
    "white_noise",
    "write_wav",
]

OnRate = Literal["error", "resample"]


class Recordings(NamedTuple):
    """What `read_folder` found, sorted by name, all of one rate.

    Attributes:
        items: the recordings.
        rate: samples a second.
        silent: names of files left out because they hold nothing but silence.
    """

    items: list[Recording]
    rate: int
    silent: list[str]

    @property
    def seconds(self) -> float:
        """Total duration."""
        return sum(item.seconds for item in self.items)


class FileSplit(NamedTuple):
    """Recordings in three parts; no file is in two of them."""

    train: list[Recording]
    validation: list[Recording]
    test: list[Recording]


def read_folder(
    folder: str | Path,
    *,
    rate: int | None = None,
    on_rate: OnRate = "error",
    channel: Channel = "mean",
    trim: bool = True,
) -> Recordings:
    """Read every WAV file in a folder and the folders below it.

    Args:
        folder: where they are; names that begin with a dot are passed over.
        rate: samples a second; that of the first file if None.
        on_rate: whether a file of another rate is refused or resampled.
        channel: see `read_wav`.
        trim: cut silence at both ends, see `trim_silence`.

    Raises:
        ValueError: no such folder, no WAV file in it, nothing but silence, a bad file or one of
            another rate; the message names it.
        MissingDependencyError: a file has to be resampled, and scipy is not installed.
    """
    folder = Path(folder)
    if on_rate not in get_args(OnRate):
        raise ValueError(f"on_rate = {on_rate!r}, expected one of {list(get_args(OnRate))}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == ".wav" and path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise ValueError(f"{folder}: no WAV files in it")
    items: list[Recording] = []
    silent: list[str] = []
    first = files[0]
    for path in files:
        recording = read_wav(path, channel=channel)
        recording = dataclasses.replace(recording, name=path.relative_to(folder).as_posix())
        rate = recording.rate if rate is None else rate
        if recording.rate != rate:
            if on_rate == "error":
                raise ValueError(
                    f"{path}: {recording.rate} Hz, expected {rate} Hz as {first.name} or as asked; "
                    "choose on-rate resample"
                )
            recording = resample(recording, rate)
        if trim:
            recording = trim_silence(recording)
        if len(recording.samples) and bool(recording.samples.any()):
            items.append(recording)
        else:
            silent.append(recording.name)
    if not items or rate is None:
        raise ValueError(f"{folder}: {len(silent)} WAV files, all of them silent")
    return Recordings(items, rate, silent)


def trim_silence(
    recording: Recording, *, threshold: float = -40.0, least: float = -60.0, margin: float = 0.05
) -> Recording:
    """Cut the quiet ends of a recording.

    Args:
        recording: any.
        threshold: what counts as quiet, in dB of the power of 10 ms against the loudest 10 ms.
        least: dB of full scale below which everything is quiet.
        margin: seconds that stay at both ends.

    Returns:
        The rest; no samples if all of it is quiet.
    """
    frame = max(1, recording.rate // 100)
    x = recording.samples
    padded = torch.nn.functional.pad(x, (0, -len(x) % frame))
    power = padded.reshape(-1, frame).square().mean(-1)
    limit = max(float(power.max()) * 10 ** (threshold / 10), 10 ** (least / 10))
    loud = (power > limit).nonzero().flatten()
    if not len(loud):
        return dataclasses.replace(recording, samples=x[:0])
    extra = round(margin * recording.rate)
    start = max(0, int(loud[0]) * frame - extra)
    stop = min(len(x), (int(loud[-1]) + 1) * frame + extra)
    return dataclasses.replace(recording, samples=x[start:stop])


def split_by_file(
    items: Sequence[Recording], validation: float = 0.1, test: float = 0.1, *, seed: int = 0
) -> FileSplit:
    """Put whole recordings into three parts; the same names and seed give the same parts.

    Args:
        items: at least three.
        validation: share of the files, at least one.
        test: share of the files, at least one.
        seed: of the draw.

    Raises:
        ValueError: shares that are not positive or leave nothing to train on, too few files.
    """
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError(
            f"split_by_file: validation = {validation}, test = {test}, expected both > 0 and "
            "their sum < 1"
        )
    held = [max(1, round(share * len(items))) for share in (validation, test)]
    if len(items) - sum(held) < 1:
        raise ValueError(f"split_by_file: {len(items)} recordings, too few for three parts")
    ordered = sorted(items, key=lambda item: item.name)
    order = np.random.default_rng(seed).permutation(len(ordered))
    parts = np.split(order, [held[0], sum(held)])
    validating, testing, training = ([ordered[i] for i in sorted(part)] for part in parts)
    return FileSplit(training, validating, testing)


# -------------------------------------------------------------------------------------------- noise


def white_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return Gaussian noise of unit power, the same power in every band."""
    return torch.randn(tuple(shape), generator=generator)


def pink_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return Gaussian noise (..., L) of unit power in the mean, the same power in every octave."""
    length = shape[-1]
    spectrum = torch.fft.rfft(white_noise(shape, generator))
    weights = torch.arange(spectrum.shape[-1]).clamp(min=1).rsqrt()
    weights[0] = 0.0
    counts = torch.full_like(weights, 2.0)  # each band but these two stands for two of the FFT's
    counts[0] = 1.0
    if length % 2 == 0:
        counts[-1] = 1.0
    power = (counts * weights.square()).sum() / length
    scale = power.rsqrt() if length > 1 else power
    return torch.fft.irfft(spectrum * weights, n=length) * scale


class RecordedNoise:
    """Draws stretches from recordings of noise, each looped where it is too short.

    Args:
        items: the recordings, none of them silent.
    """

    def __init__(self, items: Sequence[Recording]) -> None:
        self.items = list(items)

    def __call__(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return noise of ``shape`` (..., L)."""
        rows = math.prod(shape[:-1])
        return torch.stack([self._draw(shape[-1], generator) for _ in range(rows)]).reshape(
            tuple(shape)
        )

    def _draw(self, length: int, generator: torch.Generator) -> Tensor:
        which = int(torch.randint(len(self.items), (), generator=generator))
        x = self.items[which].samples
        start = int(torch.randint(len(x), (), generator=generator))
        return x[(start + torch.arange(length)) % len(x)]


def mix(clean: Tensor, noise: Tensor, snr: Tensor | float) -> Tensor:
    """Return clean + noise, the noise scaled to a signal-to-noise ratio.

    Args:
        clean: (..., L).
        noise: (..., L).
        snr: (...) or a number, in dB of mean powers. A row without any sound, of either kind,
            stays as it is.

    Raises:
        ValueError: shapes that do not fit.
    """
    if clean.shape != noise.shape or clean.ndim < 1:
        raise ValueError(f"mix: {tuple(clean.shape)} and {tuple(noise.shape)}, expected equal")
    powers = [x.square().mean(-1, keepdim=True) for x in (clean, noise)]
    wanted = powers[0] * 10 ** (-torch.as_tensor(snr).to(clean).unsqueeze(-1) / 10)
    loud = powers[1] > 0
    gain = (wanted / torch.where(loud, powers[1], torch.ones_like(wanted))).sqrt()
    return clean + torch.where(loud, gain, torch.zeros_like(gain)) * noise
