# SPDX-License-Identifier: MIT
"""A diagonal plus low-rank state matrix, made discrete by the bilinear transform without a solve.

In continuous time, with D the diagonal of steps dt and sums over both halves of each conjugate
pair,

    x' = D (diag(Lambda) - sum_r P_r P_r^*) x + D B u

and the bilinear transform of a diagonal plus low-rank matrix is one again (Woodbury):

    A_bar = diag(a) - sum_r U_r V_r^T,    a = (1 + z/2) d,  z = dt Lambda,  d = 1 / (1 - z/2),
    V_r = conj(P_r) d,    U = d dt P W,   W = (I + 1/2 P^* d dt P)^-1  (R, R) and real

Half of each pair is stored; a product over all states is twice the real part of one over the half.
The *real form* of a state is [Re x, Im x], N numbers, on which A_bar is a real (N, N) matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class System(NamedTuple):
    """A continuous system: z = dt Lambda, B and P times dt and P, each (H, M) or (R, H, M)."""

    z: Tensor
    B: Tensor
    left: Tensor
    """dt P (R, H, M)."""
    right: Tensor
    """conj P (R, H, M)."""

    def to(self, real: torch.dtype) -> System:
        """Convert every part to the complex dtype of this real one."""
        kind = torch.complex128 if real == torch.float64 else torch.complex64
        return System(*(t.to(kind) for t in self))


class Transition(NamedTuple):
    """x_t = a x_{t-1} - sum_r U_r 2 Re(V_r . x_{t-1}) + B u_t, each (..., [R,] H, M)."""

    a: Tensor
    U: Tensor
    V: Tensor
    B: Tensor

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        """Take one step: x (..., H, M) complex, u (..., H) real."""
        feedback = 2 * (self.V * x.unsqueeze(-3)).sum(-1).real
        new = self.a * x + self.B * u.unsqueeze(-1)
        return new - (self.U * feedback.unsqueeze(-1)).sum(-3)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return (A_bar (..., H, N, N), B_bar (..., H, N)) of the real form."""
        # a product, for the derivative of diag_embed warns in inductor (PyTorch 2.13)
        eye = torch.eye(self.a.shape[-1], dtype=self.a.real.dtype, device=self.a.device)
        re, im = (part.unsqueeze(-1) * eye for part in (self.a.real, self.a.imag))
        diagonal = torch.cat([torch.cat([re, -im], dim=-1), torch.cat([im, re], dim=-1)], dim=-2)
        low_rank = torch.einsum("...rhn,...rhm->...hnm", column(self.U), 2 * row(self.V))
        return diagonal - low_rank, column(self.B)


def conjugate(x: Tensor) -> Tensor:
    """Return conj x, neither lazy (which needs rules of its own) nor `conj_physical` (no vmap)."""
    return torch.complex(x.real, -x.imag)


def column(x: Tensor) -> Tensor:
    """Return the real form [Re x, Im x] of a state or an input vector, (..., M) -> (..., N)."""
    return torch.cat([x.real, x.imag], dim=-1)


def row(c: Tensor) -> Tensor:
    """Return the real row that gives Re(sum_n c_n x_n) with `column` x, (..., M) -> (..., N)."""
    return torch.cat([c.real, -c.imag], dim=-1)


def halves(x: Tensor, sign: float = 1.0) -> Tensor:
    """Return the complex vector of a real form: the inverse of `column`, or with -1 of `row`."""
    re, im = x.chunk(2, dim=-1)
    return torch.complex(re, sign * im)


def transition(
    system: System, decay: Tensor | None = None, drive: Tensor | None = None
) -> Transition:
    """Discretize by the bilinear transform.

    Args:
        system: what to discretize.
        decay: (..., 1, 1), multiplies the step in A_bar; one if None.
        drive: (..., 1, 1), multiplies the step in B_bar; one if None.

    Source: Gu et al. 2022 (S4), arXiv:2111.00396, section 3 and appendix C.2 (discretized DPLR).
    """
    a, U, V = _factors(system, decay)
    if drive is decay:
        d_drive, U_drive, V_drive = 0.5 * (1 + a), U, V
    else:
        a_drive, U_drive, V_drive = _factors(system, drive)
        d_drive = 0.5 * (1 + a_drive)
    B = system.B if drive is None else drive * system.B
    leak = (V_drive * B.unsqueeze(-3)).sum(-1).real.unsqueeze(-1)
    return Transition(a, U, V, d_drive * B - (U_drive * leak).sum(-3))


def _factors(system: System, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    z, left = system.z, system.left
    if scale is not None:
        z, left = scale * z, scale.unsqueeze(-3) * left
    d = 1 / (1 - 0.5 * z)
    V = system.right * d.unsqueeze(-3)
    G = left * d.unsqueeze(-3)
    gram = (system.right.unsqueeze(-3) * G.unsqueeze(-4)).sum(-1).real  # (..., R, R, H), i then j
    W = inverse(gram)
    return (1 + 0.5 * z) * d, (W.unsqueeze(-1) * G.unsqueeze(-3)).sum(-4), V


def inverse(gram: Tensor) -> Tensor:
    """Return (I + gram)^-1 of (..., R, R, H) matrices, real or complex."""
    rank = gram.shape[-2]
    if rank == 0:
        return gram
    if rank == 1:
        return 1 / (1 + gram)
    M = gram + torch.eye(rank, dtype=gram.dtype, device=gram.device).unsqueeze(-1)
    if rank == 2:
        a, b, c, d = (M[..., i, j, :] for i in (0, 1) for j in (0, 1))
        adjugate = torch.stack([torch.stack([d, -b], -2), torch.stack([-c, a], -2)], -3)
        return adjugate / (a * d - b * c).unsqueeze(-2).unsqueeze(-2)
    return torch.linalg.inv(M.movedim(-1, -3)).movedim(-3, -1)


def before_the_first_step(system: System, h: Tensor) -> Tensor:
    """Return the dt B (..., H, M) whose B_bar is A_bar h: (I + dt A / 2) h."""
    feedback = 2 * (system.right * h.unsqueeze(-3)).sum(-1).real
    pulled = (system.left * feedback.unsqueeze(-1)).sum(-3)
    return h + 0.5 * (system.z * h - pulled)
