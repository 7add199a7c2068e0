# SPDX-License-Identifier: MIT
"""A recurrence with a full, constant, real state matrix for each channel, by blocks of time.

    x_t = A x_{t-1} + b u_t,    y_t = C x_t

Inside a block of Q samples the output is a Toeplitz product with the first Q taps of the kernel and
the state that a block leaves a product with the Krylov vectors A^j b; from block to block the state
takes one step with A^Q. Everything is a batched real matrix product, and nothing of size L N is
kept but the states between blocks. Powers of A are repeated squares, made in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.sequences import align_right

BLOCK = 64


class Krylov(NamedTuple):
    """Powers of A (H, N, N) for blocks of Q samples.

    vectors (H, N, Q): b, A b ... A^(Q-1) b; squares A, A^2, A^4 ... A^(Q/2); steps A^Q, A^2Q ...
    """

    vectors: Tensor
    squares: list[Tensor]
    steps: list[Tensor]

    @property
    def size(self) -> int:
        """The number Q of samples in a block, a power of two."""
        return self.vectors.shape[-1]


def krylov(
    A: Tensor, b: Tensor, length: int, rows: int = 1, dtype: torch.dtype | None = None
) -> Krylov:
    """Tabulate what `scan` needs, in the dtype of A (H, N, N) and b (H, N), and convert it.

    ``rows`` is how many sequences run at once: with many columns a square of A^Q pays for itself.
    """
    size = min(BLOCK, _ceil_power(length))
    vectors, squares = _vectors(A, b.unsqueeze(-1), size)
    steps, columns = squares[-1:], rows * (length // size)
    while columns > 2 * A.shape[-1] and len(steps) < 6:
        steps.append(steps[-1] @ steps[-1])
        columns //= 2
    kind = A.dtype if dtype is None else dtype
    made = ([t.to(kind) for t in group] for group in (squares[:-1], steps))
    return Krylov(vectors.squeeze(-1).to(kind), *made)


def _ceil_power(length: int) -> int:
    """Return the smallest power of two >= length."""
    return 1 << max(length - 1, 0).bit_length()


def _vectors(A: Tensor, b: Tensor, size: int) -> tuple[Tensor, list[Tensor]]:
    """Return b, A b ... A^(size-1) b as (H, N, size, B), and A, A^2, A^4 ... A^size, by doubling.

    A (H, N, N), b (H, N, B).
    """
    vectors, squares = b.unsqueeze(-2), [A]
    while vectors.shape[-2] < size:
        vectors = torch.cat([vectors, _apply(squares[-1], vectors)], dim=-2)
        squares.append(squares[-1] @ squares[-1])
    return vectors, squares


def rows(C: Tensor, table: Krylov) -> Tensor:
    """Return C A, C A^2 ... C A^Q: (H, Ch, N) -> (H, Ch, Q, N)."""
    found = (C @ (table.squares or table.steps)[0]).unsqueeze(-2)
    for square in table.squares:
        found = torch.cat([found, found @ square.unsqueeze(-3)], dim=-2)
    return found


def power(squares: list[Tensor], exponent: int, x: Tensor) -> Tensor:
    """Return A^exponent x for x (H, N, B), from squares up to A^(exponent's highest bit)."""
    for bit, square in enumerate(squares):
        if exponent >> bit & 1:
            x = square @ x
    return x


def powers(squares: list[Tensor], exponents: Tensor, x: Tensor) -> Tensor:
    """Return A^exponents[b] x[..., b] for x (H, N, B), exponents (B,)."""
    for bit, square in enumerate(squares):
        x = torch.where((exponents >> bit) % 2 == 1, square @ x, x)
    return x


def kernel(C: Tensor, A: Tensor, b: Tensor, length: int) -> Tensor:
    """Return C A^t b for t = 0 ... length - 1: C (H, Ch, N), b (H, N, B) -> (H, Ch, length, B).

    t = Q i + j splits it into (C A^(Q i)) (A^j b), two tables near the square root of the length.
    """
    size = _ceil_power(math.isqrt(length))
    vectors, squares = _vectors(A, b, size)
    coarse, square = C.unsqueeze(-2), squares[-1]  # (H, Ch, 1, N)
    while coarse.shape[-2] * size < length:
        coarse = torch.cat([coarse, coarse @ square.unsqueeze(-3)], dim=-2)
        if coarse.shape[-2] * size < length:
            square = square @ square
    K = coarse @ vectors.flatten(-2).unsqueeze(-3)  # (H, Ch, coarse, Q B)
    return K.unflatten(-1, vectors.shape[-2:]).flatten(-3, -2)[..., :length, :]


def scan(
    table: Krylov,
    C: Tensor,
    u: Tensor,
    x0: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence.

    Args:
        table: from `krylov`.
        C: (H, Ch, N).
        u: (..., L, H), L >= 1.
        x0: (..., H, N), the state before the first sample.
        lengths: (...), where to take the final state; L if None.

    Returns:
        y (..., L, Ch, H) and the final state (..., H, N).
    """
    batch, (length, width) = u.shape[:-2], u.shape[-2:]
    blocks, U = _blocked(u, table.size)
    taps = C @ table.vectors  # (H, Ch, Q)
    both = torch.cat([toeplitz(taps).flatten(-3, -2), table.vectors.flip(-1)], dim=-2)
    response = both @ U  # (H, Ch Q + N, blocks B)
    count = C.shape[-2] * table.size
    before = _between(table.steps, response[:, count:].unflatten(-1, (blocks, -1)), columns(x0))
    observed = rows(C, table).flatten(-3, -2) @ before[..., :-1, :].flatten(-2)
    y = (response[:, :count] + observed).reshape(
        width, C.shape[-2], table.size, blocks, batch.numel()
    )
    y = y.permute(4, 3, 2, 1, 0).flatten(1, 2)[:, :length]
    return y.reshape(*batch, length, C.shape[-2], width), _final(table, before, u, lengths)


def final_state(table: Krylov, u: Tensor, x0: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the final state of `scan` alone."""
    blocks, U = _blocked(u, table.size)
    left = (table.vectors.flip(-1) @ U).unflatten(-1, (blocks, -1))
    return _final(table, _between(table.steps, left, columns(x0)), u, lengths)


def columns(x: Tensor) -> Tensor:
    """(..., H, N) -> (H, N, B)."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:]).permute(1, 2, 0)


def _blocked(u: Tensor, size: int) -> tuple[int, Tensor]:
    """(..., L, H) -> the number of blocks, and (H, Q, blocks B), padded with zeros."""
    length, width = u.shape[-2:]
    blocks = -(-length // size)
    u = u.reshape(u.shape[:-2].numel(), length, width)
    u = torch.constant_pad_nd(u, (0, 0, 0, blocks * size - length))
    return blocks, u.unflatten(-2, (blocks, size)).permute(3, 2, 1, 0).flatten(-2)


def _between(squares: list[Tensor], inputs: Tensor, x0: Tensor) -> Tensor:
    """Return the states before every block and after the last: (H, N, blocks + 1, B).

    ``squares`` are A^Q, A^2Q ...; each after the first halves the number of sequential steps.
    """
    step, blocks = squares[0], inputs.shape[-2]
    if len(squares) == 1 or blocks < 2:
        states = [x0]
        for block in inputs.unbind(-2):
            states.append(block + step @ states[-1])
        return torch.stack(states, dim=-2)
    pairs = blocks // 2
    first, second = inputs[..., : 2 * pairs : 2, :], inputs[..., 1 : 2 * pairs : 2, :]
    outer = _between(squares[1:], second + _apply(step, first), x0)
    inner = first + _apply(step, outer[..., :pairs, :])
    parts = [torch.stack([outer[..., :pairs, :], inner], dim=-2).flatten(-3, -2)]
    parts.append(outer[..., pairs:, :])
    if blocks % 2:
        parts.append(inputs[..., -1:, :] + _apply(step, outer[..., pairs:, :]))
    return torch.cat(parts, dim=-2)


def _apply(A: Tensor, x: Tensor) -> Tensor:
    """(H, N, N), (H, N, blocks, B) -> (H, N, blocks, B)."""
    return (A @ x.flatten(-2)).unflatten(-1, x.shape[-2:])


def _final(table: Krylov, states: Tensor, u: Tensor, lengths: Tensor | None) -> Tensor:
    batch, (length, width) = u.shape[:-2], u.shape[-2:]
    size, flat = table.size, u.reshape(batch.numel(), length, width)
    if lengths is None:
        blocks, rest = length // size, length % size
        x = states[..., blocks, :]
        if rest:
            late = flat[:, length - rest :].flip(-2).permute(2, 1, 0)  # (H, rest, B)
            x = power(table.squares, rest, x) + table.vectors[..., :rest] @ late
    else:
        n = lengths.reshape(-1)
        block, rest = torch.div(n, size, rounding_mode="floor"), n % size
        index = block.expand(*states.shape[:2], 1, -1)
        x = states.gather(-2, index).squeeze(-2)
        source = block.unsqueeze(-1) * size + torch.arange(size, device=u.device)
        part = flat.gather(-2, source.clamp(max=length - 1).unsqueeze(-1).expand(-1, -1, width))
        late = align_right(part, rest).flip(-2).permute(2, 1, 0)
        x = powers(table.squares, rest, x) + table.vectors @ late
    return x.permute(2, 0, 1).reshape(*batch, width, x.shape[1])


def toeplitz(taps: Tensor) -> Tensor:
    """Return T with T[t, s] = taps[t - s] for s <= t: (..., Q) -> (..., Q, Q)."""
    size = taps.shape[-1]
    # Rows of period 2 Q, cut at 2 Q - 1, move on by one. (An index of differences does the same,
    # and torch.compile fails on it on a GPU, PyTorch 2.11.)
    cyclic = torch.cat([taps, torch.zeros_like(taps)], dim=-1).unsqueeze(-2)
    cyclic = cyclic.expand(*taps.shape, 2 * size).flatten(-2)[..., : size * (2 * size - 1)]
    return cyclic.unflatten(-1, (size, 2 * size - 1))[..., :size].mT
