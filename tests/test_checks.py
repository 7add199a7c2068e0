"""The checks of values: what they let through, and what they say of the rest."""

from __future__ import annotations

import pytest
import torch

from lrnnx_core import checks


def test_finite_values_pass_and_the_first_bad_one_is_named() -> None:
    checks.finite("x", torch.randn(3, 2))
    checks.finite("x", torch.empty(0))
    checks.finite("x", torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"x: nan at \(1, 0\), expected finite values"):
        checks.finite("x", torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match=r"loss: inf at \(\), expected finite values"):
        checks.finite("loss", torch.tensor(float("inf")))


def test_timesteps_are_finite_and_not_negative() -> None:
    checks.integration_timesteps(torch.tensor([[0.0, 1.5]]))
    checks.integration_timesteps(torch.empty(2, 0))
    with pytest.raises(
        ValueError,
        match=r"integration_timesteps: -0.25 at \(0, 1\), expected values >= 0 .*sorted\?",
    ):
        checks.integration_timesteps(torch.tensor([[0.0, -0.25]]))
    with pytest.raises(ValueError, match=r"integration_timesteps: nan at \(1,\), expected finite"):
        checks.integration_timesteps(torch.tensor([0.0, float("nan")]))


def test_lengths_lie_in_the_padded_sequence() -> None:
    checks.lengths(torch.tensor([0, 5]), 5)
    checks.lengths(torch.empty(0, dtype=torch.long), 5)
    with pytest.raises(ValueError, match=r"lengths: between 1 and 6, expected 0 ... 5"):
        checks.lengths(torch.tensor([1, 6]), 5)
    with pytest.raises(ValueError, match=r"lengths: between -1 and 3, expected 0 ... 5"):
        checks.lengths(torch.tensor([3, -1]), 5)


def test_cu_seqlens_rise_from_zero_to_the_length() -> None:
    checks.cu_seqlens(torch.tensor([0, 2, 2, 5]), 5)
    checks.cu_seqlens(torch.tensor([0]), 0)
    for bad in ([1, 5], [0, 4], [0, 3, 2, 5]):
        with pytest.raises(
            ValueError, match=r"cu_seqlens: \[.*expected 0 first, 5 last, nondecreas"
        ):
            checks.cu_seqlens(torch.tensor(bad), 5)
    for wrong in (torch.tensor([0.0, 5.0]), torch.tensor([[0, 5]]), torch.empty(0).long()):
        with pytest.raises(ValueError, match=r"cu_seqlens: \(.*expected \(S \+ 1,\) integers"):
            checks.cu_seqlens(wrong, 5)


def test_unstable_eigenvalues_are_warned_of_and_the_largest_is_named() -> None:
    assert checks.stable("x", torch.tensor([[0.5 + 0.2j, -1.0 + 0j]]))
    assert checks.stable("x", torch.tensor([1.0 + 1e-7]))  # rounding
    assert checks.stable("x", torch.empty(0))
    with pytest.warns(
        checks.StabilityWarning,
        match=r"x: eigenvalue 0\+1\.5j of A_bar at \(1, 0\) has modulus 1\.5, expected <= 1; the "
        r"state grows without bound\. clip it$",
    ):
        assert not checks.stable("x", torch.tensor([[1.2, 0.5], [1.5j, 0.1]]), "clip it")
    with pytest.warns(checks.StabilityWarning, match=r"has modulus 1 \+ 2\.03e-06, expected <= 1"):
        assert not checks.stable("x", torch.tensor([1 + 2e-6]))
    with pytest.warns(checks.StabilityWarning, match=r"eigenvalue nan of A_bar at \(1,\)"):
        assert not checks.stable("x", torch.tensor([2.0, float("nan")]))


def test_time_stamps_do_not_run_backwards() -> None:
    checks.timestamps(torch.tensor([[0, 1, 1, 5], [3, 3, 4, 9]]))
    checks.timestamps(torch.tensor([0.0, 0.5]))
    checks.timestamps(torch.empty(2, 0))
    checks.timestamps(torch.tensor([7]))
    with pytest.raises(
        ValueError, match=r"timestamps: 1 at \(1, 2\) after 4, expected nondecreasing values \(sort"
    ):
        checks.timestamps(torch.tensor([[0, 1, 2], [3, 4, 1]]))
    with pytest.raises(ValueError, match=r"timestamps: 0.5 at \(1,\) after 1.0"):
        checks.timestamps(torch.tensor([1.0, 0.5, 0.25]))
    with pytest.raises(ValueError, match=r"timestamps: inf at \(0,\), expected finite"):
        checks.timestamps(torch.tensor([float("inf")]))
    with pytest.raises(ValueError, match=r"timestamps: 200 at \(1,\) after 201"):
        checks.timestamps(torch.tensor([201, 200], dtype=torch.uint8))
