# SPDX-License-Identifier: MIT
"""The scan of S4D as leaf operators in pure PyTorch, in chunks of time.

The arguments are those of `lrnnx_core.ops.s4d_scan`, brought to fixed ranks:

    u (*batch, L, H) real; a, v (*shared, H, M), both complex or both real, at least float32
    D (*shared, H) or None, of their real dtype: the direct path, y_t += D u_t
    lengths (*batch) int64, 0 ... L; reset (*batch, L) bool

``reverse`` runs from the last sample to the first, without lengths.
``shared`` is a leading part of ``batch`` (what a vmap over parameters adds). kept (*batch,
chunks H M) holds (chunks, H, M): the state before every chunk of `chunk_length` steps, the last
state where the row has ended. Every backend keeps those, so that one's backward may follow another
one's forward.

With Q samples in a chunk, S the state before it and j, i < Q,

    y_j = Re sum_n v a^(j+1) S + sum_{i <= j} K_{j-i} u_i,   K_d = Re sum_n v a^d
    S'  = a^Q S + sum_i a^(Q-1-i) u_i

are products with small matrices that all chunks of a channel share. In the chunk in which a row
ends, after r samples, zeros follow: its outputs are right as they are, and the last state is S'
with a^r for a^Q of its samples moved to the chunk's end. An input that is not finite
spoils the chunk that it stands in from its first sample on. With ``reset`` no matrix is shared:
chunks run one after the other then, by `linear_scan`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers in the tables of a tile of channels, and in the states of a chunk.
TILE = {"cpu": 1 << 20}
TILE_ELSEWHERE = 1 << 24


def chunk_length(states: int) -> int:
    """Return the samples between two kept states: what is kept is no more than u holds."""
    return 64 * max(1, -(-states // 32))


def s4d_scan(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    keep: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: y (*batch, L, H), the last state (*batch, H, M), and the kept ones."""
    if reverse:
        reset = None if reset is None else reset.flip(-1)
        y, last, kept = s4d_scan(u.flip(-2), a, v, D, lengths, reset, keep)
        return y.flip(-2), last, kept
    p = _Problem(u, a, lengths)
    x, flags = p.cut(u), None if reset is None else p.cut(reset)
    y = torch.zeros_like(x)
    last = a.new_zeros(p.G, p.R, p.H, p.M)
    kept = a.new_zeros(p.G, p.R, p.chunks if keep else 0, p.H, p.M)
    a, v = (t.reshape(p.G, p.H, p.M) for t in (a, v))
    for h in p.tiles(flags is not None):
        run = _products if flags is None else _states
        starts = kept[..., h, :] if keep else None
        run(p, x[..., h], a[:, h], v[:, h], flags, y[..., h], last[..., h, :], starts)
    ended = p.ended()
    if ended is not None and keep:
        kept = torch.where(ended[..., None, None], last.unsqueeze(2), kept)
    batch = u.shape[:-2]
    return (
        with_direct(p.restored(y, u), D, u, lengths),
        last.reshape(*batch, p.H, p.M),
        kept.reshape(*batch, kept.shape[2] * p.H * p.M),
    )


