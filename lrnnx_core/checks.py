# SPDX-License-Identifier: MIT
"""Checks of values, which core functions cannot make under vmap or compile and will not on a GPU.

The command line and the data helpers call them always; Modules call them in eager mode on CPU
tensors. Call them yourself where data enters your program.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
