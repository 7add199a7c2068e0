# SPDX-License-Identifier: MIT
"""Sounds made noisy, and a U-Net that takes the noise off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrnnx_nn.architectures.unet import UNet
from lrnnx_nn.data.audio import Recording, mix

Noise = Callable[[Sequence[int], torch.Generator], Tensor]
LEVELS = 5
"""Signal-to-noise ratios that the files of a part take in turn."""


class Denoiser(nn.Module):
    """A U-Net on single-channel sound, brought to unit power by one constant factor.

    Args:
        unet: with one channel in and out.
        gain: what the sound is multiplied by on the way in, and divided by on the way out.

    Raises:
        ValueError: other channels, a gain that is not positive.
    """

    def __init__(self, unet: UNet, gain: float) -> None:
        super().__init__()
        config = unet.config
        if config.d_input != 1 or config.d_output not in (None, 1):
            raise ValueError(
                f"Denoiser: {config.d_input} channels in and {config.d_output} out, expected one"
            )
        if not gain > 0:
            raise ValueError(f"Denoiser: gain = {gain}, expected > 0")
        self.unet, self.gain = unet, gain

    def forward(self, noisy: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Map sounds (..., L) to estimates of the clean ones (..., L)."""
        u = (self.gain * noisy).unsqueeze(-1)
        return self.unet(u, lengths=lengths).squeeze(-1) / self.gain


class Pair(NamedTuple):
    """A sound with and without noise, (L,) each."""

    name: str
    noisy: Tensor
    clean: Tensor
    snr: float


class Batch(NamedTuple):
    """Right-padded stretches: noisy and clean (B, L), lengths (B,)."""

    noisy: Tensor
    clean: Tensor
    lengths: Tensor


def fixed_pairs(
    items: Sequence[Recording], noise: Noise, snr: tuple[float, float], seed: int
) -> list[Pair]:
    """Make recordings noisy, the same way every time: five ratios from ``snr[0]`` on in turn."""
    ratios = torch.linspace(*snr, LEVELS).tolist()
    pairs: list[Pair] = []
    for i, item in enumerate(items):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        ratio = ratios[i % LEVELS]
        clean = item.samples
        noisy = mix(clean, noise(clean.shape, generator), ratio)
        pairs.append(Pair(item.name, noisy, clean, ratio))
    return pairs


class Stretches:
    """Random stretches of recordings with fresh noise.

    Args:
        items: the recordings; longer ones are drawn more often.
        noise: draws the noise.
        snr: lowest and highest ratio.
        length: samples of a stretch; shorter recordings are padded.
    """

    def __init__(
        self, items: Sequence[Recording], noise: Noise, snr: tuple[float, float], length: int
    ) -> None:
        self.items, self.noise, self.snr, self.length = list(items), noise, snr, length
        self.weights = torch.tensor([float(len(item.samples)) for item in items])

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Return a batch of ``count`` stretches."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        clean = torch.zeros(count, self.length)
        lengths = torch.zeros(count, dtype=torch.int64)
        for row, which in enumerate(chosen.tolist()):
            x = self.items[which].samples
            n = min(len(x), self.length)
            start = int(torch.randint(len(x) - n + 1, (), generator=generator))
            clean[row, :n], lengths[row] = x[start : start + n], n
        low, high = self.snr
        snr = low + (high - low) * torch.rand(count, generator=generator)
        noise = self.noise(clean.shape, generator)
        inside = torch.arange(self.length) < lengths[:, None]
        # both are zero behind the end, so that their ratio is that of what is inside
        return Batch(mix(clean, torch.where(inside, noise, 0.0), snr), clean, lengths)


@torch.no_grad()
def denoise_all(
    model: Denoiser, sounds: Sequence[Tensor], device: torch.device | str, *, at_once: int = 160_000
) -> list[Tensor]:
    """Denoise whole sounds of any lengths.

    Args:
        model: in evaluation mode.
        sounds: (L,) each.
        device: of the model.
        at_once: samples in a batch, padding included; a longer sound is a batch by itself.

    Returns:
        (L,) each, on the CPU, in the order of ``sounds``.
    """
    order = sorted(range(len(sounds)), key=lambda i: len(sounds[i]))
    found: dict[int, Tensor] = {}
    batch: list[int] = []
    for position, i in enumerate(order):
        batch.append(i)
        following = order[position + 1 : position + 2]
        if following and len(sounds[following[0]]) * (len(batch) + 1) <= at_once:
            continue
        rows = [sounds[j] for j in batch]
        lengths = torch.tensor([len(row) for row in rows])
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        out = model(padded, lengths=lengths.to(device)).float().cpu()
        found |= {j: row[: len(sounds[j])] for j, row in zip(batch, out, strict=True)}
        batch = []
    return [found[i] for i in range(len(sounds))]
