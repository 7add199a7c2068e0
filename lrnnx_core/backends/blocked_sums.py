# SPDX-License-Identifier: MIT
"""Vandermonde and Cauchy sums as leaf operators in pure PyTorch, in tiles.

Both are products with a matrix that the nodes of a head define: exp(t z_n), and 1/D_kn. It has
H N L numbers and is never whole: a tile's part is made where the caches hold it, multiplied by all
rows of coefficients that share the nodes, and forgotten.

Arguments: coefficients (*batch, R, H, N), what defines the nodes (*batch, H, N). Sums run in a
fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers in a tile. On a CPU tables and products of a tile stay in the second-level cache.
TILE = {"cpu": 1 << 18}
TILE_ELSEWHERE = 1 << 24


def vandermonde(v: Tensor, z: Tensor, length: int) -> Tensor:
    """Leaf: K_t = Re sum_n v_n exp(t z_n), (*batch, R, H, length).

    With t = Q i + j the sum is a real matrix product of v exp(Q i z) and exp(j z), both of about
    sqrt(length) rows. v and z are of one dtype.
    """
    out = torch.empty((*v.shape[:-1], length), dtype=z.real.dtype, device=z.device)
    if not out.numel() or not v.shape[-1]:
        return out.zero_()
    P, R, H = merged(v.shape[:-1], z)
    N = v.shape[-1]
    powers = _Powers(z, length, rows=R)
    v, z = v.reshape(P, R, H, N), z[first_nodes(z, P, H)].reshape(P, H, N)
    target = out.view(P, R, H, -1)
    q, m = powers.q, powers.m
    for p, rows, heads in _tiles(z.device, P, R, H, m * (q + 2 * N), 2 * N * (q + m)):
        fine, coarse = powers.tables(z[p, heads], conjugate_coarse=True)
        x = v[p, rows, heads].transpose(0, 1)  # (h, r, N)
        left = torch.conj_physical(x).unsqueeze(-2) * coarse.unsqueeze(-3)
        left, right = _reals(left), _reals(fine)
        K = torch.bmm(left.flatten(1, 2), right.mT)  # (h, r m, q)
        K = K.view(*left.shape[:2], m * q)[..., :length]
        target[p, rows, heads] = K.transpose(0, 1)
    return out


def vandermonde_moments(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Leaf: sum_t g_t conj(exp(t z_n)) and sum_t t g_t conj(exp(t z_n)), (*batch, R, H, N) each.

    g is real, (*batch, R, H, L).
    """
    length, N = g.shape[-1], z.shape[-1]
    first, second = (
        torch.empty((*g.shape[:-1], N), dtype=z.dtype, device=z.device) for _ in range(2)
    )
    if not first.numel() or not length:
        return first.zero_(), second.zero_()
    P, R, H = merged(g.shape[:-1], z)
    powers = _Powers(z, length, rows=R)
    g, z = g.reshape(P, R, H, length), z[first_nodes(z, P, H)].reshape(P, H, N)
    firsts, seconds = first.view(P, R, H, N), second.view(P, R, H, N)
    q, m = powers.q, powers.m
    j = torch.arange(q, dtype=g.dtype, device=g.device).unsqueeze(-1)
    i = q * torch.arange(m, dtype=g.dtype, device=g.device)
    for p, rows, heads in _tiles(z.device, P, R, H, m * (q + 4 * N), 4 * N * (q + m)):
        fine, coarse = powers.tables(z[p, heads])
        tables = torch.cat([fine, j * fine], dim=-1)  # (h, q, 2 N)
        x = g[p, rows, heads].transpose(0, 1)
        x = torch.nn.functional.pad(x, (0, m * q - length))
        h, r = x.shape[:2]
        inner = torch.bmm(x.reshape(h, r * m, q), _reals(tables))
        if z.is_complex():
            inner = torch.view_as_complex(inner.view(h, r * m, 2 * N, 2))
        inner = inner.view(h, r, m, 2, N).mul_(coarse.view(h, 1, m, 1, N))
        total, fast = inner.sum(2).unbind(2)
        slow = torch.matmul(i.to(z.dtype), inner[..., 0, :])
        firsts[p, rows, heads] = torch.conj_physical(total).transpose(0, 1)
        seconds[p, rows, heads] = torch.conj_physical(fast + slow).transpose(0, 1)
    return first, second