def s4d_scan_backward(
    kept: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf: the gradients of u, a, v, and D (empty where absent)."""
    if reverse:
        reset = None if reset is None else reset.flip(-1)
        du, da, dv, dD = s4d_scan_backward(
            kept, grad_y.flip(-2), grad_last, u.flip(-2), a, v, D, lengths, reset
        )
        return du.flip(-2), da, dv, dD
    p = _Problem(u, a, lengths)
    x, g = p.cut(u), p.cut(grad_y)
    flags = None if reset is None else p.cut(reset)
    starts = kept.reshape(p.G, p.R, p.chunks, p.H, p.M)
    end = grad_last.reshape(p.G, p.R, p.H, p.M)
    du = torch.zeros_like(x)
    da, dv = (a.new_zeros(p.G, p.H, p.M) for _ in range(2))
    shape = a.shape
    a, v = (t.reshape(p.G, p.H, p.M) for t in (a, v))
    for h in p.tiles(flags is not None):
        run = _products_backward if flags is None else _states_backward
        da[:, h], dv[:, h] = run(
            p, x[..., h], g[..., h], a[:, h], v[:, h], flags, starts[..., h, :], end[..., h, :],
            du[..., h],
        )  # fmt: skip
    du, dD = direct_gradients(p.restored(du, u), grad_y, u, D, lengths)
    return du, da.reshape(shape), dv.reshape(shape), dD


def with_direct(y: Tensor, D: Tensor | None, u: Tensor, lengths: Tensor | None) -> Tensor:
    """Return y + D u, D u being zero beyond the lengths, rounded to y's dtype once."""
    if D is None:
        return y
    x, wide = u.to(D.dtype), y.to(D.dtype)
    if lengths is None:
        return torch.addcmul(wide, _beside(D, u), x).to(y.dtype)
    return (wide + (_beside(D, u) * x).masked_fill_(_beyond(u, lengths), 0)).to(y.dtype)


def direct_gradients(
    du: Tensor, grad_y: Tensor, u: Tensor, D: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return du with that of the direct path, and dD, empty where D is absent."""
    if D is None:
        return du, u.new_empty(0)
    g = grad_y.to(D.dtype)
    products = g * u.to(D.dtype)
    if lengths is not None:
        products.masked_fill_(_beyond(u, lengths), 0)
    dD = products.sum(tuple(range(D.ndim - 1, u.ndim - 1)))
    return torch.addcmul(du.to(D.dtype), _beside(D, u), g).to(du.dtype), dD


def _beyond(u: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(u.shape[-2], device=u.device) >= lengths.unsqueeze(-1)).unsqueeze(-1)


def _beside(D: Tensor, u: Tensor) -> Tensor:
    """View (*shared, H) as (*shared, 1, ..., 1, H), of as many axes as u."""
    return D.reshape(*D.shape[:-1], *(1,) * (u.ndim - D.ndim), D.shape[-1])


class _Problem:
    """Sizes, and where the samples of a row stand: sequences are (G, R, chunks, Q, H) here."""

    def __init__(self, u: Tensor, a: Tensor, lengths: Tensor | None) -> None:
        *batch, self.L, self.H = u.shape
        self.M = a.shape[-1]
        self.G = math.prod(a.shape[:-2])
        self.R = math.prod(batch[a.ndim - 2 :])
        self.Q = min(self.L, chunk_length(self.M))
        self.chunks = -(-self.L // max(1, self.Q))
        self.state = a.real.dtype if a.is_complex() else a.dtype
        self.device = u.device
        self.beyond = None if lengths is None else _beyond(u, lengths).view(self.G, self.R, self.L)
        if lengths is None:
            ends = torch.full((1, 1), self.L, device=u.device)
        else:
            ends = lengths.reshape(self.G, self.R)
        self.final = (ends - 1).clamp(min=0) // max(1, self.Q)
        """The chunk in which a row ends (G, R), or (1, 1) where all end alike."""
        self.count = ends - self.final * self.Q
        """Samples of that chunk, 0 in an empty row."""

    def cut(self, x: Tensor) -> Tensor:
        """View (*batch, L, [H]) as chunks; zeros where a row has ended. Flags stay flags."""
        tail = x.shape[-1:] if x.is_floating_point() else x.shape[:0]
        x = x.reshape(self.G, self.R, self.L, *tail)
        x = self._within(x.to(self.state) if tail else x)
        missing = self.chunks * self.Q - self.L
        x = torch.constant_pad_nd(x, (0, 0) * len(tail) + (0, missing)) if missing else x
        return x.unflatten(2, (self.chunks, self.Q)) if self.chunks else x.unsqueeze(2)

    def restored(self, y: Tensor, like: Tensor) -> Tensor:
        """Undo `cut`, as a new tensor."""
        y = self._within(y.flatten(2, 3)[:, :, : self.L]).reshape(like.shape)
        return y.to(like.dtype, copy=y.dtype == like.dtype)

    def _within(self, x: Tensor) -> Tensor:
        if self.beyond is None:
            return x
        return x.masked_fill(self.beyond if x.ndim == 3 else self.beyond.unsqueeze(-1), 0)

    def ended(self) -> Tensor | None:
        """Return which chunks begin where their row has ended (G, R, chunks); None if no one."""
        if self.beyond is None:
            return None
        return torch.arange(self.chunks, device=self.final.device) > self.final.unsqueeze(-1)

    def of_final(self, x: Tensor) -> Tensor:
        """Select each row's last chunk: (G, h, R, chunks, n) -> (G, h, R, n)."""
        if self.beyond is None:
            return x.select(3, -1)
        index = self.final[:, None, :, None, None].expand(*x.shape[:3], 1, x.shape[-1])
        return x.gather(3, index).squeeze(3)

    def to_final(self, x: Tensor, value: Tensor) -> None:
        """Add value (G, h, R, n) to each row's last chunk of x (G, h, R, chunks, n)."""
        if self.beyond is None:
            x.select(3, -1).add_(value)
            return
        here = torch.arange(self.chunks, device=x.device) == self.final.unsqueeze(-1)
        x.add_(value.unsqueeze(3).masked_fill(~here[:, None, :, :, None], 0))

    def moved(self, x: Tensor, back: bool) -> Tensor:
        """Move the samples of a last chunk, x (G, h, R, Q), to its end, or ``back``."""
        t = torch.arange(self.Q, device=x.device)
        shift = (self.Q - self.count).unsqueeze(-1)
        source = t + shift if back else t - shift
        found = (source >= 0) & (source < self.Q)
        index = source.clamp_(0, self.Q - 1).unsqueeze(1).expand(x.shape)
        return x.gather(3, index).masked_fill_(~found.unsqueeze(1), 0)

    def tiles(self, states: bool) -> Iterator[slice]:
        """Yield channels whose tables, or whose states of one chunk, are of about `TILE` numbers.

        None where there is nothing to compute.
        """
        rows = self.R * self.M if states else self.Q + 4 * self.M
        each = self.G * self.Q * rows
        if not (each and self.M and self.R):
            return
        size = max(1, TILE.get(self.device.type, TILE_ELSEWHERE) // each)
        for h in range(0, self.H, size):
            yield slice(h, h + size)


# ------------------------------------------------------------ products with shared matrices


class _Tables(NamedTuple):
    """Powers of the decays a (P, M), P = G times the channels of a tile."""

    powers: Tensor  # (P, Q, M), a^0 ... a^(Q-1)
    over: Tensor  # (P, M), a^Q
    into: Tensor  # (P, Q, M), a^(Q-1) ... a^0
    read: Tensor  # (P, Q, M), v a^(j+1)
    matrix: Tensor  # (P, Q, Q), [j, i] = K_{j-i}, 0 where i > j


def _tables(a: Tensor, v: Tensor, count: int) -> _Tables:
    a, v = a.reshape(-1, 1, a.shape[-1]), v.reshape(-1, 1, v.shape[-1])
    # repeated squares lose a digit or two over a chunk; that of a few in float64 costs nothing
    square = a.to(torch.complex128 if a.is_complex() else torch.float64)
    powers, over, left = torch.ones_like(a), torch.ones_like(square), count
    while left:
        if left & 1:
            over = over * square
        left >>= 1
        if powers.shape[1] < count:
            powers = torch.cat([powers, powers * square.to(a.dtype)], dim=1)
        square = square * square
    powers = powers[:, :count]
    kernel = (powers * v).sum(-1)
    kernel = kernel.real if kernel.is_complex() else kernel
    t = torch.arange(count, device=a.device)
    lag = t.unsqueeze(-1) - t
    matrix = kernel[:, lag.clamp(min=0)].masked_fill_(lag < 0, 0)
    over = over.squeeze(1).to(a.dtype)
    return _Tables(powers, over, powers.flip(1), powers * (a * v), matrix)


def _products(
    p: _Problem,
    x: Tensor,
    a: Tensor,
    v: Tensor,
    flags: Tensor | None,
    y: Tensor,
    last: Tensor,
    kept: Tensor | None,
) -> None:
    t, xs = _tables(a, v, p.Q), _by_channel(x)
    split = (p.G, -1, p.R, p.chunks)
    ends = _states_of(torch.bmm(xs, _reals(t.into)), a).unflatten(1, (p.R, p.chunks))
    over = t.over.view(-1, 1, 1, p.M).expand(-1, p.R, 1, -1)
    states, _ = torch.ops.lrnnx_core.linear_scan.default(over, ends, None, None, False)
    starts = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], dim=2)
    out = torch.bmm(xs, t.matrix.mT)
    out.baddbmm_(_reals(starts).flatten(1, 2), _reals(torch.conj_physical(t.read)).mT)
    y.copy_(_by_time(out, y))
    final = p.moved(p.of_final(xs.view(*split, p.Q)), back=False).flatten(0, 1)
    final = _states_of(torch.bmm(final, _reals(t.into)), a).view(*split[:3], p.M)
    starts = starts.view(*split, p.M)
    last.copy_((final + _over_count(p, t) * p.of_final(starts)).transpose(1, 2))
    if kept is not None:
        kept.copy_(starts.movedim(1, 3))


def _over_count(p: _Problem, t: _Tables) -> Tensor:
    """Return a^r, r the samples of each row's last chunk: (G, h, R, M), or 1 for R."""
    table = torch.cat([t.powers, t.over.unsqueeze(1)], dim=1).unflatten(0, (p.G, -1))
    count = p.count.expand(p.G, -1)[:, None, :, None]
    return table.gather(2, count.expand(-1, table.shape[1], -1, p.M))


def _products_backward(
    p: _Problem,
    x: Tensor,
    g: Tensor,
    a: Tensor,
    v: Tensor,
    flags: Tensor | None,
    kept: Tensor,
    grad_last: Tensor,
    du: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write du and return (da, dv), each (G, h, M).

    The adjoint runs over chunks: with q the conjugate cotangent of the state after a chunk, that of
    the state before it is a^Q q + sum_j g_j v a^(j+1), and a^r of the last state's more before the
    last chunk. The parameters' gradients are those of the matrices, which are sums of powers a^m,
    m <= Q, with coefficients to collect.
    """
    t, xs, gs = _tables(a, v, p.Q), _by_channel(x), _by_channel(g)
    split = (p.G, a.shape[1], p.R, p.chunks)
    starts = kept.movedim(3, 1)  # (G, h, R, chunks, M)
    end = torch.conj_physical(grad_last).transpose(1, 2).contiguous()  # (G, h, R, M)
    ends = _reals(end).flatten(0, 1)
    drive = _states_of(torch.bmm(gs, _reals(t.read)), a).view(*split, p.M)
    p.to_final(drive, _over_count(p, t) * end)
    over = t.over.view(-1, 1, 1, p.M).expand(-1, p.R, 1, -1)
    drive = drive.flatten(0, 1)
    q, _ = torch.ops.lrnnx_core.linear_scan.default(over, drive, None, None, True)
    q = torch.cat([q[:, :, 1:], torch.zeros_like(q[:, :, :1])], dim=2)  # after each chunk
    out = torch.bmm(gs, t.matrix)
    behind = _reals(torch.conj_physical(t.into)).mT
    out.baddbmm_(_reals(q).flatten(1, 2), behind)
    final = torch.bmm(ends, behind).view(*split[:3], p.Q)
    p.to_final(out.view(*split, p.Q), p.moved(final, back=True))
    du.copy_(_by_time(out, du))

    by_read = _states_of(torch.bmm(gs.mT, _reals(starts.reshape(*gs.shape[:2], p.M))), a)
    final = p.moved(p.of_final(xs.view(*split, p.Q)), back=False).flatten(0, 1)
    by_power = torch.bmm(xs.mT, _reals(q).flatten(1, 2)).baddbmm_(final.mT, ends)
    by_power = _states_of(by_power, a).flip(1)
    by_over = (q.view(*split, p.M) * starts).sum((2, 3)).flatten(0, 1).unsqueeze(1)
    by_lag = _diagonals(torch.bmm(gs.mT, xs)).unsqueeze(-1)
    m = torch.arange(1, p.Q + 1, device=a.device).unsqueeze(-1)
    counts = (p.count.expand(p.G, p.R).unsqueeze(1) == m).to(p.state)
    by_count = _reals(end * p.of_final(starts)).transpose(1, 2).flatten(2)
    by_count = torch.bmm(counts, by_count).unflatten(-1, (split[1], -1)).transpose(1, 2)
    by_count = _states_of(by_count.reshape(-1, *by_count.shape[2:]), a)
    a, v = a.reshape(-1, 1, p.M), v.reshape(-1, 1, p.M)
    dv = (t.powers * (a * by_read + by_lag)).sum(1)
    # of a^m for m = 1 ... Q, whose derivative is m a^(m-1)
    weights = v * by_read + torch.cat([(by_power + v * by_lag)[:, 1:], by_over], dim=1)
    da = (m.to(p.state) * t.powers * (weights + by_count)).sum(1)
    shape = (p.G, -1, p.M)
    return torch.conj_physical(da).view(shape), torch.conj_physical(dv).view(shape)


def _by_channel(x: Tensor) -> Tensor:
    """(G, R, chunks, Q, h) -> (G h, R chunks, Q)."""
    return x.movedim(-1, 1).flatten(2, 3).flatten(0, 1).contiguous()


def _by_time(out: Tensor, like: Tensor) -> Tensor:
    """Undo `_by_channel`, as a view."""
    G, R, chunks, Q, h = like.shape
    return out.view(G, h, R, chunks, Q).movedim(1, -1)


def _states_of(x: Tensor, a: Tensor) -> Tensor:
    """View (P, n, 2 M) as states (P, n, M) of a's kind."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2))) if a.is_complex() else x


def _reals(x: Tensor) -> Tensor:
    """(..., M) complex -> (..., 2 M) real, a view; real tensors as they are."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def _diagonals(gram: Tensor) -> Tensor:
    """Sum the lower diagonals of (P, Q, Q): (P, Q), at d the sum over [i + d, i]."""
    count = gram.shape[-1]
    # a row longer by one shifts each next row by one
    skewed = torch.constant_pad_nd(gram.mT.flip(1), (0, count)).flatten(1)
    skewed = skewed[:, : count * (2 * count - 1)].unflatten(1, (count, 2 * count - 1))
    return skewed.sum(1)[:, count - 1 :]


# ------------------------------------------------------------ all states of a chunk


def _states(
    p: _Problem,
    x: Tensor,
    a: Tensor,
    v: Tensor,
    flags: Tensor | None,
    y: Tensor,
    last: Tensor,
    kept: Tensor | None,
) -> None:
    weights = _reals(torch.conj_physical(v))[:, None, None]
    state = found = torch.zeros_like(last).flatten(2)
    for c in range(p.chunks):
        if kept is not None:
            kept[:, :, c] = state.view(last.shape)
        h, state = _chunk_states(p, x[:, :, c], a, None if flags is None else flags[:, :, c], state)
        y[:, :, c] = (_reals(h.unflatten(-1, a.shape[1:])) * weights).sum(-1)
        ends, index = _where_rows_end(p, c)
        here = h.gather(2, index.expand(p.G, p.R, 1, h.shape[-1])).squeeze(2)
        found = torch.where(ends, here, found)
    last.copy_(found.view(last.shape))


def _where_rows_end(p: _Problem, c: int) -> tuple[Tensor, Tensor]:
    """Return which rows end in chunk c (G, R, 1), and their last sample there (G, R, 1, 1)."""
    ends = (p.final == c) & (p.count > 0)
    return ends.unsqueeze(-1), (p.count - 1).clamp(min=0)[..., None, None]


def _chunk_states(
    p: _Problem, x: Tensor, a: Tensor, flags: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run over x (G, R, Q, h): all states (G, R, Q, h M) and the last one."""
    drive = x.to(a.dtype).unsqueeze(-1).expand(*x.shape, p.M).flatten(-2)
    decay = a.flatten(1).view(p.G, 1, 1, -1).expand(-1, p.R, -1, -1)
    return torch.ops.lrnnx_core.linear_scan.default(decay, drive, state, flags, False)


def _states_backward(
    p: _Problem,
    x: Tensor,
    g: Tensor,
    a: Tensor,
    v: Tensor,
    flags: Tensor | None,
    kept: Tensor,
    grad_last: Tensor,
    du: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write du and return (da, dv), each (G, h, M)."""
    da, dv = torch.zeros_like(a), torch.zeros_like(v)
    decay = a.flatten(1).view(p.G, 1, 1, -1).expand(-1, p.R, -1, -1)
    weights = torch.conj_physical(v)[:, None, None]
    end = torch.zeros_like(grad_last).flatten(2)
    t = torch.arange(p.Q, device=a.device).view(-1, 1)
    for c in reversed(range(p.chunks)):
        start, here = kept[:, :, c].flatten(2), None if flags is None else flags[:, :, c]
        h, _ = _chunk_states(p, x[:, :, c], a, here, start)
        gc = g[:, :, c].unsqueeze(-1)
        dv += torch.conj_physical((gc * h.unflatten(-1, a.shape[1:])).sum((1, 2)))
        ends, index = _where_rows_end(p, c)
        to_last = (t == index) & ends.unsqueeze(2)
        to_h = (gc * weights).flatten(-2)
        to_h = torch.where(to_last, to_h + grad_last.flatten(2).unsqueeze(2), to_h)
        to_a, adjoint, end = torch.ops.lrnnx_core.linear_scan_backward.default(
            decay, h, start, here, to_h, end, False
        )
        da += to_a.sum((1, 2)).view(a.shape)
        adjoint = adjoint.real if adjoint.is_complex() else adjoint
        du[:, :, c] = adjoint.unflatten(-1, a.shape[1:]).sum(-1)
    return da, dv
