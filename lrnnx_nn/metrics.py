# SPDX-License-Identifier: MIT
"""How good a forecast, a denoised signal or a language model is, as pure functions of tensors.

Signals are ``(..., L)``: one channel, time last; results are ``(...)``. ``lengths (...)`` counts
the samples of right-padded rows and ``mask (..., L)`` names the samples that count; what they leave
out changes nothing. Every function is differentiable and maps under ``torch.vmap``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lrnnx_core.sequences import valid_mask

DECIBEL_EPS = 1e-8
"""Bounds `snr` and `si_snr` to ±80 dB."""

# ------------------------------------------------------------------------------------- forecasts


def mae(
    forecast: Tensor, truth: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return the mean absolute error (...) of ``forecast (..., L)``.

    Rows without a sample that counts give NaN.

    Raises:
        ValueError: shapes that do not fit.
    """
    valid = _check("mae", forecast, truth, lengths, mask)
    return _mean((forecast - truth).abs(), valid)


def rmse(
    forecast: Tensor, truth: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return the root of the mean squared error (...); rows without a sample give NaN.

    Raises:
        ValueError: shapes that do not fit.
    """
    valid = _check("rmse", forecast, truth, lengths, mask)
    return _mean((forecast - truth).square(), valid).sqrt()


def smape(
    forecast: Tensor, truth: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return the symmetric mean absolute percentage error (...), between 0 and 200.

    The mean of ``200 |forecast - truth| / (|forecast| + |truth|)``; where both are zero the term is
    zero. It depends on where the zero of the unit lies: prefer `mase`.

    Raises:
        ValueError: shapes that do not fit.
    """
    valid = _check("smape", forecast, truth, lengths, mask)
    size = forecast.abs() + truth.abs()
    error = (forecast - truth).abs() / torch.where(size == 0, torch.ones_like(size), size)
    return 200 * _mean(error, valid)


def seasonal_scale(history: Tensor, season: int = 1, *, mask: Tensor | None = None) -> Tensor:
    """Return the in-sample mean absolute error (...) of the seasonal naive forecast.

    Args:
        history: (..., L), equally spaced, longer than ``season``.
        season: samples a period; 1 compares neighbours.
        mask: (..., L) bool, False where no value was observed: only pairs of observed samples
            exactly one season apart count. Without any such pair the result is NaN.

    Raises:
        ValueError: a season < 1, a history that is not longer than it, shapes that do not fit.
    """
    if season < 1:
        raise ValueError(f"seasonal_scale: season = {season}, expected an integer >= 1")
    valid = _check("seasonal_scale", history, history, None, mask)
    if history.shape[-1] <= season:
        raise ValueError(
            f"seasonal_scale: {history.shape[-1]} samples, expected more than season = {season}"
        )
    later, earlier = history[..., season:], history[..., :-season]
    pairs = None if valid is None else valid[..., season:] & valid[..., :-season]
    return _mean((later - earlier).abs(), pairs)


def mase(
    forecast: Tensor,
    truth: Tensor,
    scale: Tensor | float,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the mean absolute scaled error (...): `mae` over ``scale``.

    Below one the forecast errs less than the seasonal naive one did, one step ahead, on the
    training part.

    Args:
        forecast: (..., L).
        truth: (..., L).
        scale: (...) or a number, from `seasonal_scale` of the training part. Where it is zero (a
            series that repeats itself exactly) the result is 0 for an exact forecast, else inf.
        lengths: (...).
        mask: (..., L) bool.

    Raises:
        ValueError: shapes that do not fit.

    Source: Hyndman and Koehler 2006, doi:10.1016/j.ijforecast.2006.03.001.
    """
    error = mae(forecast, truth, lengths=lengths, mask=mask)
    scale = torch.as_tensor(scale, dtype=error.dtype, device=error.device)
    exact = (scale == 0) & (error == 0)
    return torch.where(exact, torch.zeros_like(error), error / torch.where(exact, 1.0, scale))


# --------------------------------------------------------------------------------------- signals


def snr(
    estimate: Tensor,
    target: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    zero_mean: bool = False,
    eps: float = DECIBEL_EPS,
) -> Tensor:
    """Return the signal-to-noise ratio (...) in dB, ``10 log10(|s|² / |e - s|²)``.

    Args:
        estimate: e (..., L).
        target: s (..., L).
        lengths: (...).
        mask: (..., L) bool.
        zero_mean: take each row's mean off first.
        eps: added to both energies in units of their sum, so that the result stays within
            ±10 log10(1 + 1/eps) whatever the loudness: that bound for an exact estimate (of
            silence too), its negative for a target that is silent and an estimate that is not.

    Raises:
        ValueError: shapes that do not fit.
    """
    e, s = _rows("snr", estimate, target, lengths, mask, zero_mean)
    return _decibel(_energy(s), _energy(e - s), eps, silent=True)


def si_snr(
    estimate: Tensor,
    target: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    zero_mean: bool = True,
    eps: float = DECIBEL_EPS,
) -> Tensor:
    """Return the scale-invariant signal-to-noise ratio (...) in dB.

    With p the projection of the estimate e on the target s it is ``10 log10(|p|² / |e - p|²)``: no
    constant factor on either of them changes it.

    Args:
        estimate: e (..., L).
        target: s (..., L).
        lengths: (...).
        mask: (..., L) bool.
        zero_mean: take each row's mean off first, as is usual.
        eps: added to both energies in units of |e|², so that the result stays within
            ±10 log10(1 + 1/eps). A silent target or a silent estimate (constant ones with
            ``zero_mean``) has no direction: the lower bound, with a gradient of zero.

    Raises:
        ValueError: shapes that do not fit.

    Source: Luo and Mesgarani 2018, arXiv:1711.00541; Le Roux et al. 2019, arXiv:1811.02508.
    """
    e, s = _rows("si_snr", estimate, target, lengths, mask, zero_mean)
    power = _energy(s)
    gain = (e * s).sum(-1) / torch.where(power == 0, torch.ones_like(power), power)
    p = gain.unsqueeze(-1) * s
    return _decibel(_energy(p), _energy(e - p), eps, silent=False)


# ---------------------------------------------------------------------------------------- language


def bits_per_byte(nats: Tensor | float, n_bytes: int) -> Tensor | float:
    """Return the code length in bits per byte of text.

    Args:
        nats: the *sum* of the cross entropies of all tokens, natural logarithm.
        n_bytes: length of the text that they encode, in bytes of UTF-8.

    Raises:
        ValueError: n_bytes < 1.
    """
    if n_bytes < 1:
        raise ValueError(f"bits_per_byte: n_bytes = {n_bytes}, expected >= 1")
    return nats / (math.log(2) * n_bytes)


# ----------------------------------------------------------------------------------------- shared


def _check(
    where: str, a: Tensor, b: Tensor, lengths: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """Check shapes; return which samples count, None for all."""
    if a.ndim < 1 or a.shape != b.shape:
        raise ValueError(f"{where}: {tuple(a.shape)} and {tuple(b.shape)}, expected equal (..., L)")
    if not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(f"{where}: {a.dtype} and {b.dtype}, expected floating point")
    valid = mask
    if mask is not None and (mask.dtype != torch.bool or mask.shape != a.shape):
        raise ValueError(
            f"{where}: mask {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(a.shape)}"
        )
    if lengths is not None:
        if lengths.shape != a.shape[:-1]:
            raise ValueError(
                f"{where}: lengths {tuple(lengths.shape)}, expected {tuple(a.shape[:-1])}"
            )
        within = valid_mask(lengths, a.shape[-1])
        valid = within if valid is None else valid & within
    return valid


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean over what counts; padding may hold anything."""
    if valid is None:
        return x.mean(-1)
    return torch.where(valid, x, torch.zeros_like(x)).sum(-1) / valid.sum(-1)


def _rows(
    where: str,
    estimate: Tensor,
    target: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    zero_mean: bool,
) -> tuple[Tensor, Tensor]:
    """Return both signals with zeros where nothing counts, and means taken off if asked."""
    valid = _check(where, estimate, target, lengths, mask)
    signals: list[Tensor] = []
    for x in (estimate, target):
        if valid is not None:
            x = torch.where(valid, x, torch.zeros_like(x))
        if zero_mean:
            count = x.shape[-1] if valid is None else valid.sum(-1, keepdim=True)
            x = x - x.sum(-1, keepdim=True) / _at_least_one(count)
            if valid is not None:
                x = torch.where(valid, x, torch.zeros_like(x))
        signals.append(x)
    return signals[0], signals[1]


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _energy(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _decibel(signal: Tensor, noise: Tensor, eps: float, silent: bool) -> Tensor:
    """Return the bounded ratio in dB; of nothing to nothing the upper bound if ``silent``."""
    total = signal + noise
    nothing = total == 0
    safe = torch.where(nothing, torch.ones_like(total), total)
    ratio = (signal / safe + eps) / (noise / safe + eps)
    limit = math.inf if eps == 0 else (1 + eps) / eps
    ratio = torch.where(nothing, torch.full_like(ratio, limit if silent else 1 / limit), ratio)
    return 10 * torch.log10(ratio)
