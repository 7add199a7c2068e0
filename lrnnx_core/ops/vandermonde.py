# SPDX-License-Identifier: MIT
"""Sums of exponentials K_t = Re sum_n v_n exp(t z_n): the kernel of a diagonal state-space model.

Closed under differentiation. With the cotangent g of K, in PyTorch's complex convention,

    dv_n = sum_t g_t conj(exp(t z_n)) = W0_n,   dz_n = conj(v_n) sum_t t g_t conj(exp(t z_n))
                                                     = conj(v_n) W1_n

and one leaf returns W0 and W1. The tangent of K is the operator again, with weights t, as are the
gradients of (W0, W1).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_sums, cuda_vandermonde, library
from lrnnx_core.backends.transforms import allow_in_graph, forward_mode_depth, full_precision
from lrnnx_core.ops._rows import Rows, check_nodes, real_dtype
from lrnnx_core.types import Backend


def vandermonde(v: Tensor, z: Tensor, length: int, *, backend: Backend = "auto") -> Tensor:
    """Compute K_t = Re sum_n v_n exp(t z_n) for t = 0 ... length - 1.

    The matrix of exponentials (H, N, L) is never built: memory beyond the result is bounded. Phases
    are reduced in float64, so that K keeps its precision at any length.

    Args:
        v: (..., H, N), coefficients, real or complex. There is no factor 2: for halves of conjugate
            pairs it belongs in v.
        z: (..., H, N), logarithms of the decays, real or complex. Leading axes of v and z
            broadcast; rows of v that share z share its exponentials.
        length: number of samples L, at least 0.
        backend: ``"auto"``, or ``"reference"`` for the sum with the whole matrix.

    Returns:
        K (..., L, H), real, at least float32.

    Raises:
        ValueError: shapes that do not fit, a dtype that is not floating or complex, tensors on
            different devices, length < 0, an unknown backend.

    Source: Gu et al. 2022 (S4D), arXiv:2206.11893, section 3.3.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"vandermonde: backend {backend!r}, expected 'auto' or 'reference'")
    if not isinstance(length, (int, torch.SymInt)) or length < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"vandermonde: length = {length!r}, expected an integer >= 0")
    batch = check_nodes("vandermonde", {"v": v, "z": z})
    if not z.is_complex() and v.is_complex():
        v = v.real
    dtype = torch.promote_types(z.dtype, real_dtype(v, z))
    v, z = v.to(dtype), z.to(dtype)
    with full_precision(z.device):
        if backend == "reference":
            return _definition(v, z, length)
        rows = Rows(batch, z.shape[:-2])
        return rows.result(_vandermonde(rows.coefficients(v), rows.nodes(z), length)).mT


def _definition(v: Tensor, z: Tensor, length: int) -> Tensor:
    """Sum over the whole matrix (..., L, H, N): the specification."""
    t = torch.arange(length, dtype=z.real.dtype, device=z.device).reshape(-1, 1, 1)
    terms = v.unsqueeze(-3) * torch.exp(t * z.unsqueeze(-3))
    return terms.sum(-1).real if terms.is_complex() else terms.sum(-1)


def _vandermonde(v: Tensor, z: Tensor, length: int) -> Tensor:
    """Run the operator: v (*b, R, H, N), z (*b, H, N) of one dtype -> (*b, R, H, L)."""
    if forward_mode_depth() > 1:
        return _definition(v, z.unsqueeze(-3), length).mT
    return _Vandermonde.apply(v, z, length)


def _moments(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Sum (1, t) g_t conj(exp(t z)) over t: g (*b, R, H, L), z (*b, H, N) -> two (*b, R, H, N)."""
    if forward_mode_depth() > 1:
        t = _steps(g)
        table = torch.exp(t.unsqueeze(-1) * z.unsqueeze(-2)).conj()  # (*b, H, L, N)
        g, table = g.unsqueeze(-1), table.unsqueeze(-4)
        return (g * table).sum(-2), (t.unsqueeze(-1) * g * table).sum(-2)
    return _Moments.apply(g, z)


def _steps(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)


def _conj(x: Tensor) -> Tensor:
    return x.conj().resolve_conj() if x.is_complex() else x


class _Vandermonde(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, z: Tensor, length: int) -> Tensor:
        return _leaf(v, z, length)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, z, ctx.length = inputs
        ctx.save_for_backward(v, z)
        ctx.save_for_forward(v, z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, z = ctx.saved_tensors
        first, second = _moments(grads[0], z)
        return first, (_conj(v) * second).sum(-3), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        v, z = ctx.saved_tensors
        tv, tz, _ = tangents
        K = v.new_zeros(()) if tv is None else _vandermonde(tv, z, ctx.length)
        if tz is None:
            return K
        slope = _vandermonde(v * tz.unsqueeze(-3), z, ctx.length)
        slope = _steps(slope) * slope
        return slope if tv is None else K + slope


class _Moments(torch.autograd.Function):
    """(g, z) -> (W0, W1). With W2 the next moment, dW_i = moment i of dg, + conj(dz) W_{i+1}."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return _leaf_moments(g, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, z, second = ctx.saved_tensors
        c0, c1 = grads
        t = _steps(g)
        length = g.shape[-1]
        to_g = _vandermonde(c0, z, length) + t * _vandermonde(c1, z, length)
        third = _moments(t * g, z)[1]
        return to_g, (_conj(c0) * second + _conj(c1) * third).sum(-3)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        g, z, second = ctx.saved_tensors
        tg, tz = tangents
        parts = None if tg is None else _moments(tg, z)
        if tz is None:
            return (torch.zeros_like(second), torch.zeros_like(second)) if parts is None else parts
        tz = _conj(tz).unsqueeze(-3)
        moved = tz * second, tz * _moments(_steps(g) * g, z)[1]
        return moved if parts is None else (parts[0] + moved[0], parts[1] + moved[1])


def _fake(v: Tensor, z: Tensor, length: int) -> Tensor:
    return v.new_empty((*v.shape[:-1], length), dtype=z.real.dtype)


def _fake_moments(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*g.shape[:-1], z.shape[-1])
    return z.new_empty(shape), z.new_empty(shape)


def _default(v: Tensor, z: Tensor, length: int) -> Tensor:
    with full_precision(z.device):
        return blocked_sums.vandermonde(v, z, length)


def _default_moments(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    with full_precision(z.device):  # a backward pass may be run inside of an autocast region
        return blocked_sums.vandermonde_moments(g, z)


_leaf = library.define(
    "vandermonde(Tensor v, Tensor z, SymInt length) -> Tensor", default=_default, fake=_fake
)
_leaf_moments = library.define(
    "vandermonde_moments(Tensor g, Tensor z) -> (Tensor, Tensor)",
    default=_default_moments,
    fake=_fake_moments,
)
for _function in (_Vandermonde.forward, _Moments.forward):
    setattr(_function, "__signature__", inspect.signature(_function))  # noqa: B010
allow_in_graph(_vandermonde)
_CUDA = cuda_vandermonde.implement()
