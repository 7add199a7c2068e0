"""Responses and discretizations against scipy.signal and python-control.

A model is written out as the real continuous system of its paper (from `dense_models`, no code of
the library) and given to the packages, which discretize and answer by themselves. They read the
state *before* the update and this library after it. Held inputs (zoh) then come out one sample
earlier here; a Tustin transform, which averages before and after, by the factor 2 z/(z + 1).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import dense_models
import numpy as np
import pytest
import torch
from model_cases import CAUSAL, INVARIANT, Case, assert_agree
from numpy.typing import NDArray

from lrnnx_core import frequency

linalg = pytest.importorskip("scipy.linalg")
signal = pytest.importorskip("scipy.signal")

Array = NDArray[np.float64]
NEAR = 1e-10
LENGTH = 40
OMEGA = np.array([1e-3, 0.05, 0.3, 1.1, 2.9])
SCHEMES = {"zoh": "zoh", "async": "zoh", "bilinear": "bilinear", "gbt": "gbt", "euler": "euler"}

CASES = [c for c in INVARIANT if c in CAUSAL and c.entry.name in dense_models.DENSE]
every = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def control() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import
        return pytest.importorskip("control")


class System(NamedTuple):
    """A real continuous system, of one channel of a single-input model or of all of them (None)."""

    channel: int | None
    A: Array
    B: Array
    B_raw: Array
    C: Array
    D: Array


def real_systems(case: Case, params: dict[str, torch.Tensor]) -> Iterator[System]:
    """Yield the systems of a case in real coordinates [Re x, Im x], in units of their own step."""
    dense = dense_models.joined(dense_models.DENSE[case.entry.name](params, case.choices))
    n = dense.A.shape[-1]
    for s in range(dense.A.shape[0]):
        A, B, B_raw, C = (m[s].numpy() for m in (dense.A, dense.B, dense.B_raw, dense.C))
        if n == 2 * dense.stored:  # the state is [x, conj x] = T [Re x, Im x]
            eye = np.eye(n // 2)
            T = np.block([[eye, 1j * eye], [eye, -1j * eye]])
            A, B, B_raw = (np.linalg.solve(T, m) for m in (A @ T, B, B_raw))
            A, B, B_raw, C = (m.real for m in (A, B, B_raw, C @ T))
        else:  # a real output of complex states
            A = np.block([[A.real, -A.imag], [A.imag, A.real]])
            B, B_raw = (np.concatenate([m.real, m.imag]) for m in (B, B_raw))
            C = np.concatenate([C.real, -C.imag], axis=1)
        D = dense.D.numpy()
        if dense.siso:
            D = D.reshape(-1, dense.A.shape[0])[:, s : s + 1]
        elif D.ndim == 1:
            D = np.diag(D)
        yield System(s if dense.siso else None, A, B, B_raw, C, D)


def discrete(case: Case, system: System) -> tuple[Array, Array]:
    """Return A_bar and B_bar as scipy makes them."""
    if case.scheme in SCHEMES:
        given = (system.A, system.B, system.C, system.D)
        alpha = case.choices.get("alpha")
        return signal.cont2discrete(given, 1.0, SCHEMES[case.scheme], alpha)[:2]
    return linalg.expm(system.A), system.B if case.scheme == "mamba" else system.B_raw


def of(system: System, values: torch.Tensor) -> Array:
    """Return what belongs to a system of ([Ch,] L, H) or (L, H_out, H), as (L, outputs, inputs)."""
    if system.channel is not None:
        values = values[..., system.channel]
        values = (values if values.ndim == 2 else values[None]).T[..., None]
    return values.numpy()


def near(got: Array, want: Array, rtol: float = NEAR) -> None:
    assert_agree(torch.from_numpy(got + 0j), torch.from_numpy(want + 0j), rtol)


@every
def test_impulse_and_step_are_those_of_a_scipy_system(case: Case) -> None:
    params = case.params(3, 4)
    impulse = frequency.impulse_response(case.model, params, LENGTH)
    step = frequency.step_response(case.model, params, LENGTH)
    for system in real_systems(case, params):
        A_bar, B_bar = discrete(case, system)
        # reading the state after the update: y = C (A_bar x + B_bar u) + D u
        read = (system.C @ A_bar, system.C @ B_bar + system.D)
        dlti = signal.dlti(A_bar, B_bar, *read, dt=1.0)
        for mine, theirs in ((impulse, signal.dimpulse), (step, signal.dstep)):
            _, responses = theirs(dlti, n=LENGTH)  # one (L, outputs) for each input
            near(of(system, mine), np.stack(responses, axis=-1))


@every
def test_the_frequency_response_is_freqz_of_the_impulse_response(case: Case) -> None:
    params = case.params(3, 4)
    if "log_dt" in params:
        params["log_dt"] = params["log_dt"] + 3  # forgets soon
    summary = frequency.summary(case.model, params)
    length = math.ceil(40 * float(summary.slowest))
    got = case.model.frequency_response(params, torch.from_numpy(OMEGA))
    for system in real_systems(case, params):
        A_bar, B_bar = discrete(case, system)
        read = (system.C @ A_bar, system.C @ B_bar + system.D)
        _, taps = signal.dimpulse(signal.dlti(A_bar, B_bar, *read, dt=1.0), n=length)
        mine = of(system, got)
        for tap, column in zip(taps, np.moveaxis(mine, -1, 0), strict=True):
            for o in range(tap.shape[1]):
                _, theirs = signal.freqz(tap[:, o], worN=OMEGA)
                near(column[:, o], theirs, 1e-9)


@every
def test_eigenvalues_and_frequency_response_are_controls(case: Case, control: Any) -> None:
    params = case.params(3, 4)
    z = np.exp(1j * OMEGA)
    got = case.model.frequency_response(params, torch.from_numpy(OMEGA))
    values = frequency.eigenvalues(case.model, params, conjugates=True) + 0j
    for system in real_systems(case, params):
        A_bar, B_bar = discrete(case, system)
        read = (system.C @ A_bar, system.C @ B_bar + system.D)
        theirs = control.ss(A_bar, B_bar, *read, 1.0)
        near(of(system, got), np.moveaxis(theirs(z, squeeze=False), -1, 0))
        mine = values.flatten() if system.channel is None else values[system.channel]
        distance = np.abs(mine.numpy()[:, None] - theirs.poles())
        assert distance.min(0).max() < 1e-8
        assert distance.min(1).max() < 1e-8


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.scheme in ("zoh", "async", "bilinear")], ids=str
)
def test_conversion_of_the_continuous_system_is_controls_c2d(case: Case, control: Any) -> None:
    """The library's reading of the state after the update is the only difference."""
    params, z = case.params(3, 4), np.exp(1j * OMEGA)
    got = case.model.frequency_response(params, torch.from_numpy(OMEGA))
    values = frequency.eigenvalues(case.model, params, conjugates=True) + 0j
    tustin = case.scheme == "bilinear"
    factor = 2 * z / (z + 1) if tustin else z
    for system in real_systems(case, params):
        _, A, B, _, C, D = system
        theirs = control.c2d(control.ss(A, B, C, 0 * D), 1.0, "tustin" if tustin else "zoh")
        want = factor[:, None, None] * np.moveaxis(theirs(z, squeeze=False), -1, 0) + D
        near(of(system, got), want)
        mine = values.flatten() if system.channel is None else values[system.channel]
        distance = np.abs(mine.numpy()[:, None] - np.linalg.eigvals(theirs.A))
        assert distance.min(0).max() < 1e-8
        assert distance.min(1).max() < 1e-8
