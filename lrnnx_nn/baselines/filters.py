# SPDX-License-Identifier: MIT
"""Classical noise reduction, from a noisy recording alone or with the spectrum of its noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FRAME, HOP = 256, 64
"""Samples of a Hann window and between two of them: 32 ms and 8 ms at 8 kHz."""


def noise_spectrum(x: Tensor, *, frame: int = FRAME, hop: int = HOP) -> Tensor:
    """Return the mean power (..., frame//2 + 1) in each band of a recording x (..., L) of noise."""
    return _stft(x, frame, hop).abs().square().mean(-1)


def estimate_noise(
    noisy: Tensor, *, quantile: float = 0.3, frame: int = FRAME, hop: int = HOP
) -> Tensor:
    """Estimate the power of steady noise in each band of a recording of speech.

    The quantile over time of the power in a band, which speech leaves often; divided by what that
    quantile is for Gaussian noise of unit power, -ln(1 - quantile).

    Args:
        noisy: (..., L).
        quantile: 0 < quantile < 1.
        frame: samples of a window.
        hop: samples between two windows.

    Returns:
        (..., frame//2 + 1).

    Source: the idea is Stahl, Fischer and Bippus 2000, doi:10.1109/ICASSP.2000.862122.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"estimate_noise: quantile = {quantile}, expected 0 < quantile < 1")
    power = _stft(noisy, frame, hop).abs().square()
    return power.quantile(quantile, dim=-1) / -math.log1p(-quantile)


def spectral_subtraction(
    noisy: Tensor,
    noise: Tensor | None = None,
    *,
    over: float = 2.0,
    floor: float = 0.02,
    frame: int = FRAME,
    hop: int = HOP,
) -> Tensor:
    """Take the noise's power off the power in each band; the phase stays.

    Args:
        noisy: (..., L).
        noise: (..., frame//2 + 1) power of the noise in each band; `estimate_noise` if None.
        over: how many times that power is taken off.
        floor: share of the noise's power that stays at least.
        frame: samples of a window.
        hop: samples between two windows.

    Returns:
        (..., L).

    Source: Boll 1979, doi:10.1109/TASSP.1979.1163209; Berouti, Schwartz and Makhoul 1979,
    doi:10.1109/ICASSP.1979.1170788.
    """
    noise = estimate_noise(noisy, frame=frame, hop=hop) if noise is None else noise
    spectrum = _stft(noisy, frame, hop)
    power, noise = spectrum.abs().square(), noise.unsqueeze(-1)
    kept = torch.maximum(power - over * noise, floor * noise)
    gain = (kept / power.clamp(min=torch.finfo(power.dtype).tiny)).clamp(max=1.0).sqrt()
    return _istft(gain * spectrum, noisy, frame, hop)


def wiener(
    noisy: Tensor,
    noise: Tensor | None = None,
    *,
    smoothing: float = 0.98,
    least: float = 10**-2.5,
    frame: int = FRAME,
    hop: int = HOP,
) -> Tensor:
    """Filter each band by its estimated signal-to-noise ratio, snr / (1 + snr).

    The ratio is estimated frame by frame, "decision-directed": a mean of what the frame before was
    found to hold and of what this frame holds above the noise.

    Args:
        noisy: (..., L).
        noise: (..., frame//2 + 1) power of the noise in each band; `estimate_noise` if None.
        smoothing: weight of the frame before.
        least: the smallest ratio, -25 dB.
        frame: samples of a window.
        hop: samples between two windows.

    Returns:
        (..., L).

    Source: Ephraim and Malah 1984, doi:10.1109/TASSP.1984.1164453 (the estimate); Scalart and
    Filho 1996, doi:10.1109/ICASSP.1996.543199 (with this gain).
    """
    noise = estimate_noise(noisy, frame=frame, hop=hop) if noise is None else noise
    spectrum = _stft(noisy, frame, hop)
    power = spectrum.abs().square()
    noise = torch.maximum(noise.unsqueeze(-1), 1e-12 * power)  # no ratio above 120 dB
    ratio = power / noise.clamp(min=torch.finfo(power.dtype).tiny)
    previous = ratio[..., 0].clamp(min=1.0) - 1.0
    gains: list[Tensor] = []
    for posterior in ratio.unbind(-1):
        prior = smoothing * previous + (1 - smoothing) * (posterior - 1).clamp(min=0.0)
        prior = prior.clamp(min=least)
        gain = prior / (1 + prior)
        previous = gain.square() * posterior
        gains.append(gain)
    return _istft(torch.stack(gains, -1) * spectrum, noisy, frame, hop)


def _stft(x: Tensor, frame: int, hop: int) -> Tensor:
    if x.ndim < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"x {x.dtype} {tuple(x.shape)}, expected floating (..., L) with L >= 1")
    window = torch.hann_window(frame, dtype=x.dtype, device=x.device)
    spectrum = torch.stft(
        x.reshape(-1, x.shape[-1]), frame, hop, window=window, center=True, pad_mode="constant",
        return_complex=True,
    )  # fmt: skip
    return spectrum.reshape(x.shape[:-1] + spectrum.shape[1:])


def _istft(spectrum: Tensor, like: Tensor, frame: int, hop: int) -> Tensor:
    window = torch.hann_window(frame, dtype=like.dtype, device=like.device)
    out = torch.istft(
        spectrum.reshape(-1, *spectrum.shape[-2:]), frame, hop, window=window, center=True,
        length=like.shape[-1],
    )  # fmt: skip
    return out.reshape(like.shape)
