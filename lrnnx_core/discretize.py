# SPDX-License-Identifier: MIT
"""Every discretization, once: how a continuous diagonal A and a step dt become discrete.

A scheme is a pure function ``(A, dt_decay, dt_input) -> (A_bar, gamma)`` with the discrete input
matrix B_bar = gamma * B. It sees two steps because of irregular time: ``dt_decay`` is the time over
which the state decays, ``dt_input`` the time over which an input acts. They differ only under
``timestep_mode="state_only"``. A scheme of one's own is any such function, passed where a name is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.types import Discrete, Discretization, Number, Scheme, TimestepMode

# Below this |z| the quotient (e^z - 1)/z loses digits in its derivatives; a series of so many terms
# is exact there, in value and in derivatives.
_SERIES_RADIUS = 0.3
_SINGLE_TERMS, _DOUBLE_TERMS = 10, 15


def phi1(z: Tensor) -> Tensor:
    """Return (e^z - 1)/z, real or complex, right in value and every derivative at z = 0.

    Source: Higham 2008, Functions of Matrices, section 10.7.4 (the phi functions).
    """
    small = z.abs() < _SERIES_RADIUS
    near = torch.where(small, z, torch.zeros_like(z))
    series = _series(near, lambda k: 1 / math.factorial(k + 1))
    far = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, series, torch.expm1(far) / far)


def _series(z: Tensor, coefficient: Callable[[int], float]) -> Tensor:
    """Return the power series at z, by Horner."""
    double = z.dtype in (torch.float64, torch.complex128)
    last = (_DOUBLE_TERMS if double else _SINGLE_TERMS) - 1
    total = z * coefficient(last) + coefficient(last - 1)
    for k in range(last - 2, -1, -1):
        total = z * total + coefficient(k)
    return total


def zoh(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> Discrete:
    """Zero-order hold: exact for an input that is constant between samples."""
    return torch.exp(dt_decay * A), dt_input * phi1(dt_input * A)


def gbt(A: Tensor, dt_decay: Tensor, dt_input: Tensor, *, alpha: Number) -> Discrete:
    """Apply the generalised bilinear transform: alpha 0 is Euler, 1/2 Tustin, 1 backward Euler."""
    decay, drive = dt_decay * A, dt_input * A
    return (1 + (1 - alpha) * decay) / (1 - alpha * decay), dt_input / (1 - alpha * drive)


def bilinear(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> Discrete:
    """Bilinear (Tustin) transform: |A_bar| < 1 exactly where Re A < 0."""
    return gbt(A, dt_decay, dt_input, alpha=0.5)


def euler(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> Discrete:
    """Forward Euler: stable only for dt < -2 Re A / |A|^2."""
    return 1 + dt_decay * A, dt_input * torch.ones_like(A)


def dirac(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> Discrete:
    """Inputs as impulses: exponential decay, gain 1 whatever the step."""
    return torch.exp(dt_decay * A), torch.ones_like(dt_input * A)


def mamba(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> Discrete:
    """Exponential decay, first-order gain dt: the rule of Mamba and Centaurus."""
    return torch.exp(dt_decay * A), dt_input * torch.ones_like(A)


def none(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> Discrete:
    """Take A as discrete already; steps have no meaning and must be 1."""
    return A * torch.ones_like(dt_decay), torch.ones_like(A)


SCHEMES: dict[str, Scheme] = {
    "zoh": zoh,
    "bilinear": bilinear,
    "euler": euler,
    "dirac": dirac,
    "mamba": mamba,
    "none": none,
}


def phi1_derivative(z: Tensor) -> Tensor:
    """Return d phi1 / dz = (e^z - phi1(z)) / z, right in value at z = 0."""
    small = z.abs() < _SERIES_RADIUS
    near = torch.where(small, z, torch.zeros_like(z))
    series = _series(near, lambda k: (k + 1) / math.factorial(k + 2))
    far = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, series, (torch.exp(far) - torch.expm1(far) / far) / far)


class Fused(NamedTuple):
    """A scheme as A_bar = decay(dt_decay A), gamma = dt_input gain(dt_input A), with derivatives.

    Fused kernels need these by hand. ``gain`` None means gamma = dt_input, or gamma = 1 where
    ``scaled`` is False. ``gain_dt`` is d gamma / d dt_input, ``gain_slope`` the derivative of gain.
    """

    decay: Callable[[Tensor], Tensor]
    decay_slope: Callable[[Tensor, Tensor], Tensor]
    """(x, decay(x)) -> derivative of decay at x."""
    gain: Callable[[Tensor], Tensor] | None = None
    gain_dt: Callable[[Tensor], Tensor] | None = None
    gain_slope: Callable[[Tensor], Tensor] | None = None
    scaled: bool = True


def _exponential(x: Tensor, a: Tensor) -> Tensor:
    return a


FUSED: dict[str, Fused] = {
    "mamba": Fused(torch.exp, _exponential),
    "dirac": Fused(torch.exp, _exponential, scaled=False),
    "zoh": Fused(torch.exp, _exponential, phi1, torch.exp, phi1_derivative),
    "bilinear": Fused(
        lambda x: (1 + x / 2) / (1 - x / 2),
        lambda x, a: 1 / (1 - x / 2) ** 2,
        lambda y: 1 / (1 - y / 2),
        lambda y: 1 / (1 - y / 2) ** 2,
        lambda y: 0.5 / (1 - y / 2) ** 2,
    ),
}
"""Schemes that have fused kernels; tested to agree with `SCHEMES` and with their derivatives."""

NAMES = ("zoh", "bilinear", "gbt", "euler", "dirac", "mamba", "none", "async")
EXPONENTIAL = frozenset({"zoh", "dirac", "mamba", "async"})
"""Schemes with A_bar = exp(dt A): powers are exponentials, and merging two gaps is exact."""


def resolve(
    discretization: Discretization,
    timestep_mode: TimestepMode = "both",
    alpha: Number | None = None,
    allowed: tuple[str, ...] = NAMES,
    where: str = "discretize",
) -> tuple[Scheme, TimestepMode]:
    """Turn a choice into (scheme, timestep_mode), or raise a ValueError that lists the choices."""
    if timestep_mode not in ("both", "state_only"):
        raise ValueError(
            f"{where}: timestep_mode {timestep_mode!r}, expected 'both' or 'state_only'"
        )
    if alpha is not None and discretization != "gbt":
        raise ValueError(f"{where}: alpha belongs to discretization='gbt', got {discretization!r}")
    if callable(discretization):
        return discretization, timestep_mode
    if discretization not in allowed:
        raise ValueError(
            f"{where}: unknown discretization {discretization!r}; expected one of "
            f"{', '.join(allowed)}, or a callable (A, dt_decay, dt_input) -> (A_bar, gamma)"
        )
    if discretization == "async":
        return zoh, "state_only"
    if discretization == "gbt":
        if alpha is None:
            raise ValueError(f"{where}: discretization='gbt' needs alpha, a number in [0, 1]")
        if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
            raise ValueError(f"{where}: alpha = {alpha}, expected a number in [0, 1]")
        return partial(gbt, alpha=alpha), timestep_mode
    return SCHEMES[discretization], timestep_mode


def discretize(
    A: Tensor,
    dt: Tensor,
    *,
    discretization: Discretization,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    alpha: Number | None = None,
) -> Discrete:
    """Discretize a diagonal A.

    Args:
        A: (..., N), the diagonal of the continuous state matrix, real or complex.
        dt: broadcastable against A, the step; in the unit in which A is a rate, > 0.
        discretization: ``zoh``, ``bilinear``, ``gbt``, ``euler``, ``dirac``, ``mamba``, ``none``,
            ``async`` (= zoh with ``timestep_mode="state_only"``), or a pure callable
            ``(A, dt_decay, dt_input) -> (A_bar, gamma)``.
        integration_timesteps: (..., L), time elapsed before each sample, in units of dt.
        timestep_mode: ``"both"`` multiplies the step in decay and input gain, ``"state_only"`` in
            the decay alone.
        alpha: the number of ``gbt``.

    Returns:
        A_bar and gamma (B_bar = gamma * B), of the broadcast shape of A and dt; with timesteps
        (..., L, *that shape), except gamma under ``"state_only"``, which stays constant.

    Raises:
        ValueError: an unknown choice; ``gbt`` without alpha, or alpha with another scheme; dt not
            broadcastable; timesteps with ``discretization="none"`` and ``"both"``.

    Source: Gu et al. 2022 (S4D), arXiv:2206.11893, section 2 (zoh, bilinear); Schoene et al. 2024
    (Event-SSM), arXiv:2404.18508, section 3 (dirac, async); Gu & Dao 2023 (Mamba),
    arXiv:2312.00752, section 2.
    """
    scheme, timestep_mode = resolve(discretization, timestep_mode, alpha)
    try:
        shape = torch.broadcast_shapes(A.shape, dt.shape)
    except RuntimeError:
        raise ValueError(
            f"discretize: A {tuple(A.shape)} and dt {tuple(dt.shape)} do not broadcast"
        ) from None
    if integration_timesteps is None:
        return scheme(A, dt, dt)
    if discretization == "none":
        raise ValueError("discretize: 'none' has no step that integration_timesteps could scale")
    elapsed = integration_timesteps.reshape(integration_timesteps.shape + (1,) * len(shape))
    decay = elapsed * dt
    return scheme(A, decay, decay if timestep_mode == "both" else dt)
