# SPDX-License-Identifier: MIT
"""Convolution kernels of diagonal plus low-rank systems: the truncated generating function of S4.

With C~ = C (I - A_bar^L), the discrete Fourier transform of K_0 ... K_{L-1} at the L-th roots of
unity is C~ (I - A_bar omega)^-1 B_bar, and Woodbury turns that into sums over single states. In
half angles, theta_k = pi k / L, s = sin theta, c = cos theta, and a step of one (dt is in z),

    r_v(k) = sum_n v_n / (2 i s - z_n c) over both halves of each conjugate pair,
    K^(k) = exp(i theta_k) [r_CB - c r_CP (I + c r_PP)^-1 r_PB],    K = irfft(K^)

which, unlike the form with g(omega) = 2 (1 - omega) / (1 + omega), has no pole at omega = -1.

Source: Gu et al. 2022 (S4), arXiv:2111.00396, appendix C.3 (the generating function).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrnnx_core.models._dplr import System, conjugate, inverse
from lrnnx_core.ops import cauchy
from lrnnx_core.ops._spectra import along


def kernel(C: Tensor, system: System, length: int, B: Tensor | None = None) -> Tensor:
    """Return the kernel of C~ of this length: C (Ch, H, M) -> (Ch, L, H), real.

    Args:
        C: C~, without the factor 2 of the conjugate halves.
        system: the continuous system.
        length: number of samples L that C~ was made for.
        B: (..., H, M), instead of the system's own; the result is then (..., Ch, L, H).
    """
    two = system.z.real.new_full(system.z.shape[:1], 2.0)
    theta = torch.arange(length // 2 + 1, dtype=torch.float64, device=two.device)
    theta = theta * (torch.pi / length)
    at = torch.cos(theta).to(two.dtype), torch.sin(theta).to(two.dtype)
    spectrum = _woodbury(C, system, lambda v: cauchy(v, system.z, two, length), *at, B)
    return along(torch.fft.irfft, spectrum, length, -2)


def response(C: Tensor, system: System, omega: Tensor) -> Tensor:
    """Return C (I - A_bar exp(-i omega))^-1 B_bar for the true C at omega (K,): (Ch, K, H)."""
    cosine, sine = torch.cos(0.5 * omega), torch.sin(0.5 * omega)
    at = torch.complex(torch.zeros_like(sine), 2 * sine)[:, None, None]
    z = system.z * cosine[:, None, None]  # (K, H, M)

    def sums(v: Tensor) -> Tensor:
        v = v.unsqueeze(-3)
        return (v / (at - z) + conjugate(v) / (at - conjugate(z))).sum(-1)

    return _woodbury(C, system, sums, cosine, sine)


def _woodbury(
    C: Tensor,
    system: System,
    sums: Callable[[Tensor], Tensor],
    cosine: Tensor,
    sine: Tensor,
    B: Tensor | None = None,
) -> Tensor:
    """Put the spectrum (..., Ch, K, H) together from sums r_v, (..., H, M) -> (..., K, H)."""
    rank, count = system.left.shape[-3], C.shape[-3]
    left = torch.cat([C, system.right], dim=-3).unsqueeze(-3)  # (Ch + R, 1, H, M)
    phase, cosine = torch.complex(cosine, sine).unsqueeze(-1), cosine.unsqueeze(-1)
    if B is None:  # one call: all numerators share the denominators
        both = sums(left * torch.cat([system.B.unsqueeze(0), system.left]))
        to_B, to_P = both[:, 0], both[:, 1:]
    else:
        to_B, to_P = sums((left * B[..., None, None, :, :]).squeeze(-3)), sums(left * system.left)
    if rank == 0:
        return phase * to_B
    through = (cosine * to_P[count:]).flatten(-2)  # (R, R, K H)
    W = inverse(through).unflatten(-1, to_P.shape[-2:])
    gain = (W * to_B[..., count:, :, :].unsqueeze(-4)).sum(-3)  # (..., R, K, H)
    back = (to_P[:count] * gain.unsqueeze(-4)).sum(-3)
    return phase * (to_B[..., :count, :, :] - cosine * back)
