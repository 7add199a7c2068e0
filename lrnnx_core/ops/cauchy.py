# SPDX-License-Identifier: MIT
"""Cauchy sums at the nodes of a bilinear transform: the kernel of S4 in the frequency domain.

In half-angle form: theta_k = pi k / L, s and c its sine and cosine. The two terms of a conjugate
pair have one common denominator,

    v/(i a s - lam c) + conj(v)/(i a s - conj(lam) c)
        = 2 (i a s Re v - c Re(v conj(lam))) / (c^2 |lam|^2 - a^2 s^2 - 2 i a s c Re lam),

so the leaf operators take Re(v conj(lam)), Re v, |lam|^2 and Re lam: one real reciprocal a pair.

The fused gradient is a first derivative only. Where more is asked for (two levels of torch.func, or
any forward mode) plain differentiable PyTorch runs, with the whole matrix; a second derivative of
an eager graph goes through the derivative of that.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_sums, cpu, cuda_cauchy, library
from lrnnx_core.backends.transforms import (
    allow_in_graph,
    differentiation_depth,
    dual_level_active,
    forward_mode_depth,
    full_precision,
)
from lrnnx_core.ops._rows import Rows, check_nodes, real_dtype
from lrnnx_core.types import Backend


def cauchy(v: Tensor, lam: Tensor, a: Tensor, length: int, *, backend: Backend = "auto") -> Tensor:
    """Compute r_k = sum_n v_n / (i a s_k - lam_n c_k) + conj(v_n) / (i a s_k - conj(lam_n) c_k).

    s_k and c_k are sine and cosine of pi k / length, k = 0 ... length // 2, made in float64. The
    matrix of denominators (H, N, K) is never built: memory beyond the result is bounded.

    Args:
        v: (..., H, N), numerators, complex or real.
        lam: (..., H, N), poles in continuous time, complex or real. Leading axes of v, lam and a
            broadcast; rows of v that share lam and a share the denominators.
        a: (..., H), real: 2 / dt.
        length: number of samples L of the kernel, at least 1.
        backend: ``"auto"``, or ``"reference"`` for the sum with the whole matrix.

    Returns:
        r (..., length // 2 + 1, H), complex, of at least float32 parts.

    Raises:
        ValueError: shapes that do not fit, a dtype that is not floating or complex, a complex a,
            tensors on different devices, length < 1, an unknown backend.

    Source: Gu et al. 2022 (S4), arXiv:2111.00396, section 3 and appendix C.3; the half-angle form
    is that sum with numerator and denominator times 1 + exp(-2 i theta_k) over 2 exp(-i theta_k).
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"cauchy: backend {backend!r}, expected 'auto' or 'reference'")
    if not isinstance(length, (int, torch.SymInt)) or length < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"cauchy: length = {length!r}, expected an integer >= 1")
    batch = check_nodes("cauchy", {"v": v, "lam": lam, "a": a})
    if a.is_complex():
        raise ValueError(f"cauchy: a has dtype {a.dtype}, expected a real one")
    real = real_dtype(v, lam, a)
    dtype = torch.promote_types(real, torch.complex64)
    v, lam, a = v.to(dtype), lam.to(dtype), a.to(real)
    with full_precision(v.device):
        if backend == "reference":
            return _definition(v, lam, a, length)
        alpha = v.real * lam.real + v.imag * lam.imag
        square = lam.real.square() + lam.imag.square()
        rows = Rows(batch, lam.shape[:-2], a.shape[:-1])
        parts = _cauchy(
            rows.coefficients(alpha),
            rows.coefficients(v.real),
            rows.nodes(square),
            rows.nodes(lam.real),
            rows.nodes(a, 1),
            length,
        )
        return rows.result(torch.view_as_complex(parts)).mT


def _definition(v: Tensor, lam: Tensor, a: Tensor, length: int) -> Tensor:
    """Sum over the whole matrix (..., K, H, N), with two divisions: the specification."""
    sine, cosine = (t.reshape(-1, 1, 1) for t in blocked_sums.half_angles(length, a))
    x = torch.complex(torch.zeros_like(a), a).unsqueeze(-1).unsqueeze(-3) * sine
    v, lam = v.unsqueeze(-3), lam.unsqueeze(-3)
    return (v / (x - lam * cosine) + v.conj() / (x - lam.conj() * cosine)).sum(-1)


def _composite(
    alpha: Tensor, beta: Tensor, square: Tensor, rho: Tensor, a: Tensor, length: int
) -> Tensor:
    """Compose the leaf of differentiable pieces, with the whole matrix (*b, H, N, K)."""
    sine, cosine = blocked_sums.half_angles(length, a)
    x = (a.unsqueeze(-1) * sine).unsqueeze(-2)
    u = cosine.square() * square.unsqueeze(-1) - x.square()
    w = 2 * x * cosine * rho.unsqueeze(-1)
    modulus = u.square() + w.square()
    u, w = u / modulus, w / modulus
    ua, ub, wa, wb = (
        torch.einsum("...rhn,...hnk->...rhk", t, table) for table in (u, w) for t in (alpha, beta)
    )
    x = x.movedim(-2, -3)
    return 2 * torch.stack([-x * wb - cosine * ua, x * ub - cosine * wa], dim=-1)


def _cauchy(
    alpha: Tensor, beta: Tensor, square: Tensor, rho: Tensor, a: Tensor, length: int
) -> Tensor:
    """alpha, beta (*b, R, H, N), square, rho (*b, H, N), a (*b, H) -> (*b, R, H, K, 2)."""
    if differentiation_depth() > 1 or forward_mode_depth() or dual_level_active():
        return _composite(alpha, beta, square, rho, a, length)
    return _Cauchy.apply(alpha, beta, square, rho, a, length)


class _Cauchy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _leaf(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.length = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_CauchyBackward.apply(grads[0], *ctx.saved_tensors, ctx.length), None)


class _CauchyBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _leaf_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.length = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        length = ctx.length

        def forward(alpha: Tensor, beta: Tensor, square: Tensor, rho: Tensor, a: Tensor) -> Tensor:
            return _composite(alpha, beta, square, rho, a, length)

        def gradient(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(forward, *tensors)[1](grad)

        return (*torch.func.vjp(gradient, *ctx.saved_tensors)[1](grads), None)


def _fake(alpha: Tensor, *rest: Any) -> Tensor:
    return alpha.new_empty(*alpha.shape[:-1], rest[-1] // 2 + 1, 2)


def _fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in rest[:-1])


def _default(*arguments: Any) -> Tensor:
    with full_precision(arguments[0].device):
        return blocked_sums.cauchy(*arguments)


def _default_backward(*arguments: Any) -> tuple[Tensor, ...]:
    with full_precision(arguments[0].device):  # it may be run inside of an autocast region
        return blocked_sums.cauchy_backward(*arguments)


_ARGUMENTS = "Tensor alpha, Tensor beta, Tensor square, Tensor rho, Tensor a, SymInt length"
_leaf = library.define(f"cauchy({_ARGUMENTS}) -> Tensor", default=_default, fake=_fake)
_leaf_backward = library.define(
    f"cauchy_backward(Tensor grad, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 5)})",
    default=_default_backward,
    fake=_fake_backward,
)
for _function in (_Cauchy.forward, _CauchyBackward.forward):
    setattr(_function, "__signature__", inspect.signature(_function))  # noqa: B010
allow_in_graph(_cauchy)
_CUDA = cuda_cauchy.implement()
_CPU = cpu.implement("cauchy", "cauchy", "cauchy_backward")
