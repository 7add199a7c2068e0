# SPDX-License-Identifier: MIT
"""What every model does before and after its own equations: checks, dtypes, choices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrnnx_core.backends.transforms import full_precision
from lrnnx_core.sequences import Layout, check_tensor
from lrnnx_core.types import Discrete, Mode, Number, Params

Made = TypeVar("Made")
MOST_MADE = 8


class SteadyParams(dict[str, Tensor]):
    """Parameters that nobody changes while this lives, with what was made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[Hashable, Any] = {}


def made_of(params: Params, key: tuple[Hashable, ...], make: Callable[[], Made]) -> Made:
    """Return what ``make`` makes of the parameters and the key, once for `SteadyParams`."""
    if not isinstance(params, SteadyParams) or any(isinstance(k, Tensor) for k in key):
        return make()
    found = params.made.get(key)
    if found is None:
        if len(params.made) >= MOST_MADE:
            params.made.clear()
        found = params.made[key] = make()
    return found


def check_sizes(where: str, **sizes: int) -> None:
    """Raise unless every size is an integer >= 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{where}: {name} = {value!r}, expected an integer >= 1")


def check_choice(where: str, name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise with the list of valid choices unless ``value`` is one of them."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{where}: {name} = {value!r}, expected one of {allowed}")


def check_input(where: str, u: Tensor, width: int, like: Tensor, *, rank: int, shape: str) -> None:
    """Raise unless u is a real floating tensor of ``rank`` or more axes, ``width`` channels."""
    check_tensor(where, "u", u)
    if u.ndim < rank or u.shape[-1] != width:
        raise ValueError(f"{where}: u {tuple(u.shape)}, expected {shape} with H = {width}")
    if not u.is_floating_point():
        raise ValueError(f"{where}: u has dtype {u.dtype}, expected a real floating one")
    if u.device != like.device:
        raise ValueError(f"{where}: u is on {u.device} and the parameters on {like.device}")


def check_state(
    where: str,
    state: Tensor,
    batch: torch.Size,
    shape: torch.Size,
    u: Tensor,
    *,
    real: bool = False,
) -> None:
    """Raise unless the state is (*batch, *shape), on the device of u, and real if that is asked."""
    check_tensor(where, "state", state)
    if real:
        check_real(where, "state", state)
    if state.shape != batch + shape:
        raise ValueError(
            f"{where}: state {tuple(state.shape)}, expected {tuple(batch + shape)} for this input"
        )
    check_device(where, "state", state, u)


def check_real(where: str, name: str, value: Tensor) -> None:
    """Raise for a complex tensor where all are real: the state of another model."""
    if value.is_complex():
        raise ValueError(f"{where}: {name} has dtype {value.dtype}, expected a real one")


def check_device(where: str, name: str, value: Tensor, u: Tensor) -> None:
    """Raise unless ``value`` is on the device of u."""
    if value.device != u.device:
        raise ValueError(f"{where}: {name} is on {value.device} and u on {u.device}")


def check_discrete(where: str, discrete: Discrete, state: torch.Size, B_bar: torch.Size) -> None:
    """Raise unless (A_bar, B_bar) end in these shapes."""
    got = tuple(tuple(t.shape) for t in discrete)
    if discrete[0].shape[-len(state) :] != state or discrete[1].shape[-2:] != B_bar:
        raise ValueError(
            f"{where}: discrete has shapes {got[0]} and {got[1]}, expected them to end in "
            f"{tuple(state)} and {tuple(B_bar)}"
        )


def check_steady(where: str, A_bar: Tensor, *, backwards: bool, convolves: bool) -> None:
    """Raise where a precomputed A_bar that varies in time cannot be used."""
    if backwards or convolves:
        raise ValueError(
            f"{where}: discrete with A_bar {tuple(A_bar.shape)} varies in time; it can run neither "
            "backwards nor as a convolution"
        )


def check_timestep(where: str, timestep: Tensor | None, u_t: Tensor) -> None:
    """Raise unless integration_timestep is floating and broadcasts to the batch of u_t (..., H)."""
    if timestep is None:
        return
    check_tensor(where, "integration_timestep", timestep)
    batch = u_t.shape[:-1]
    fits = timestep.ndim <= len(batch) and all(
        have in (1, want)
        for have, want in zip(reversed(timestep.shape), reversed(batch), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{where}: integration_timestep {tuple(timestep.shape)} does not fit u "
            f"{tuple(u_t.shape)}; expected {tuple(batch)} or fewer axes"
        )
    if not timestep.is_floating_point():
        raise ValueError(
            f"{where}: integration_timestep has dtype {timestep.dtype}, expected a floating one"
        )
    check_device(where, "integration_timestep", timestep, u_t)


LTI_MODES = ("auto", "conv", "scan", "recurrent")


def check_lti_run(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    state_shape: torch.Size,
    layout: Layout,
    mode: Mode,
    bidirectional: bool,
    kernel: Tensor | None,
    *,
    second: str = "C2_re",
) -> None:
    """Raise what the scans of all time-invariant models refuse alike."""
    check_choice(where, "mode", mode, LTI_MODES)
    if bidirectional:
        check_directions(where, params, second)
        check_whole(where, state)
    elif state is not None:
        check_state(where, state, u.shape[:-2], state_shape, u)
    if (mode == "conv" or kernel is not None) and not layout.uniform:
        raise ValueError(
            f"{where}: a convolution cannot run with integration_timesteps, mask or reset; use "
            "mode='scan' or 'auto', without kernel"
        )
    if kernel is not None:
        check_device(where, "kernel", kernel, u)
        if mode not in ("auto", "conv"):
            raise ValueError(f"{where}: kernel is for mode 'conv' or 'auto', got {mode!r}")


def check_kernel(
    where: str, kernel: Tensor | None, lead: tuple[int, ...], at_least: int, tail: tuple[int, ...]
) -> None:
    """Raise unless a precomputed kernel, if any, is (*lead, L, *tail) with L >= at_least."""
    if kernel is None:
        return
    axis = len(lead)
    shape = tuple(kernel.shape)
    rank = axis + 1 + len(tail)
    fits = len(shape) == rank and (shape[:axis], shape[axis + 1 :]) == (lead, tail)
    if not fits or shape[axis] < at_least:
        raise ValueError(f"{where}: kernel {shape}, expected {(*lead, f'>= {at_least}', *tail)}")


def read_next(y: Tensor, flipped: Layout) -> Tensor:
    """Return y (..., L, X) of a run backwards, in time's order and moved on by one sample.

    So a direction that starts at the next sample counts the current one once in the sum of both.
    Nothing is read across the start of a document.
    """
    y = y.flip(-2)
    y = torch.cat([y[..., 1:, :], torch.zeros_like(y[..., :1, :])], dim=-2)
    if flipped.reset is None:
        return y
    return y.masked_fill(flipped.reset.flip(-1).unsqueeze(-1), 0)


def check_directions(where: str, params: Params, second: str = "C2_re") -> None:
    """Raise unless params hold the readout of the reverse direction, under the key ``second``."""
    check_keys(where, params, (second,), "make them with init(bidirectional=True)")


def check_whole(where: str, state: object) -> None:
    """Raise if a bidirectional model is to go on from a state."""
    if state is not None:
        raise ValueError(
            f"{where}: a bidirectional model reads whole sequences; state must be None"
        )


def check_keys(where: str, params: Params, keys: Iterable[str], hint: str) -> None:
    """Raise if params lack a key that the choices call for."""
    missing = [k for k in keys if k not in params]
    if missing:
        raise ValueError(f"{where}: params have no {', '.join(missing)}; {hint}")


_SINGLE = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.complex64})


def compute_dtype(params: Params, *tensors: Tensor | None) -> torch.dtype:
    """Return the real dtype to compute in: the widest that came, at least float32."""
    found = {t.dtype for t in params.values()}
    found.update(t.dtype for t in tensors if t is not None)
    if found <= _SINGLE:
        return torch.float32
    dtype = torch.float32
    for t in (*params.values(), *tensors):
        if t is not None:
            dtype = torch.promote_types(dtype, t.real.dtype if t.is_complex() else t.dtype)
    return dtype


def pair(params: Params, key: str, dtype: torch.dtype) -> Tensor:
    """Return the complex tensor stored as key_re, key_im."""
    return torch.complex(*parts_of(params, key, dtype))


def parts_of(params: Params, key: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return key_re and key_im."""
    return params[key + "_re"].to(dtype), params[key + "_im"].to(dtype)


def scaled(x: Tensor, number: Number) -> Tensor:
    """Return number * x, x itself where the number is 1."""
    return x * number if isinstance(number, Tensor) or number != 1 else x


def zero_state(like: Tensor, batch_shape: Iterable[int], shape: Iterable[int]) -> Tensor:
    """Return zeros (*batch_shape, *shape) with the dtype and device of ``like``."""
    return like.new_zeros((*batch_shape, *shape))


__all__ = [
    "LTI_MODES",
    "check_choice",
    "check_directions",
    "check_input",
    "check_keys",
    "check_lti_run",
    "check_sizes",
    "check_state",
    "compute_dtype",
    "SteadyParams",
    "full_precision",
    "made_of",
    "pair",
    "scaled",
    "zero_state",
]
