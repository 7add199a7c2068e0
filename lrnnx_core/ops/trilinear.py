# SPDX-License-Identifier: MIT
"""Matrices made from the input, applied without being kept: out_i = sum_jk w_ijk p_j q_k.

A model whose matrices come from its input, M_t = w q_t, needs M_t p_t a sample. Forming M_t for a
whole sequence takes L I J numbers, and autograd would keep them; this operator forms them for
``chunk_size`` samples at a time and keeps only p and q. The CUDA kernels form none in memory.

It is closed under differentiation: with a cotangent g of out,

    dp_j = sum_ik w_ijk g_i q_k,  dq_k = sum_ij w_ijk g_i p_j,  dw_ijk = sum_t g_i p_j q_k

the first two are the operator with the axes of w permuted, and the derivatives of the third
(`_outer`) are the operator again. Sums run in a fixed order, so results are reproducible.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import cpu, cuda_trilinear, library
from lrnnx_core.backends.transforms import allow_in_graph, forward_mode_depth
from lrnnx_core.types import Backend

CPU_CHUNK = 256  # samples, whose matrices the cache holds
DEVICE_CHUNK = 2**26  # bytes of matrices on another device, which its products fill


def trilinear(
    w: Tensor,
    p: Tensor,
    q: Tensor,
    *,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Compute out_i = sum_jk w_ijk p_j q_k for every sample.

    Args:
        w: (I, J, K), real.
        p: (..., J), of w's dtype.
        q: (..., K), of w's dtype.
        chunk_size: samples, of the batch and of time together, whose matrices are in memory at
            once: chunk_size I min(J, K) numbers. None: 256 on a CPU, elsewhere what 64 MiB hold.
        backend: ``"auto"``, or ``"reference"``, which forms the matrices of all samples.

    Returns:
        (..., I).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown backend, chunk_size < 1.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"trilinear: backend {backend!r}, expected 'auto' or 'reference'")
    if chunk_size is None:
        chunk_size = _chunk_size(w)
    if not isinstance(chunk_size, int) or chunk_size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"trilinear: chunk_size = {chunk_size!r}, expected an integer >= 1")
    if w.ndim != 3 or p.shape[-1:] != w.shape[1:2] or q.shape[-1:] != w.shape[2:]:
        raise ValueError(
            f"trilinear: w {tuple(w.shape)}, p {tuple(p.shape)} and q {tuple(q.shape)}, expected "
            "(I, J, K), (..., J) and (..., K)"
        )
    if not w.dtype == p.dtype == q.dtype or not w.is_floating_point():
        raise ValueError(
            f"trilinear: dtypes {w.dtype}, {p.dtype}, {q.dtype}, expected one, real and floating"
        )
    if not w.device == p.device == q.device:
        raise ValueError(f"trilinear: w, p, q on {w.device}, {p.device}, {q.device}, expected one")
    if backend == "reference":
        return _plain(w, p, q)
    batch = torch.broadcast_shapes(p.shape[:-1], q.shape[:-1])
    samples = math.prod(batch)
    if p is q:
        p = p.reshape(samples, p.shape[-1])
        return _square(w, p, chunk_size).reshape(*batch, w.shape[0])
    p, q = (x.expand(*batch, x.shape[-1]).reshape(samples, x.shape[-1]) for x in (p, q))
    return _contract(w, p, q, chunk_size).reshape(*batch, w.shape[0])


def _chunk_size(w: Tensor) -> int:
    if w.device.type == "cpu":
        return CPU_CHUNK
    two_shorter = math.prod(sorted(w.shape)[:2])
    return max(CPU_CHUNK, DEVICE_CHUNK // max(1, w.itemsize * two_shorter))


def _plain(w: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Form M = w q for every sample, then apply it: the specification."""
    matrices = (q @ w.flatten(0, 1).mT).unflatten(-1, w.shape[:2])
    return (matrices @ p.unsqueeze(-1)).squeeze(-1)


