# SPDX-License-Identifier: MIT
"""Where parameters start: HiPPO matrices and their normal forms, S4D spectra, the LRU ring, steps.

Random values are standard uniforms and normals which are then transformed, never drawn between
given bounds: so every bound is a number one may `vmap` and differentiate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lrnnx_core.types import Number

Measure = Literal["legs", "legt", "fout"]
S4DInit = Literal["lin", "inv", "inv2", "quad", "legs", "real", "random"]

MIN_DECAY = 1e-4
"""The smallest |Re A| an initial eigenvalue may have (LegT and FouT have 0)."""


@dataclass(frozen=True)
class Drawer:
    """Draws standard random numbers on one device, in one dtype, from one generator."""

    generator: torch.Generator | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def resolved(self) -> Drawer:
        """Fill in torch's defaults; the dtype of state-space parameters is at least float32."""
        dtype = torch.get_default_dtype() if self.dtype is None else self.dtype
        if not dtype.is_floating_point:
            raise ValueError(f"init: dtype {dtype}, expected a real floating dtype")
        device = torch.get_default_device() if self.device is None else torch.device(self.device)
        return Drawer(self.generator, device, torch.promote_types(dtype, torch.float32))

    def uniform(self, *shape: int) -> Tensor:
        """Draw from U(0, 1), kept away from both ends so that logarithms stay finite."""
        u = torch.rand(shape, generator=self._usable(), device=self._source(), dtype=self.dtype)
        return u.clamp(1e-7, 1 - 1e-7).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Draw from N(0, 1)."""
        n = torch.randn(shape, generator=self._usable(), device=self._source(), dtype=self.dtype)
        return n.to(self.device)

    def lecun(self, *shape: int, fan_in: int) -> Tensor:
        """Draw a normal truncated at two deviations, of standard deviation 1/sqrt(fan_in)."""
        edge = math.erf(math.sqrt(2.0))  # the mass of a normal within two deviations
        z = math.sqrt(2.0) * torch.erfinv((2 * self.uniform(*shape) - 1) * edge)
        return z / (_TRUNCATED_STD * math.sqrt(fan_in))

    def tensor(self, values: Tensor) -> Tensor:
        """Copy constant values to this device and dtype; a copy, for `.real` is a view."""
        return values.to(device=self.device, dtype=self.dtype, copy=True)

    def _source(self) -> torch.device | str | None:
        on_meta = torch.device(self.device or "cpu").type == "meta"
        return self.device if self.generator is None or on_meta else self.generator.device

    def _usable(self) -> torch.Generator | None:
        return None if torch.device(self.device or "cpu").type == "meta" else self.generator


_TRUNCATED_STD = 0.8796256610342398  # standard deviation of a standard normal cut at +-2


class Hippo(NamedTuple):
    """A HiPPO system: A (N, N), B (N,), and P (rank, N) with A + P^T P normal; float64, CPU."""

    A: Tensor
    B: Tensor
    P: Tensor


class NormalForm(NamedTuple):
    """A HiPPO system in the basis that makes A + P P^* diagonal; complex128, CPU."""

    Lambda: Tensor
    V: Tensor
    B: Tensor
    P: Tensor


def hippo(measure: Measure, n: int) -> Hippo:
    """Return a HiPPO matrix with its input vector and low-rank part.

    Args:
        measure: ``legs`` (scaled Legendre), ``legt`` (translated Legendre, rank 2), ``fout``
            (translated Fourier; even n).
        n: state size N, at least 1.

    Raises:
        ValueError: an unknown measure, n < 1, or an odd n for ``fout``.

    Source: Gu et al. 2020 (HiPPO), arXiv:2008.07669, section 3.1 and appendix D; Gu et al. 2022
    (How to train your HiPPO), arXiv:2206.12037 (FouT, low-rank parts).
    """
    if measure not in get_args(Measure):
        raise ValueError(f"hippo: measure {measure!r}, expected one of {get_args(Measure)}")
    if n < 1 or (measure == "fout" and n % 2):
        raise ValueError(f"hippo: n = {n}, expected n >= 1" + (", even for fout" if n > 0 else ""))
    k = torch.arange(n, dtype=torch.float64, device="cpu")
    root = torch.sqrt(2 * k + 1)
    if measure == "legs":
        A = -torch.tril(root[:, None] * root, -1) - torch.diag(k + 1)
        return Hippo(A, root, torch.sqrt(k + 0.5)[None])
    if measure == "legt":
        sign = (-1.0) ** (k[:, None] - k)
        A = -0.5 * root[:, None] * root * torch.where(k[:, None] >= k, torch.ones_like(sign), sign)
        odd = (k % 2 == 1).double()
        return Hippo(A, 0.5 * root, torch.stack([odd, 1 - odd]) * torch.sqrt(k + 0.5))
    half = torch.arange(n // 2, dtype=torch.float64, device="cpu")
    S = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    even = 2 * torch.arange(n // 2, device="cpu")
    S[even, even + 1] = -math.pi * half
    S[even + 1, even] = math.pi * half
    B = torch.zeros(n, dtype=torch.float64, device="cpu")
    B[even] = math.sqrt(2.0)
    B[0] = 1.0
    return Hippo(S - B[:, None] * B, B, B[None])


def normal_form(measure: Measure, n: int, *, conj_sym: bool = True) -> NormalForm:
    """Diagonalise the normal part A + P^T P of a HiPPO matrix.

    Args:
        measure: see `hippo`.
        n: full state size N.
        conj_sym: keep one eigenvalue of each conjugate pair, those with Im <= 0 (n must be even).

    Returns:
        Lambda (M,), V (N, M) with orthonormal columns, B = V^* B (M,) and P (rank, M), where M is
        N/2 or N; ascending Im Lambda. Re Lambda is the exact common value (-1/2 for LegS, 0 for
        LegT and FouT).

    Raises:
        ValueError: as `hippo`; an odd n with ``conj_sym`` (one eigenvalue of an odd LegS is real).

    Source: Gu et al. 2022 (S4), arXiv:2111.00396, theorem 1; Gu et al. 2022 (S4D).
    """
    A, B, P = hippo(measure, n)
    if conj_sym and n % 2:
        raise ValueError(f"normal_form: n = {n} must be even to keep conjugate halves")
    S = A + P.mT @ P
    re = torch.diagonal(S).mean()
    skew = S - re * torch.eye(n, dtype=S.dtype, device="cpu")
    im, V = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    if conj_sym:
        im, V = im[: n // 2], V[:, : n // 2]
        if measure == "fout":
            # eigenvalue 0 is double there: take the vector whose conjugate is its partner
            V[:, -1] = 0
            V[0, -1], V[1, -1] = 2**-0.5, 1j * 2**-0.5
    Lambda = torch.complex(re.expand_as(im), im)
    return NormalForm(Lambda, V, V.mH @ B.to(V.dtype), P.to(V.dtype) @ V.conj())


def s4d_spectrum(init: S4DInit, n: int, copies: int, draw: Drawer) -> tuple[Tensor, Tensor]:
    """Return (-Re A, Im A), each (copies, n), for n stored states of S4D.

    Args:
        init: ``lin`` (-1/2 + i pi k), ``inv`` (-1/2 + i (N/pi)(N/(2k+1) - 1)), ``inv2``
            (-1/2 + i N/(k+1)), ``quad`` (-1/2 + i (2k+1)^2/pi), ``legs`` (normal part of
            HiPPO-LegS), ``real`` (-(k+1)), ``random`` (-1/2 + i exp(normal)); N = 2 n.
        n: stored states, k = 0 ... n - 1.
        copies: independent systems.
        draw: source of random numbers, device and dtype.

    Raises:
        ValueError: an unknown init.

    Source: Gu et al. 2022 (S4D), arXiv:2206.11893, section 4 (S4D-LegS, S4D-Inv, S4D-Lin).
    """
    k = torch.arange(n, dtype=torch.float64, device="cpu")
    size = 2 * n
    decay = torch.full((n,), 0.5, dtype=torch.float64, device="cpu")
    if init == "random":
        im = torch.exp(draw.normal(copies, n))
        return draw.tensor(decay).expand(copies, n).clone(), im
    if init == "lin":
        im = math.pi * k
    elif init == "inv":
        im = (size / math.pi) * (size / (2 * k + 1) - 1)
    elif init == "inv2":
        im = size / (k + 1)
    elif init == "quad":
        im = (1 + 2 * k) ** 2 / math.pi
    elif init == "real":
        decay, im = k + 1, torch.zeros_like(k)
    elif init == "legs":
        form = normal_form("legs", size)
        decay, im = -form.Lambda.real, form.Lambda.imag
    else:
        raise ValueError(f"s4d.init: A_init {init!r}, expected one of {get_args(S4DInit)}")
    decay, im = (draw.tensor(t).expand(copies, n).clone() for t in (decay, im))
    return decay, im


def log_dt(uniform: Tensor, dt_min: Number, dt_max: Number) -> Tensor:
    """Map standard uniforms to log dt, log-uniform in [dt_min, dt_max].

    Raises:
        ValueError: not 0 < dt_min <= dt_max, where both are plain numbers.

    Source: Gu et al. 2022 (S4D), arXiv:2206.11893, section 4.3.
    """
    plain = not (isinstance(dt_min, Tensor) or isinstance(dt_max, Tensor))
    if plain and not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"dt_min = {dt_min}, dt_max = {dt_max}: expected 0 < dt_min <= dt_max")
    low, high = (as_tensor(v, uniform).log() for v in (dt_min, dt_max))
    return low + uniform * (high - low)


def lru_ring(
    u1: Tensor, u2: Tensor, r_min: Number, r_max: Number, max_phase: Number
) -> tuple[Tensor, Tensor, Tensor]:
    """Map standard uniforms to (nu_log, theta_log, gamma_log) of the LRU.

    lambda = exp(-exp(nu_log) + i exp(theta_log)) is uniform on the ring r_min <= |lambda| <= r_max,
    0 <= arg <= max_phase, and gamma = sqrt(1 - |lambda|^2).

    Source: Orvieto et al. 2023 (LRU), arXiv:2303.06349, lemma 3.2.
    """
    r_min, r_max, max_phase = (as_tensor(v, u1) for v in (r_min, r_max, max_phase))
    nu = -0.5 * torch.log(u1 * (r_max**2 - r_min**2) + r_min**2)
    gamma_log = 0.5 * torch.log(-torch.expm1(-2 * nu))
    return torch.log(nu), torch.log(max_phase * u2), gamma_log


def as_tensor(value: Number, like: Tensor) -> Tensor:
    """Return a number as a 0-d tensor beside ``like``."""
    if isinstance(value, Tensor):
        return value.to(dtype=like.dtype, device=like.device)
    return torch.tensor(value, dtype=like.dtype, device=like.device)
