# SPDX-License-Identifier: MIT
"""A causal convolution between two projections, y = Re C (K * (B u)), in the cheapest order."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from lrnnx_core.ops._spectra import along
from lrnnx_core.ops.causal_convolution import causal_convolution, fast_length
from lrnnx_core.ops.contract import (
    FREQUENCY,
    KERNEL,
    Order,
    Plan,
    Step,
    check_order,
    plan,
    traced_order,
)


@overload
def projected_convolution(
    u: Tensor, K: Tensor, B: Tensor, C: Tensor, *, order: Order = "auto",
    max_bytes: int | None = None, explain: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def projected_convolution(
    u: Tensor, K: Tensor, B: Tensor, C: Tensor, *, order: Order = "auto",
    max_bytes: int | None = None, explain: Literal[True],
) -> Plan: ...  # fmt: skip


def projected_convolution(
    u: Tensor,
    K: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    order: Order = "auto",
    max_bytes: int | None = None,
    explain: bool = False,
) -> Tensor | Plan:
    """Compute y_t = Re sum_{s <= t} C (K_s * (B u_{t-s})), * elementwise.

    Args:
        u: (..., L, H), real.
        K: (M, J), one kernel a channel, real or complex. M may differ from L; what reaches beyond L
            is not used.
        B: (J, H), the projection in, real or complex.
        C: (H_out, J), the projection out, real or complex.
        order: ``kernel`` (the full kernel C K B, then one convolution), ``project`` (project,
            convolve J channels, project), ``frequency`` (one contraction of the spectra), or
            ``auto``: the cheapest by `lrnnx_core.ops.contract.plan`. While torch.compile traces,
            the choice does not depend on the length; ``torch.export`` takes ``project``. Axes that
            ``vmap`` maps over are not seen: rows are those of the unmapped u.
        max_bytes: ``auto`` keeps to orders whose estimated peak memory is at most this; if none is,
            it takes the smallest. It has no effect while torch.compile or export traces.
        explain: return the plan, with what each order would cost, and compute nothing.

    Returns:
        y (..., L, H_out), real, in the promoted dtype; the transform runs in at least float32. With
        ``explain`` the `lrnnx_core.ops.contract.Plan`.

    Raises:
        ValueError: sizes, devices or dtypes that do not fit, an unknown order.

    Source: Pei 2025 (Centaurus), arXiv:2501.13230, for real K, B, C.
    """
    check_order("projected_convolution", order)
    _check(u, K, B, C)
    result = u.dtype
    for t in (K, B, C):
        result = torch.promote_types(result, t.real.dtype if t.is_complex() else t.dtype)
    dtype = torch.promote_types(result, torch.float32)
    K, B, C = _alike(K, B, C)
    wide = dtype if not K.is_complex() else torch.promote_types(dtype, torch.complex64)
    u, K, B, C = u.to(dtype), K.to(wide), B.to(wide), C.to(wide)
    length, taps = u.shape[-2], K.shape[0]
    if taps > length:
        K = K.narrow(0, 0, length)
    steps: tuple[Step, ...] | None = None
    if explain or not torch.compiler.is_compiling():
        p = plan(
            u.shape[:-2].numel(), length, B.shape[1], B.shape[0], C.shape[0], taps=taps,
            is_complex=K.is_complex(), itemsize=dtype.itemsize, order=order, max_bytes=max_bytes,
        )  # fmt: skip
        if explain:
            return p
        chosen, steps = p.order, p.chosen.steps
    elif order != "auto":
        chosen = order
    elif torch.compiler.is_exporting():
        chosen = "project"
    else:
        chosen = traced_order(
            u.shape[:-2].numel(), B.shape[1], B.shape[0], C.shape[0], K.is_complex()
        )
    if chosen == "kernel":
        y = causal_convolution(u, _full_kernel(K, B, C, steps), mimo=True)
    elif chosen == "project" or length <= 1 or not (u.numel() and K.numel() and C.numel()):
        y = _project(u, K, B, C)
    else:
        y = _in_frequency(u, K, B, C, steps)
    return y.to(result)


def _project(u: Tensor, K: Tensor, B: Tensor, C: Tensor) -> Tensor:
    if not K.is_complex():
        return causal_convolution(u @ B.mT, K) @ C.mT
    # one complex transform is as long as two real ones, and quicker: measured 0.77 ... 0.93
    s = causal_convolution(torch.complex(u @ B.real.mT, u @ B.imag.mT), K)
    return s.real @ C.real.mT - s.imag @ C.imag.mT


def _full_kernel(K: Tensor, B: Tensor, C: Tensor, steps: tuple[Step, ...] | None) -> Tensor:
    """Return Re(C diag(K_t) B), (M, H_out, H)."""
    if steps is None:
        left = C.unsqueeze(0) * K.unsqueeze(1)
        if not K.is_complex():
            return left @ B
        return left.real @ B.real - left.imag @ B.imag
    return _contract(KERNEL, [C, K, B], steps, real=True)


def _in_frequency(
    u: Tensor, K: Tensor, B: Tensor, C: Tensor, steps: tuple[Step, ...] | None
) -> Tensor:
    """Contract the spectra.

    A complex K acts on a real u through two half spectra: with Re s = (s + conj s)/2,
    Y = (C (F[Re K] + i F[Im K]) B + conj(C) (F[Re K] - i F[Im K]) conj(B)) / 2 U for F the
    transform of a real signal, so that no complex transform is needed.
    """
    length = u.shape[-2]
    n = fast_length(length + K.shape[0] - 1)
    U = along(torch.fft.rfft, u, n, -2)
    if K.is_complex():
        re, im = (along(torch.fft.rfft, part, n, 0) for part in (K.real, K.imag))
        im = 1j * im
        F = torch.cat([re + im, re - im], dim=1)
        B = torch.cat([B, torch.complex(B.real, -B.imag)], dim=0)
        C = 0.5 * torch.cat([C, torch.complex(C.real, -C.imag)], dim=1)
    else:
        F = along(torch.fft.rfft, K, n, 0)
        B, C = B.to(F.dtype), C.to(F.dtype)
    batch = u.shape[:-2]
    U = U.reshape(-1, *U.shape[-2:])
    if steps is None:
        Y = torch.einsum("blj,dj->bld", torch.einsum("blc,jc->blj", U, B) * F, C)
    else:
        Y = _contract(FREQUENCY, [U, F, B, C], steps)
    Y = Y.reshape(*batch, *Y.shape[-2:])
    return along(torch.fft.irfft, Y, n, -2)[..., :length, :]


def _contract(
    equation: str, operands: list[Tensor], steps: tuple[Step, ...], real: bool = False
) -> Tensor:
    """Contract operands pair by pair; ``real`` takes the real part, and saves half of the last."""
    for i, (where, subscripts) in enumerate(steps):
        pair = [operands[k] for k in where]
        operands = [t for k, t in enumerate(operands) if k not in where]
        if real and i == len(steps) - 1 and pair[0].is_complex():
            made = torch.einsum(subscripts, *(t.real for t in pair))
            made = made - torch.einsum(subscripts, *(t.imag for t in pair))
        else:
            made = torch.einsum(subscripts, *pair)
        operands.append(made)
    return operands[0]


def _alike(K: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return K, B, C all real where the result depends on real parts alone, else all complex."""
    complex_ones = sum(t.is_complex() for t in (K, B, C))
    if complex_ones <= 1:
        return K.real, B.real, C.real
    return tuple(t.to(torch.promote_types(t.dtype, torch.complex64)) for t in (K, B, C))  # pyright: ignore[reportReturnType]


def _check(u: Tensor, K: Tensor, B: Tensor, C: Tensor) -> None:
    named = {"u": u, "K": K, "B": B, "C": C}
    ranks = u.ndim >= 2 and K.ndim == B.ndim == C.ndim == 2
    if not ranks or u.shape[-1] != B.shape[1] or not B.shape[0] == K.shape[1] == C.shape[1]:
        shapes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in named.items())
        raise ValueError(
            f"projected_convolution: {shapes}; expected (..., L, H), (M, J), (J, H), (H_out, J)"
        )
    for name, t in named.items():
        if t.device != u.device:
            raise ValueError(f"projected_convolution: {name} is on {t.device} and u on {u.device}")
        if not (t.is_floating_point() or (t.is_complex() and name != "u")):
            expected = "a real floating one" if name == "u" else "floating"
            raise ValueError(
                f"projected_convolution: {name} has dtype {t.dtype}, expected {expected}"
            )
