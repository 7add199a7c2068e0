"""Baselines: what they must reproduce exactly, gaps, and that noise reduction reduces noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from lrnnx_nn.baselines import (
    Autoregression,
    drift,
    estimate_noise,
    interpolate,
    naive,
    noise_spectrum,
    seasonal_naive,
    spectral_subtraction,
    wiener,
)
from lrnnx_nn.metrics import si_snr

same = torch.testing.assert_close


def T(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grid(n: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + n).double()


# ---------------------------------------------------------------------------------------- series


def test_naive_and_drift() -> None:
    values, times, future = T(1, 5, 4), T(0, 1, 3), T(4, 6)
    same(naive(values, times, future), T(4, 4))
    same(drift(values, times, future), T(5, 7))  # a slope of one per unit of time, gap or not
    both = torch.stack([values, -values], -1)
    same(drift(both, times, future), torch.stack([T(5, 7), T(-5, -7)], -1))
    same(naive(both, times, future)[1], T(4, -4))


def test_seasonal_naive_repeats_the_last_season() -> None:
    values = torch.arange(10).double()
    got = seasonal_naive(values, grid(10), grid(7, 10), 3)
    same(got, T(7, 8, 9, 7, 8, 9, 7))
    same(seasonal_naive(values, grid(10), grid(2, 10), 10), T(0, 1))
    both = torch.stack([values, 2 * values], -1)
    same(seasonal_naive(both, grid(10), grid(4, 10), 3)[:, 1], T(14, 16, 18, 14))


def test_seasonal_naive_is_exact_for_a_periodic_series() -> None:
    times = grid(40) * 0.1 + 1e3  # times that floating point cannot add up exactly
    future = (grid(30, 40)) * 0.1 + 1e3
    values = torch.sin(2 * math.pi * torch.arange(70).double() / 7)
    same(seasonal_naive(values[:40], times, future, 0.7), values[40:], rtol=0, atol=1e-9)


def test_seasonal_naive_bridges_gaps_from_the_past_alone() -> None:
    values, times = T(0, 1, 2, 5, 6, 7), T(0, 1, 2, 5, 6, 7)
    same(seasonal_naive(values, times, T(8, 9, 10, 11), 4), T(4, 5, 6, 7))  # 4 is interpolated
    # the origin is inside of a gap: time 3 and 4 of the season before are not observed either
    same(seasonal_naive(values[:3], times[:3], T(5), 2), T(1))


def test_interpolate() -> None:
    same(interpolate(T(0, 4), T(1, 3), T(0, 1, 1.5, 3, 9)), T(0, 0, 1, 4, 4))
    same(interpolate(T(2), T(1), T(0, 1, 2)), T(2, 2, 2))


def series(coefficients: tuple[float, ...], n: int, intercept: float = 0.5) -> Tensor:
    y = [1.0, -0.5, 0.7][: len(coefficients)]
    for _ in range(n - len(y)):
        y.append(intercept + sum(c * y[-1 - k] for k, c in enumerate(coefficients)))
    return T(*y)


@pytest.mark.parametrize("missing", [[], [7], [3, 4, 20]])
def test_autoregression_finds_the_recursion(missing: list[int]) -> None:
    true = (0.9, -0.7, 0.3)
    y = series(true, 46)
    history = y[:40].clone()
    history[missing] = math.nan
    model = Autoregression.fit(history, 3)
    same(model.coefficients, T(*true), rtol=1e-6, atol=1e-6)
    same(model.intercept, torch.tensor(0.5).double(), rtol=1e-6, atol=1e-6)
    same(model.forecast(history, 6), y[40:], rtol=1e-6, atol=1e-6)
    assert model.forecast(history, 0).shape == (0,)


def test_autoregression_order_by_aic() -> None:
    random = np.random.default_rng(0)
    noise = random.standard_normal(2000)
    y = torch.from_numpy(scipy.signal.lfilter([1.0], [1.0, -0.6, 0.0, 0.0, 0.5], noise))
    model = Autoregression.fit(y, max_order=12)
    assert 4 <= model.order <= 6
    same(model.coefficients[:4], T(0.6, 0, 0, -0.5), rtol=0, atol=0.06)


def test_autoregression_interpolates_missing_lags() -> None:
    model = Autoregression(torch.tensor(0.0).double(), T(0, 1))
    same(model.forecast(T(9, 1, math.nan, 3), 2), T(2, 3))


def test_autoregression_of_a_constant() -> None:
    y = torch.full((20,), 4.0).double()
    for order in (None, 3):
        same(Autoregression.fit(y, order).forecast(y, 5), torch.full((5,), 4.0).double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: naive(T(), T(), T(1)), "naive: 0 values, expected at least 1"),
        (lambda: drift(T(1), T(1), T(2)), "drift: 1 values, expected at least 2"),
        (lambda: naive(T(1, 2), T(1), T(2)), r"times \(1,\)"),
        (lambda: naive(T(1, 2), T(1, 1), T(2)), "do not increase"),
        (lambda: naive(T(1, 2), T(1, 2), T(2)), "expected all after 2"),
        (lambda: seasonal_naive(T(1, 2), T(1, 2), T(3), 0), "season = 0"),
        (lambda: seasonal_naive(T(1, 2), T(1, 2), T(3), 4), "spans 1, expected .* season of 4"),
        (lambda: Autoregression.fit(T(1, 2, 3), 2), "1 complete stretches of 3 samples"),
        (lambda: Autoregression.fit(T(1, 2, 3), 0), "order = 0"),
        (lambda: Autoregression.fit(T(1, math.nan, 3)), "too few for any order"),
        (lambda: Autoregression(T(0)[0], T(1, 1)).forecast(T(1), 1), "1 values, expected"),
        (lambda: Autoregression(T(0)[0], T(1)).forecast(T(1, math.nan), 1), "last one is observed"),
        (lambda: estimate_noise(torch.ones(9), quantile=1.0), "quantile = 1.0"),
        (lambda: wiener(torch.ones(2, 0)), r"\(2, 0\), expected"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------- signals

RATE, SECONDS = 8000, 2


def tones() -> Tensor:
    """Bursts of a tone: half of the time silent."""
    t = torch.arange(RATE * SECONDS).double() / RATE
    return torch.sin(2 * math.pi * 440 * t) * (torch.sin(2 * math.pi * 3 * t) > 0)


def noisy(level: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    clean = tones()
    noise = torch.randn(len(clean), generator=torch.Generator().manual_seed(seed)).double() * level
    return clean, noise, clean + noise


def test_noise_spectrum_is_scipys() -> None:
    _, noise, _ = noisy()
    window = scipy.signal.get_window("hann", 256)
    transform = scipy.signal.ShortTimeFFT(window, hop=64, fs=RATE)
    expected = np.abs(transform.stft(noise.numpy(), p0=0, p1=len(noise) // 64 + 1)) ** 2
    same(noise_spectrum(noise), torch.from_numpy(expected.mean(-1)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("quantile", [0.2, 0.5])
def test_estimate_of_noise_alone_is_unbiased(quantile: float) -> None:
    _, noise, _ = noisy(0.5)
    expected = 0.25 * float(torch.hann_window(256).square().sum())
    inner = estimate_noise(noise, quantile=quantile)[5:-5]
    assert float(inner.mean()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("method", [spectral_subtraction, wiener])
def test_noise_is_reduced(method: Callable[..., Tensor]) -> None:
    clean, noise, mixed = noisy()
    before = float(si_snr(mixed, clean))
    blind, informed = method(mixed), method(mixed, noise_spectrum(noise))
    assert blind.shape == mixed.shape
    assert float(si_snr(blind, clean)) > before + 8
    assert float(si_snr(informed, clean)) > before + 8


@pytest.mark.parametrize("method", [spectral_subtraction, wiener])
def test_without_noise_nothing_changes(method: Callable[..., Tensor]) -> None:
    clean = tones()
    same(method(clean, torch.zeros(129).double()), clean, rtol=0, atol=1e-9)
    silence = torch.zeros(3, 500)
    same(method(silence), silence)
    assert method(torch.ones(7)).shape == (7,)  # shorter than a window


@pytest.mark.parametrize("method", [spectral_subtraction, wiener])
def test_batches_and_loudness(method: Callable[..., Tensor]) -> None:
    rows = torch.stack([noisy(seed=seed)[2] for seed in range(3)])
    alone = torch.stack([method(row) for row in rows])
    same(method(rows), alone)
    same(method(100 * rows), 100 * alone)
