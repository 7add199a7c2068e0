# SPDX-License-Identifier: MIT
"""Checks of values, which core functions cannot make under vmap or compile and will not on a GPU.

The command line and the data helpers call them always; Modules call them in eager mode on CPU
tensors. Call them yourself where data enters your program.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class StabilityWarning(UserWarning):
    """A recurrence grows from sample to sample; see `stable`."""


def finite(name: str, value: Tensor) -> None:
    """Raise a ValueError if ``value`` holds a NaN or an infinity."""
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name}: {value[where].item()} at {where}, expected finite values")


def integration_timesteps(value: Tensor) -> None:
    """Raise a ValueError if a timestep is negative, infinite or NaN."""
    finite("integration_timesteps", value)
    if bool((value < 0).any()):
        where = tuple(int(i) for i in (value < 0).nonzero()[0])
        raise ValueError(
            f"integration_timesteps: {value[where].item():g} at {where}, expected values >= 0 "
            "(time elapsed before each sample; are the time stamps sorted?)"
        )


def timestamps(value: Tensor) -> None:
    """Raise a ValueError if a time stamp is infinite, NaN, or before the one in front of it."""
    if value.ndim == 0:
        raise ValueError("timestamps: () needs a time axis")
    finite("timestamps", value)
    wide = value if value.is_floating_point() else value.to(torch.int64)  # unsigned ones wrap
    back = wide[..., 1:] < wide[..., :-1]
    if bool(back.any()):
        *row, i = (int(k) for k in back.nonzero()[0])
        at = (*row, i + 1)
        raise ValueError(
            f"timestamps: {value[at].item()} at {at} after {value[(*row, i)].item()}, expected "
            "nondecreasing values (sort the events by time)"
        )


def lengths(value: Tensor, length: int) -> None:
    """Raise a ValueError if a length is negative or longer than the padded sequence."""
    if value.numel() and (int(value.min()) < 0 or int(value.max()) > length):
        raise ValueError(
            f"lengths: between {int(value.min())} and {int(value.max())}, expected 0 ... {length}"
        )


def cu_seqlens(value: Tensor, length: int) -> None:
    """Raise a ValueError unless 0 = c_0 <= c_1 <= ... <= c_S = length."""
    if value.ndim != 1 or not value.numel() or value.is_floating_point():
        raise ValueError(
            f"cu_seqlens: {tuple(value.shape)} {value.dtype}, expected (S + 1,) integers"
        )
    if int(value[0]) != 0 or int(value[-1]) != length or bool((value.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens: {value.tolist()[:8]}..., expected 0 first, {length} last, nondecreasing"
        )


def stable(name: str, eigenvalues: Tensor, hint: str = "") -> bool:
    """Return whether no discrete eigenvalue lies outside the unit circle; warn of the largest.

    Args:
        name: of what has them, for the warning.
        eigenvalues: (...), of A_bar, real or complex: `lrnnx_core.frequency.eigenvalues`.
        hint: ends the warning.

    Returns:
        False, after a `StabilityWarning`, if one is larger than 1 by more than rounding, or NaN.
    """
    if not eigenvalues.numel():
        return True
    size = eigenvalues.detach().abs()
    allowed = 1 + 4 * torch.finfo(size.dtype).eps
    worst = int(size.nan_to_num(nan=float("inf")).argmax())
    if bool(size.flatten()[worst] <= allowed):
        return True
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), size.shape))
    value, modulus = eigenvalues.flatten()[worst].item(), float(size.flatten()[worst])
    shown = f"1 + {modulus - 1:.3g}" if modulus < 1 + 1e-5 else f"{modulus:.6g}"
    warnings.warn(
        f"{name}: eigenvalue {value:.6g} of A_bar at {index} has modulus {shown}, expected "
        f"<= 1; the state grows without bound{hint and '. ' + hint}",
        StabilityWarning,
        stacklevel=2,
    )
    return False