def _contract(w: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    """Run the operator on samples p (T, J), q (T, K)."""
    if forward_mode_depth() > 1:
        return _plain(w, p, q)
    return _Contract.apply(w, p, q, chunk_size)


def _square(w: Tensor, p: Tensor, chunk_size: int) -> Tensor:
    """Run the operator on p and p, whose two gradients are one product."""
    if forward_mode_depth() > 1:
        return _plain(w, p, p)
    return _Square.apply(w, p, chunk_size)


def _outer(g: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    """Sum g_i p_j q_k over samples: (T, I), (T, J), (T, K) -> (I, J, K)."""
    if forward_mode_depth() > 1:
        pairs = (g.unsqueeze(-1) * p.unsqueeze(-2)).flatten(-2)
        return (pairs.mT @ q).unflatten(0, (g.shape[-1], p.shape[-1]))
    return _Outer.apply(g, p, q, chunk_size)


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class _Contract(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
        return _leaf(w, p, q, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.chunk_size = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, p, q = ctx.saved_tensors
        (g,), size = grads, ctx.chunk_size
        to_p = _contract(w.permute(1, 0, 2), g, q, size)
        to_q = _contract(w.permute(2, 0, 1), g, p, size)
        return _outer(g, p, q, size), to_p, to_q, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        w, p, q = ctx.saved_tensors
        tw, tp, tq, _ = tangents
        given = [(tw, p, q), (w, tp, q), (w, p, tq)]
        parts = [
            _contract(x, y, z, ctx.chunk_size)
            for x, y, z in given
            if x is not None and y is not None and z is not None
        ]
        return _total(parts)


class _Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, p: Tensor, chunk_size: int) -> Tensor:
        return _leaf(w, p, p, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.chunk_size = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, p = ctx.saved_tensors
        (g,), size = grads, ctx.chunk_size
        to_p = _contract(w.permute(1, 0, 2) + w.permute(2, 0, 1), g, p, size)
        return _outer(g, p, p, size), to_p, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        w, p = ctx.saved_tensors
        tw, tp, _ = tangents
        parts = [] if tw is None else [_square(tw, p, ctx.chunk_size)]
        if tp is not None:
            parts.append(_contract(w + w.mT, tp, p, ctx.chunk_size))
        return _total(parts)


class _Outer(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
        return _leaf_outer(g, p, q, chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.chunk_size = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, p, q = ctx.saved_tensors
        (c,), size = grads, ctx.chunk_size
        to_g = _contract(c, p, q, size)
        to_p = _contract(c.permute(1, 0, 2), g, q, size)
        return to_g, to_p, _contract(c.permute(2, 0, 1), g, p, size), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        g, p, q = ctx.saved_tensors
        tg, tp, tq, _ = tangents
        given = [(tg, p, q), (g, tp, q), (g, p, tq)]
        parts = [
            _outer(x, y, z, ctx.chunk_size)
            for x, y, z in given
            if x is not None and y is not None and z is not None
        ]
        return _total(parts)


def _chunked(w: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    """Run the leaf: w (*b, I, J, K), p (*b, T, J), q (*b, T, K) -> (*b, T, I)."""
    batch = p.shape[:-2]
    shared = all(n == 1 or s == 0 for n, s in zip(batch, w.stride(), strict=False))
    if batch and shared and p.numel():  # one w for all: its batch joins the samples
        w = w[(0,) * len(batch)]
        p, q = (x.flatten(0, len(batch)) for x in (p, q))
        return _chunked(w, p, q, chunk_size).reshape(*batch, -1, w.shape[0])
    if w.shape[-2] > w.shape[-1]:  # contract the longer axis first
        w, p, q = w.mT, q, p
    rows = w.flatten(-3, -2).mT
    out = p.new_empty(*batch, p.shape[-2], w.shape[-3])
    size = max(1, chunk_size // max(1, math.prod(batch)))
    by_pairs = w.is_cuda and w.shape[-3] >= w.shape[-1]  # the output is the longest: one product
    for start in range(0, p.shape[-2], size):
        now = slice(start, start + size)
        if by_pairs:
            pairs = (p[..., now, :, None] * q[..., now, None, :]).flatten(-2)
            out[..., now, :] = pairs @ w.flatten(-2).mT
            continue
        matrices = (q[..., now, :] @ rows).unflatten(-1, w.shape[-3:-1])
        out[..., now, :] = (matrices @ p[..., now, :, None]).squeeze(-1)
    return out


def _chunked_outer(g: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    """Run the leaf: g (*b, T, I), p (*b, T, J), q (*b, T, K) -> (*b, I, J, K)."""
    parts = (g, p, q)
    # multiply out the two shortest; the third joins by a matrix product
    first, second, last = sorted(range(3), key=lambda i: parts[i].shape[-1])
    x, y, z = parts[first], parts[second], parts[last]
    batch, sizes = x.shape[:-2], (x.shape[-1], y.shape[-1], z.shape[-1])
    total = x.new_zeros(*batch, sizes[0] * sizes[1], sizes[2])
    size = max(1, chunk_size // max(1, math.prod(batch)))
    for start in range(0, x.shape[-2], size):
        now = slice(start, start + size)
        pairs = (x[..., now, :, None] * y[..., now, None, :]).flatten(-2)
        total += pairs.mT @ z[..., now, :]
    where = (first, second, last)
    order = [len(batch) + where.index(i) for i in range(3)]
    lead = range(len(batch))
    return total.unflatten(-2, sizes[:2]).permute(*lead, *order).contiguous()


def _fake(w: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    return p.new_empty(*p.shape[:-1], w.shape[-3])


def _fake_outer(g: Tensor, p: Tensor, q: Tensor, chunk_size: int) -> Tensor:
    return g.new_empty(*g.shape[:-2], g.shape[-1], p.shape[-1], q.shape[-1])


_leaf = library.define(
    "trilinear(Tensor w, Tensor p, Tensor q, int chunk_size) -> Tensor",
    default=_chunked,
    fake=_fake,
)
_leaf_outer = library.define(
    "trilinear_outer(Tensor g, Tensor p, Tensor q, int chunk_size) -> Tensor",
    default=_chunked_outer,
    fake=_fake_outer,
)
for _function in (_Contract.forward, _Square.forward, _Outer.forward):
    setattr(_function, "__signature__", inspect.signature(_function))  # noqa: B010
allow_in_graph(_contract)
allow_in_graph(_square)
_CPU = cpu.implement("trilinear", "trilinear", "trilinear_outer")
_CUDA = cuda_trilinear.implement()
