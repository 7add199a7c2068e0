# SPDX-License-Identifier: MIT
"""Frequency responses of models with a diagonal state, in closed form.

    H(omega) = sum_t K_t exp(-i omega t) = C (1 - A_bar exp(-i omega))^(-1) B_bar,    plus D

A real output Re(C x) is half of C x and half of its conjugate, so that a sum over stored states is
taken at omega and, conjugated, at -omega. What runs backwards in time is read at -omega.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.models import _mimo, _siso
from lrnnx_core.models._common import check_directions, compute_dtype, full_precision, pair
from lrnnx_core.types import Params


def check_omega(where: str, omega: Tensor, params: Params) -> None:
    """Raise unless omega is a real floating tensor on the device of the parameters."""
    if not omega.is_floating_point():
        raise ValueError(f"{where}: omega has dtype {omega.dtype}, expected a real floating one")
    like = next(iter(params.values()))
    if omega.device != like.device:
        raise ValueError(f"{where}: omega is on {omega.device} and the parameters on {like.device}")


class Resolvent(NamedTuple):
    """The factors 1/(1 - A_bar exp(-i omega)) and, for complex states, the same at -omega.

    Each is (*omega.shape, *A_bar.shape), complex.
    """

    ahead: Tensor
    back: Tensor

    def reversed(self) -> Resolvent:
        """Return the factors at -omega."""
        return Resolvent(self.back, self.ahead)


def resolvent(omega: Tensor, A_bar: Tensor, z: Tensor | None = None) -> Resolvent:
    """Return the factors of A_bar, or of exp(z), which is exact where A_bar is near the circle.

    Args:
        omega: (...), real, in radians a sample.
        A_bar: (*S), real or complex, discrete.
        z: (*S), log A_bar where it is known.
    """
    omega = omega.reshape(omega.shape + (1,) * A_bar.ndim)

    def at(omega: Tensor) -> Tensor:
        turn = torch.complex(torch.zeros_like(omega), -omega)
        # 1 - A_bar is all rounding where a mode is slow; expm1 knows its distance from the circle
        return 1 / (1 - A_bar * torch.exp(turn)) if z is None else -1 / torch.expm1(z + turn)

    return Resolvent(at(omega), at(-omega))


def siso(
    where: str,
    params: Params,
    omega: Tensor,
    recurrence: Callable[[torch.dtype], _siso.Recurrence],
    *,
    bidirectional: bool,
) -> Tensor:
    """Return H(omega) with D, (*omega.shape, H), or (Ch, *omega.shape, H) with channels.

    ``recurrence(dtype)`` discretizes. The second direction starts at the next sample: a factor
    exp(i omega).
    """
    check_omega(where, omega, params)
    if bidirectional:
        check_directions(where, params)
    with full_precision(omega.device):
        dtype = compute_dtype(params, omega)
        r, omega = recurrence(dtype), omega.to(dtype)
        factors = resolvent(omega, r.A_bar, r.z)

        def one(key: str, at: Resolvent) -> Tensor:
            if key + "_im" not in params:
                return _sum(params[key + "_re"].to(dtype) * r.B_bar, at.ahead)
            v = pair(params, key, dtype) * r.B_bar  # (H, M) or (Ch, H, M), halves of pairs
            return _sum(v, at.ahead) + _sum(v, at.back).conj()

        response = one("C", factors)
        if bidirectional:
            turn = torch.exp(torch.complex(torch.zeros_like(omega), omega)).unsqueeze(-1)
            response = response + turn * one("C2", factors.reversed())
        return response + _over(params["D"].to(dtype), omega.ndim)


def mimo(
    where: str,
    params: Params,
    omega: Tensor,
    recurrence: Callable[[torch.dtype], _mimo.Recurrence],
    *,
    scale: float,
    bidirectional: bool,
) -> Tensor:
    """Return H(omega) with D, (*omega.shape, H_out, H).

    ``recurrence(dtype)`` discretizes. Both directions count the current sample.
    """
    check_omega(where, omega, params)
    if bidirectional:
        check_directions(where, params)
    with full_precision(omega.device):
        dtype = compute_dtype(params, omega)
        r = recurrence(dtype)
        B_bar, factors = r.B_bar(), resolvent(omega.to(dtype), r.A_bar, r.z)

        def one(key: str, at: Resolvent) -> Tensor:
            C = pair(params, key, dtype)
            ahead, back = ((C * f.unsqueeze(-2)) @ B_bar for f in at)
            return 0.5 * scale * (ahead + back.conj())

        response = one("C", factors)
        if bidirectional:
            response = response + one("C2", factors.reversed())
        D = params["D"].to(dtype)
        return response + (torch.diag_embed(D) if D.ndim == 1 else D)


def _sum(v: Tensor, factors: Tensor) -> Tensor:
    """Sum v ([Ch,] H, M) times factors (*W, H, M) over M: ([Ch,] *W, H)."""
    return (_over(v, factors.ndim - 2, tail=2) * factors).sum(-1)


def _over(x: Tensor, count: int, tail: int = 1) -> Tensor:
    """Insert ``count`` axes of size 1 before the last ``tail`` ones."""
    at = x.ndim - tail
    return x.reshape(x.shape[:at] + (1,) * count + x.shape[at:])
