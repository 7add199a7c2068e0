# SPDX-License-Identifier: MIT
"""Time-invariant models as linear systems: responses, eigenvalues, time constants.

Every function takes a model of `lrnnx_core.registry` or its name, parameters, and the options that
the model's own functions take; ``registry.bind`` fixes options once. All are differentiable and run
under ``vmap``, and time is counted in samples.

Outputs read the state after the update, so that the response to an impulse begins with
C B_bar + D and not with D alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core import registry
from lrnnx_core.registry import Model
from lrnnx_core.types import Params


class Summary(NamedTuple):
    """The extremes of a model's eigenvalues, 0-d tensors; times in samples.

    ``slowest`` and ``fastest`` are the time constants of the largest and the smallest eigenvalue:
    the slowest of an unstable model is negative, and ``spectral_radius`` then above 1.
    ``shortest_period`` is that of the fastest oscillation, at least 2; infinite where none
    oscillates. ``longest_period`` is infinite as soon as one eigenvalue is real and positive.
    """

    spectral_radius: Tensor
    slowest: Tensor
    fastest: Tensor
    shortest_period: Tensor
    longest_period: Tensor


def frequency_response(model: Model | str, params: Params, omega: Tensor, **options: Any) -> Tensor:
    """Return the response H(omega) to exp(i omega t), in closed form, D included.

    Args:
        model: a time-invariant model, or its name.
        params: its parameters.
        omega: (...), real, in radians a sample; pi is half the sampling rate.
        **options: of the model's `frequency_response`.

    Returns:
        H complex: (..., H) of a model of single-input systems, (Ch, ..., H) with channels, (...,
        H_out, H) of a multi-input one. Of a bidirectional model the sum of both directions.

    Raises:
        ValueError: a model that varies in time; what the model's own function refuses.
    """
    entry = _invariant("frequency_response", model)
    if entry.frequency_response is None:
        raise ValueError(f"frequency_response: {entry.title} has none")
    return entry.frequency_response(params, omega, **options)


def impulse_response(model: Model | str, params: Params, length: int, **options: Any) -> Tensor:
    """Return the response to a unit impulse, D included.

    Args:
        model: a time-invariant model, or its name.
        params: its parameters.
        length: samples L, the one of the impulse included.
        **options: of the model's `kernel`.

    Returns:
        h (L, H), (Ch, L, H) with channels, or (L, H_out, H); of a bidirectional model L is 2 length
        - 1 and the impulse at index length - 1.

    Raises:
        ValueError: length < 1; a model that varies in time; what the model's kernel refuses.
    """
    h, _ = _impulse_response("impulse_response", model, params, length, options)
    return h


def step_response(model: Model | str, params: Params, length: int, **options: Any) -> Tensor:
    """Return the response to a unit step, D included; its limit is the response at omega = 0.

    Args:
        model: a time-invariant model, or its name.
        params: its parameters.
        length: samples L from the step on.
        **options: of the model's `kernel`.

    Returns:
        s, of the shape of `impulse_response`; of a bidirectional model the step is at index length
        - 1, and samples before it answer what is to come, for ever (the model must be stable).

    Raises:
        ValueError: length < 1; a model that varies in time; what the model's kernel refuses.
    """
    where = "step_response"
    h, reverse = _impulse_response(where, model, params, length, options)
    axis = _time_axis(_invariant(where, model))
    s = h.cumsum(axis)
    if reverse is None:
        return s
    # what the reverse direction hears from beyond the window is what the window lacks of its total
    zero = torch.zeros(1, dtype=h.dtype, device=h.device)
    both = frequency_response(model, params, zero, **options).real
    forward = frequency_response(model, params, zero, **options | {"bidirectional": False}).real
    return s + (both - forward - reverse.sum(axis, keepdim=True))


def eigenvalues(
    model: Model | str, params: Params, *, conjugates: bool = False, **options: Any
) -> Tensor:
    """Return the discrete eigenvalues, those of A_bar.

    Args:
        model: a time-invariant model, or its name.
        params: its parameters.
        conjugates: append the conjugates of complex eigenvalues, of which a model with conjugate
            pairs stores one of each; these are the poles of the real system.
        **options: of the model's `discretize`, but for timesteps.

    Returns:
        Of the shape of a state, (H, N/2) of S4D or (P/2,) of S5, with ``conjugates`` twice as many
        in the last dimension; real where A_bar is. S4's are those of its matrices A_bar, (H, N),
        all there with or without ``conjugates``.

    Raises:
        ValueError: a model that varies in time; what its `discretize` refuses.
    """
    where = "eigenvalues"
    entry = _invariant(where, model)
    if options.get("integration_timesteps") is not None:
        raise ValueError(f"{where}: integration_timesteps vary in time, expected None")
    A_bar = entry.discretize(params, **options)[0]
    if _is_matrix(entry, params, A_bar):
        return torch.linalg.eigvals(A_bar)
    if conjugates and A_bar.is_complex():
        return torch.cat([A_bar, A_bar.conj()], dim=-1)
    return A_bar


def time_constants(model: Model | str, params: Params, **options: Any) -> Tensor:
    """Return the samples -1/log|A_bar| in which each mode decays by 1/e.

    Args:
        model: a time-invariant model, or its name.
        params: its parameters.
        **options: as of `eigenvalues`.

    Returns:
        Real, of the shape of `eigenvalues`: positive for a decaying mode, infinite on the unit
        circle, negative for a growing one (which grows by e in so many samples), 0 for A_bar = 0.

    Raises:
        ValueError: as `eigenvalues`.
    """
    return decay_times(eigenvalues(model, params, **options))


def periods(model: Model | str, params: Params, **options: Any) -> Tensor:
    """Return the samples 2 pi/|arg A_bar| in which each mode turns once.

    Args:
        model: a time-invariant model, or its name.
        params: its parameters.
        **options: as of `eigenvalues`.

    Returns:
        Real, of the shape of `eigenvalues`, from 2 (a negative eigenvalue: the sign alternates) to
        infinity (a positive one: no oscillation).

    Raises:
        ValueError: as `eigenvalues`.
    """
    return _turns(eigenvalues(model, params, **options))


def summary(model: Model | str, params: Params, **options: Any) -> Summary:
    """Return spectral radius, slowest and fastest time constant, and periods of oscillation.

    Args:
        model: a time-invariant model, or its name.
        params: its parameters.
        **options: as of `eigenvalues`.

    Returns:
        A `Summary`.

    Raises:
        ValueError: as `eigenvalues`.
    """
    values = eigenvalues(model, params, **options).flatten()
    size, turns = values.abs(), _turns(values)
    return Summary(
        size.max(), decay_times(size.max()), decay_times(size.min()), turns.min(), turns.max()
    )


def decay_times(values: Tensor) -> Tensor:
    """Return -1/log|value| for discrete eigenvalues: see `time_constants`.

    Args:
        values: (...), real or complex.
    """
    return 1 / (0 - values.abs().log())  # 0 - 0 is +0, so that the circle gives +inf


def _turns(values: Tensor) -> Tensor:
    return 2 * math.pi / values.angle().abs()


def _invariant(where: str, model: Model | str) -> Model:
    entry = registry.get(model) if isinstance(model, str) else model
    if entry.kind != "lti":
        raise ValueError(
            f"{where}: {entry.title} varies in time; expected a time-invariant model such as "
            "'s4d', 's5' or 'lru'"
        )
    return entry


def _is_matrix(entry: Model, params: Params, A_bar: Tensor) -> bool:
    """Return whether A_bar is a matrix for each state rather than a diagonal."""
    return A_bar.ndim > entry.init_state(params).ndim


def _time_axis(entry: Model) -> int:
    return -2 if entry.connectivity == "siso" else -3


def _impulse_response(
    where: str, model: Model | str, params: Params, length: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Return the impulse response, and its part before the impulse if the model has one."""
    entry = _invariant(where, model)
    if entry.kernel is None:
        raise ValueError(f"{where}: {entry.title} has no kernel")
    K, axis = entry.kernel(params, length, **options), _time_axis(entry)
    if not _option(entry.kernel, "bidirectional", options):
        return _with_skip(entry, params, K, axis), None
    forward, reverse = _with_skip(entry, params, K[0], axis), K[1]
    if entry.connectivity == "siso":  # the reverse direction starts at the next sample
        reverse = reverse.narrow(axis, 0, length - 1)
        return torch.cat([reverse.flip(axis), forward], dim=axis), reverse
    late = forward.narrow(axis, 1, length - 1)  # both directions count the current sample
    early = reverse.narrow(axis, 1, length - 1).flip(axis)
    now = forward.narrow(axis, 0, 1) + reverse.narrow(axis, 0, 1)
    return torch.cat([early, now, late], dim=axis), reverse


def _with_skip(entry: Model, params: Params, K: Tensor, axis: int) -> Tensor:
    """Add D to the first sample of a kernel."""
    D = params.get("D")
    if D is None:
        return K
    D = D.to(K.dtype)
    if entry.connectivity == "mimo" and D.ndim == 1:
        D = torch.diag_embed(D)
    later = K.narrow(axis, 1, K.shape[axis] - 1)
    return torch.cat([K.narrow(axis, 0, 1) + D.unsqueeze(axis), later], dim=axis)


def _option(function: Any, name: str, options: dict[str, Any]) -> Any:
    """Return an option of a call, or the one that `registry.bind` fixed."""
    return options.get(name, getattr(function, "keywords", {}).get(name))
