"""Metrics: closed forms, padding, scale, silence and constants, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_nn import metrics
from lrnnx_nn.metrics import bits_per_byte, mae, mase, rmse, seasonal_scale, si_snr, smape, snr

same = torch.testing.assert_close
PAIRS: list[Callable[..., Tensor]] = [mae, rmse, smape, snr, si_snr]


def T(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_errors_in_closed_form() -> None:
    forecast, truth = T(1, 2, 3, 8), T(1, 4, 3, 4)
    same(mae(forecast, truth), torch.tensor(1.5).double())
    same(rmse(forecast, truth), torch.tensor(math.sqrt(5.0)).double())
    same(smape(forecast, truth), torch.tensor(50 * (2 / 6 + 4 / 12)).double())
    same(smape(T(0, 1), T(0, -1)), torch.tensor(100.0).double())  # 0/0 counts as no error


def test_mase_of_the_seasonal_naive_forecast_is_one() -> None:
    """In sample, one season ahead, by the definition of the scale."""
    y, season = noise(3, 40), 7
    scale = seasonal_scale(y, season)
    same(scale, (y[:, 7:] - y[:, :-7]).abs().mean(-1))
    same(mase(y[:, :-season], y[:, season:], scale), torch.ones(3).double())
    same(mase(y[:, :-season], y[:, season:], 2.0), scale / 2)


def test_mase_of_series_that_repeat_exactly() -> None:
    scale = seasonal_scale(T(5, 5, 5, 5))
    assert float(scale) == 0.0
    assert float(mase(T(5, 5), T(5, 5), scale)) == 0.0
    assert float(mase(T(5, 6), T(5, 5), scale)) == math.inf
    assert float(mase(T(5, 5), T(5, 5), 2.0)) == 0.0


def test_seasonal_scale_counts_observed_pairs_alone() -> None:
    y = T(1, 2, math.nan, 5, 9)
    mask = ~y.isnan()
    same(seasonal_scale(y, 1, mask=mask), torch.tensor((1 + 4) / 2).double())
    same(seasonal_scale(y, 3, mask=mask), torch.tensor((4 + 7) / 2).double())
    assert math.isnan(float(seasonal_scale(y[:3], 2, mask=mask[:3])))


def test_snr_in_closed_form() -> None:
    s, n = T(3, -3, 3, -3), T(1, 1, 1, 1)
    same(snr(s + n, s), torch.tensor(10 * math.log10(9.0)).double(), rtol=0, atol=1e-4)
    same(snr(s + n, s, zero_mean=True), torch.tensor(80.0).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("gain", [1.0, -0.5, 1e3])
def test_si_snr_in_closed_form(gain: float) -> None:
    """Of a target and noise at right angles: their ratio, whatever gains and offsets."""
    s, n = T(1, -1, 1, -1), T(1, 1, -1, -1)
    expected = torch.tensor(10 * math.log10(4 / 0.01 / 4)).double()
    same(si_snr(gain * (s + 0.1 * n), 7 * s), expected, rtol=0, atol=1e-4)
    same(si_snr(gain * (s + 0.1 * n) + 5, s - 2), expected, atol=1e-4, rtol=0)


def test_si_snr_is_a_function_of_the_angle() -> None:
    e, s = noise(5, 100), noise(5, 100, seed=1)
    a, b = (x - x.mean(-1, keepdim=True) for x in (e, s))
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    same(si_snr(e, s, eps=0.0), 10 * torch.log10(cosine**2 / (1 - cosine**2)))


def test_silence_and_constants_are_bounds() -> None:
    s, zero, limit = T(1, -2, 1), torch.zeros(3).double(), 10 * math.log10(1 + 1e8)
    for estimate, target in ((zero, s), (s, zero), (zero, zero), (s + 0, zero + 4), (zero + 4, s)):
        assert float(si_snr(estimate, target)) == pytest.approx(-limit)
    assert float(si_snr(s, 3 * s)) == pytest.approx(limit)
    assert float(snr(zero, s)) == pytest.approx(0.0)  # the error is as loud as the target
    assert float(snr(s, zero)) == pytest.approx(-limit)
    assert float(snr(s, s)) == float(snr(zero, zero)) == pytest.approx(limit)
    assert float(si_snr(s, 3 * s, eps=1e-3)) == pytest.approx(10 * math.log10(1001))


@pytest.mark.parametrize("metric", PAIRS)
def test_padding_changes_nothing(metric: Callable[..., Tensor]) -> None:
    e, s = noise(4, 9), noise(4, 9, seed=1)
    lengths = torch.tensor([9, 5, 1, 3])
    mask = torch.arange(9) < lengths[:, None]
    expected = torch.stack([metric(a[:n], b[:n]) for a, b, n in zip(e, s, lengths, strict=True)])
    e[~mask], s[~mask] = math.nan, math.inf
    same(metric(e, s, lengths=lengths), expected)
    same(metric(e, s, mask=mask), expected)
    same(metric(e.flip(-1), s.flip(-1), mask=mask.flip(-1)), expected)
    assert metric(e[:0], s[:0]).shape == (0,)


@pytest.mark.parametrize("metric", [mae, rmse])
def test_rows_without_samples_are_nan(metric: Callable[..., Tensor]) -> None:
    out = metric(noise(2, 3), noise(2, 3), lengths=torch.tensor([0, 3]))
    assert out.isnan().tolist() == [True, False]


@pytest.mark.parametrize("metric", [snr, si_snr])
def test_gradients_are_right_and_finite_at_silence(metric: Callable[..., Tensor]) -> None:
    e, s = noise(2, 6), noise(2, 6, seed=1)
    assert torch.autograd.gradcheck(lambda x: metric(x, s), e.requires_grad_())
    lengths = torch.tensor([4, 6])
    assert torch.autograd.gradcheck(lambda x: metric(x, s, lengths=lengths), e)
    for estimate, target in ((e * 0, s), (e, s * 0), (e * 0, s * 0)):
        x = estimate.detach().clone().requires_grad_()
        metric(x, target).sum().backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("metric", PAIRS)
def test_vmap(metric: Callable[..., Tensor]) -> None:
    e, s = noise(3, 2, 5), noise(3, 2, 5, seed=1)
    same(torch.vmap(metric)(e, s), metric(e, s))


def test_float32_reaches_the_bounds() -> None:
    s = noise(1, 8000).float()
    assert float(si_snr(s, s)) == pytest.approx(80.0, abs=0.1)
    assert float(si_snr(s + 1e-3 * noise(1, 8000, seed=1).float(), s)) == pytest.approx(60, abs=0.5)


def test_bits_per_byte() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    same(bits_per_byte(T(math.log(2)), 1), T(1.0))
    with pytest.raises(ValueError, match="n_bytes = 0, expected >= 1"):
        bits_per_byte(1.0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mae(T(1, 2), T(1)), r"mae: \(2,\) and \(1,\), expected equal"),
        (lambda: si_snr(torch.ones(2, dtype=torch.int64), torch.ones(2)), "expected floating"),
        (lambda: rmse(T(1), T(1), mask=T(1)), "mask torch.float64"),
        (lambda: snr(noise(2, 3), noise(2, 3), lengths=torch.tensor(3)), r"lengths \(\), expected"),
        (lambda: seasonal_scale(T(1, 2, 3), 3), "3 samples, expected more than season = 3"),
        (lambda: seasonal_scale(T(1, 2, 3), 0), "season = 0"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_metric_is_tested() -> None:
    public = {name for name, value in vars(metrics).items() if callable(value) and name[0] != "_"}
    own = {name for name in public if getattr(metrics, name).__module__ == metrics.__name__}
    assert own == {
        "mae",
        "rmse",
        "smape",
        "seasonal_scale",
        "mase",
        "snr",
        "si_snr",
        "bits_per_byte",
    }