class _Powers:
    """exp(j z) for j < q and exp(q i z) for i < m, q m >= length, of complex or real z.

    Each table is a product again, so that few exponentials are taken. These have their phase
    reduced modulo 2 pi in float64: in float32 it would be wrong by 1e-7 |Im z| t.
    """

    def __init__(self, z: Tensor, length: int, rows: int) -> None:
        q = math.isqrt(max(1, length * rows) - 1) + 1
        q = min(length, 16 * -(-q // 16))
        self.q, self.m = q, -(-length // q)
        self.sizes = [s for count in (self.q, self.m) for s in _square(count)]
        strides = (1, self.sizes[0], q, q * self.sizes[2])
        steps = [
            stride * torch.arange(size, dtype=torch.float64, device=z.device)
            for stride, size in zip(strides, self.sizes, strict=True)
        ]
        self.steps = torch.cat(steps).unsqueeze(-1)

    def tables(self, z: Tensor, *, conjugate_coarse: bool = False) -> tuple[Tensor, Tensor]:
        """Return (h, q, N) and (h, m, N) for z (h, N)."""
        x = z.unsqueeze(-2)
        if z.is_complex():
            turns = x.imag.double() * (self.steps / (2 * math.pi))
            angle = turns.sub_(turns.round()).mul_(2 * math.pi).to(z.real.dtype)
            modulus = (x.real.double() * self.steps).to(z.real.dtype).exp_()
            values = torch.complex(modulus * angle.cos(), modulus * angle.sin())
        else:
            values = (x.double() * self.steps).to(z.dtype).exp_()
        parts = values.split(self.sizes, dim=-2)
        if conjugate_coarse:
            parts = (*parts[:2], *(torch.conj_physical(part) for part in parts[2:]))
        fine = (parts[1].unsqueeze(-2) * parts[0].unsqueeze(-3)).flatten(-3, -2)
        coarse = (parts[3].unsqueeze(-2) * parts[2].unsqueeze(-3)).flatten(-3, -2)
        return fine[:, : self.q], coarse[:, : self.m]


def cauchy(
    alpha: Tensor, beta: Tensor, square: Tensor, rho: Tensor, a: Tensor, length: int
) -> Tensor:
    """Leaf: r_k = sum_n 2 (i x_k beta_n - c_k alpha_n) / D_kn, (*batch, R, H, length // 2 + 1, 2).

    D_kn = c_k^2 square_n - x_k^2 - 2 i x_k c_k rho_n, x_k = a sin(pi k / length), c_k the cosine.
    alpha, beta (*batch, R, H, N), square, rho (*batch, H, N), a (*batch, H); all real, one dtype.
    The last axis of the result holds real and imaginary parts.
    """
    count = length // 2 + 1
    out = alpha.new_empty(*alpha.shape[:-1], count, 2)
    if not out.numel() or not alpha.shape[-1]:
        return out.zero_()
    P, R, H = merged(alpha.shape[:-1], square, rho, a.unsqueeze(-1))
    N = alpha.shape[-1]
    weights = torch.cat([t.reshape(P, R, H, N) for t in (alpha, beta)], dim=1)
    first = first_nodes(square, P, H)
    square, rho, a = (t[first].reshape(P, H, -1, 1) for t in (square, rho, a))
    target = out.view(P, R, H, count, 2)
    angles = half_angles(length, a)
    for p, heads, spans in _node_tiles(a.device, P, H, count, N):
        nodes = _Nodes(a[p, heads], square[p, heads], rho[p, heads], *angles)
        W = weights[p, :, heads].transpose(0, 1)  # (h, 2 R, N)
        sums = W.new_empty(2, *W.shape[:2], count)
        for span in spans:
            u, w = nodes.reciprocal(span)
            sums[0, ..., span] = torch.bmm(W, u)
            sums[1, ..., span] = torch.bmm(W, w)
        (ua, ub), (wa, wb) = sums.unflatten(2, (2, R)).transpose(1, 2)
        x, c = 2 * nodes.x, 2 * nodes.c
        parts = torch.stack([(x * wb + c * ua).neg_(), x * ub - c * wa], dim=-1)
        target[p, :, heads] = parts.transpose(0, 1)
    return out


def cauchy_backward(
    grad: Tensor,
    alpha: Tensor,
    beta: Tensor,
    square: Tensor,
    rho: Tensor,
    a: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Leaf: the gradients of all five tensors of `cauchy`, of their shapes.

    With G the upstream, Y = sum over rows of conj(G) times the numerator and Z = Y / D^2,

        dalpha = -2 sum_k c Re(conj(G) / D),  dbeta = 2 sum_k x Re(i conj(G) / D),
        dsquare = -sum_k c^2 Re Z,  drho = -2 sum_k x c Im Z,
        a da = sum_n beta dbeta + rho drho + 2 sum_k x^2 Re Z.
    """
    R, H, N = alpha.shape[-3:]
    results = [t.new_zeros(t.shape) for t in (alpha, beta, square, rho, a)]
    if not alpha.numel():
        return results[0], results[1], results[2], results[3], results[4]
    P = math.prod(alpha.shape[:-3])
    if R == 1:
        P, H = 1, P * H
    weights = torch.cat([t.reshape(P, R, H, N) for t in (alpha, beta)], dim=1)
    square, rho, a = (t.reshape(P, H, -1, 1) for t in (square, rho, a))
    dalpha, dbeta = (t.view(P, R, H, N) for t in results[:2])
    dsquare, drho = (t.view(P, H, N) for t in results[2:4])
    da = results[4].view(P, H)
    upstream = grad.reshape(P, R, H, -1, 2)
    angles = half_angles(length, a)
    for p, heads, spans in _node_tiles(a.device, P, H, length // 2 + 1, N):
        nodes = _Nodes(a[p, heads], square[p, heads], rho[p, heads], *angles)
        re, im = upstream[p, :, heads].transpose(0, 1).unbind(-1)  # (h, R, K)
        A = torch.cat([-2 * nodes.c * re, 2 * nodes.x * im], dim=1)
        B = torch.cat([2 * nodes.c * im, 2 * nodes.x * re], dim=1)
        squares = torch.cat([nodes.c2.expand_as(nodes.x2), nodes.x2], dim=1)  # (h, 2, K)
        W = weights[p, :, heads].transpose(0, 1)  # (h, 2 R, N)
        rows, by_square, by_rho = torch.zeros_like(W), *(W.new_zeros(len(W), N, i) for i in (2, 1))
        for span in spans:
            u, w = nodes.reciprocal(span)  # (h, N, k)
            A_k, B_k = A[..., span], B[..., span]
            rows.baddbmm_(A_k, u.mT).baddbmm_(B_k, w.mT, alpha=-1)
            Y_re, Y_im = torch.bmm(W.mT, A_k), torch.bmm(W.mT, B_k)
            f = u * w  # 1 / D^2 = e + 2 i f
            e = u.mul_(u).addcmul_(w, w, value=-1)
            Z_re = (Y_re * e).addcmul_(Y_im, f, value=-2)
            Z_im = Y_im.mul_(e).addcmul_(Y_re, f, value=2)
            by_square.baddbmm_(Z_re, squares[..., span].mT)
            by_rho.baddbmm_(Z_im, nodes.xc2[..., span].mT)
        dalpha[p, :, heads], dbeta[p, :, heads] = rows.transpose(0, 1).split(R)
        dsquare[p, heads], drho[p, heads] = -by_square[..., 0], -by_rho[..., 0]
        da[p, heads] = 2 * by_square[..., 1].sum(-1)
    da += (weights[:, R:] * dbeta).sum((1, 3)) + (rho.squeeze(-1) * drho).sum(-1)
    da /= a[..., 0, 0]
    return results[0], results[1], results[2], results[3], results[4]


class _Nodes:
    """Half angles and denominators of a tile's heads; everything broadcasts to (h, N, K)."""

    def __init__(
        self, a: Tensor, square: Tensor, rho: Tensor, sine: Tensor, cosine: Tensor
    ) -> None:
        self.square, self.rho = square, rho
        self.x, self.c = a * sine, cosine.view(1, 1, -1)
        self.x2, self.c2, self.xc2 = self.x.square(), self.c.square(), 2 * self.x * self.c

    def reciprocal(self, span: slice) -> tuple[Tensor, Tensor]:
        """Return u + i w = 1 / D at these nodes, two real tensors."""
        u = (self.c2[..., span] * self.square).sub_(self.x2[..., span])
        w = self.xc2[..., span] * self.rho
        modulus = (u * u).addcmul_(w, w).reciprocal_()
        return u.mul_(modulus), w.mul_(modulus)


def half_angles(length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sin and cos of pi k / length, k = 0 ... length // 2, exact at both ends."""
    k = torch.arange(length // 2 + 1, dtype=torch.float64, device=like.device)
    sine = torch.sin(k * (math.pi / length))
    cosine = torch.sin((length - 2 * k) * (math.pi / (2 * length)))
    return sine.to(like.dtype), cosine.to(like.dtype)


def merged(lead: torch.Size, *nodes: Tensor) -> tuple[int, int, int]:
    """Return sizes (P, R, H) to view (*batch, R, H) as, so that P is 1 where it can be.

    Where all of the batch has the same nodes it joins the rows; where there is one row it joins the
    heads.
    """
    batch, (R, H) = lead[:-2], lead[-2:]
    P = math.prod(batch)
    same = all(
        n == 1 or t.stride(d) == 0 for t in nodes for d, n in enumerate(t.shape[: len(batch)])
    )
    if same:
        return 1, P * R, H
    return (1, 1, P * H) if R == 1 else (P, R, H)


def first_nodes(nodes: Tensor, P: int, H: int) -> tuple[int, ...]:
    """Return the index of the batch's first nodes where it was merged into the rows, else ()."""
    batch = nodes.shape[:-2]
    return (0,) * len(batch) if P == 1 and nodes.shape[-2] == H else ()


def _square(count: int) -> tuple[int, int]:
    """Return two sizes near the root of ``count``, whose product is at least that."""
    low = math.isqrt(count - 1) + 1
    return low, -(-count // low)


def _reals(x: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2 N) real, a view; real tensors as they are."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def _tiles(
    device: torch.device, P: int, R: int, H: int, per_row: int, per_head: int
) -> Iterator[tuple[int, slice, slice]]:
    """Yield (p, rows, heads) of tiles that hold about `TILE` numbers."""
    tile = TILE.get(device.type, TILE_ELSEWHERE)
    rows = min(R, max(1, tile // per_row))
    heads = min(H, max(1, tile // (rows * per_row + per_head)))
    for p in range(P):
        for h in range(0, H, heads):
            for r in range(0, R, rows):
                yield p, slice(r, r + rows), slice(h, h + heads)


def _node_tiles(
    device: torch.device, P: int, H: int, count: int, N: int
) -> Iterator[tuple[int, slice, list[slice]]]:
    """Yield (p, heads, spans of nodes) of tiles whose tables hold about `TILE` numbers each."""
    tile = TILE.get(device.type, TILE_ELSEWHERE)
    nodes = min(count, max(16, tile // N))
    heads = min(H, max(1, tile // (nodes * N)))
    spans = [slice(k, k + nodes) for k in range(0, count, nodes)]
    for p in range(P):
        for h in range(0, H, heads):
            yield p, slice(h, h + heads), spans
