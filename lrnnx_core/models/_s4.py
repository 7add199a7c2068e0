# SPDX-License-Identifier: MIT
"""What the parameters of S4 mean: the system they describe, the readout, and its truncated form."""

from __future__ import annotations

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.models import _dplr
from lrnnx_core.models._common import check_sizes, full_precision, pair
from lrnnx_core.models._dplr import System
from lrnnx_core.models._transforms import (
    RealTransform,
    StepTransform,
    check_transforms,
    real_part,
    step_size,
)
from lrnnx_core.types import Number, Params


def system(
    params: Params,
    dtype: torch.dtype,
    dt_transform: StepTransform,
    A_transform: RealTransform,
    dt_scale: Number = 1.0,
) -> System:
    """Return the continuous system of every channel, in this real dtype."""
    re = real_part(params["A_log"].to(dtype), A_transform)
    A, B = torch.complex(re, params["A_im"].to(dtype)), pair(params, "B", dtype)
    P = pair(params, "P", dtype)
    tile = params["D"].shape[-1] // A.shape[0]
    A, B, P = A.repeat(tile, 1), B.repeat(tile, 1), P.repeat(1, tile, 1)
    dt = step_size(params["log_dt"].to(dtype), dt_transform) * dt_scale
    if dt.ndim == 1:
        dt = dt.unsqueeze(-1)
    return System(dt * A, dt * B, dt * P, _dplr.conjugate(P))


def readout(params: Params, key: str, dtype: torch.dtype) -> Tensor:
    """Return C as the complex halves (Ch, H, M)."""
    C = pair(params, key, dtype)
    return C.unsqueeze(0) if C.ndim == 2 else C


def rows(C: Tensor) -> Tensor:
    """Return the readout of real forms, factor 2 included: (Ch, H, M) -> (H, Ch, N)."""
    return 2 * _dplr.row(C).movedim(-2, 0)


def from_rows(C: Tensor) -> Tensor:
    """Return the complex halves (Ch, H, M) of a readout of real forms (H, Ch, N)."""
    return 0.5 * _dplr.halves(C, -1.0).movedim(0, -2)


def truncate(C: Tensor, A: Tensor, length: int, sign: float = -1.0) -> Tensor:
    """Return C + sign C A^length: rows (H, Ch, N), A (H, N, N)."""
    moved, left = C, length
    while left:
        if left & 1:
            moved = moved @ A
        left >>= 1
        if left:
            A = A @ A
    return C + sign * moved


def recover(C: Tensor, A: Tensor, length: int) -> Tensor:
    """Solve C (I - A^length) = C~ for C: rows (H, Ch, N), A (H, N, N)."""
    rest = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    rest = rest - torch.linalg.matrix_power(A, length)
    # not linalg.solve: a derivative of its jvp is wrong, in silence (torch.func, PyTorch 2.13)
    return C @ torch.linalg.inv(rest)


def true_readout(
    params: Params,
    key: str,
    l_kernel: int | None,
    dt_transform: StepTransform,
    A_transform: RealTransform,
    A_bar: Tensor | None = None,
) -> Tensor:
    """Return the rows (H, Ch, N) of the true C in float64, recovered if C~ is what is stored."""
    C = rows(readout(params, key, torch.float64))
    if l_kernel is None:
        return C
    if A_bar is None:
        at_rest = system(params, torch.float64, dt_transform, A_transform)
        A_bar, _ = _dplr.transition(at_rest).dense()
    return recover(C, A_bar, l_kernel)


def convert(
    where: str,
    params: Params,
    length: int,
    dt_transform: StepTransform,
    A_transform: RealTransform,
    kind: str,
) -> Params:
    """Return params with C, and C2 where there is one, converted, in float64 and back."""
    check_sizes(where, length=length)
    check_transforms(where, dt_transform, A_transform)
    with full_precision(params["log_dt"].device):
        s = system(params, torch.float64, dt_transform, A_transform)
        A, _ = _dplr.transition(s).dense()
        changed = dict(params)
        for key in ("C", "C2"):
            if key + "_re" not in params:
                continue
            C = rows(readout(params, key, torch.float64))
            if kind == "recover":
                C = recover(C, A, length)
            else:
                C = truncate(C, A, length, -1.0 if kind == "truncate" else 1.0)
            C = from_rows(C)
            for part, value in (("_re", C.real), ("_im", C.imag)):
                old = params[key + part]
                changed[key + part] = value.reshape(old.shape).to(old.dtype, copy=True)
        return changed


def initial_copies(
    where: str, measures: tuple[initialize.Measure, ...], n: int, copies: int, rank: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Lambda, B (S, M) and P (R, S, M), complex128, the copies shared out in order.

    Raises:
        ValueError: copies that cannot be shared out; a rank below that of a measure, but for 0.
    """
    if copies % len(measures):
        raise ValueError(
            f"{where}: {len(measures)} measures {measures} cannot share n_ssm = {copies} copies "
            "evenly"
        )
    forms = [initialize.normal_form(m, n) for m in measures]
    own = max(form.P.shape[0] for form in forms)
    rank = own if rank is None else rank
    if 0 < rank < own:
        raise ValueError(f"{where}: rank = {rank}, expected 0 or at least {own} for {measures}")
    each = copies // len(measures)
    P = [torch.cat([form.P, form.P.new_zeros(rank, n // 2)])[:rank] for form in forms]
    return (
        torch.cat([form.Lambda.expand(each, -1) for form in forms]),
        torch.cat([form.B.expand(each, -1) for form in forms]),
        torch.cat([p.unsqueeze(1).expand(-1, each, -1) for p in P], dim=1),
    )
