# SPDX-License-Identifier: MIT
"""What every model does before and after its own equations: checks, dtypes, choices."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lrnnx_core.types import Params


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
    if u.ndim < rank or u.shape[-1] != width:
        raise ValueError(f"{where}: u {tuple(u.shape)}, expected {shape} with H = {width}")
    if not u.is_floating_point():
        raise ValueError(f"{where}: u has dtype {u.dtype}, expected a real floating one")
    if u.device != like.device:
        raise ValueError(f"{where}: u is on {u.device} and the parameters on {like.device}")


def check_state(where: str, state: Tensor, batch: torch.Size, shape: torch.Size) -> None:
    """Raise unless the state is (*batch, *shape)."""
    if state.shape != batch + shape:
        raise ValueError(
            f"{where}: state {tuple(state.shape)}, expected {tuple(batch + shape)} for this input"
        )


def check_keys(where: str, params: Params, keys: Iterable[str], hint: str) -> None:
    """Raise if params lack a key that the choices call for."""
    missing = [k for k in keys if k not in params]
    if missing:
        raise ValueError(f"{where}: params have no {', '.join(missing)}; {hint}")


def compute_dtype(params: Params, *tensors: Tensor | None) -> torch.dtype:
    """Return the real dtype to compute in: the widest that came, at least float32."""
    dtype = torch.float32
    for t in (*params.values(), *tensors):
        if t is not None:
            dtype = torch.promote_types(dtype, t.real.dtype if t.is_complex() else t.dtype)
    return dtype


def pair(params: Params, key: str, dtype: torch.dtype) -> Tensor:
    """Return the complex tensor stored as key_re, key_im."""
    return torch.complex(params[key + "_re"].to(dtype), params[key + "_im"].to(dtype))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off: state-space arithmetic stays at least float32."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def zero_state(like: Tensor, batch_shape: Iterable[int], shape: Iterable[int]) -> Tensor:
    """Return zeros (*batch_shape, *shape) with the dtype and device of ``like``."""
    return like.new_zeros((*batch_shape, *shape))
