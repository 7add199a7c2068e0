# SPDX-License-Identifier: MIT
"""`_dense_blocks` where the state is cleared before some samples: documents packed end to end.

Inside a block the product with the Toeplitz matrix leaves out what stands in another document than
the sample that is read, so that it is no longer one matrix for all rows; blocks are shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrnnx_core.models import _dense_blocks
from lrnnx_core.models._dense_blocks import Krylov, columns, powers, toeplitz
from lrnnx_core.sequences import align_right

BLOCK = 16


def krylov(A: Tensor, b: Tensor, length: int, dtype: torch.dtype) -> Krylov:
    """Tabulate what `scan` needs; see `_dense_blocks.krylov`."""
    return _dense_blocks.krylov(A, b, min(length, BLOCK), dtype=dtype)


def scan(
    table: Krylov, C: Tensor, u: Tensor, x0: Tensor, lengths: Tensor | None, reset: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the recurrence.

    Args:
        table: from `krylov`.
        C: (H, Ch, N).
        u: (..., L, H), L >= 1.
        x0: (..., H, N), the state before the first sample.
        lengths: (...), where to take the final state; L if None.
        reset: (..., L) bool, clear the state before that sample.

    Returns:
        y (..., L, Ch, H) and the final state (..., H, N).
    """
    batch, (length, width), size = u.shape[:-2], u.shape[-2:], table.size
    rows, pad = batch.numel(), -length % size
    u_rows = torch.constant_pad_nd(u.reshape(rows, length, width), (0, 0, 0, pad))
    flags = torch.constant_pad_nd(reset.expand(*batch, length).reshape(rows, length), (0, pad))
    T = toeplitz(C @ table.vectors).permute(2, 3, 1, 0)  # (t, s, Ch, H)
    observe = _dense_blocks.rows(C, table).flatten(-3, -2)  # (H, Ch Q, N)
    x, before, outputs = columns(x0), [columns(x0)], list[Tensor]()
    for v, f in zip(u_rows.split(size, -2), flags.split(size, -1), strict=True):
        document = f.cumsum(-1)  # (B, Q): 0 until the first reset
        own = document.unsqueeze(-1) == document.unsqueeze(-2)
        visible = torch.where(own.unsqueeze(-1), v.unsqueeze(-3), torch.zeros_like(v[:, :1, None]))
        y = (visible.unsqueeze(-2) * T).sum(-3)  # (B, Q, Ch, H)
        seen = (observe @ x).unflatten(-2, (C.shape[-2], size)).permute(3, 2, 1, 0)
        running = (document == 0)[..., None, None]
        outputs.append(y + torch.where(running, seen, torch.zeros_like(seen)))
        x = _advance(table, v, document, x, None)
        before.append(x)
    y = torch.cat(outputs, dim=1)[:, :length].reshape(*batch, length, C.shape[-2], width)
    n = torch.full((rows,), length, device=u.device) if lengths is None else lengths.reshape(rows)
    block, rest = torch.div(n, size, rounding_mode="floor"), n % size
    source = block.unsqueeze(-1) * size + torch.arange(size, device=u.device)
    source = source.clamp(max=u_rows.shape[-2] - 1)
    v = u_rows.gather(-2, source.unsqueeze(-1).expand(-1, -1, width))
    document = flags.gather(-1, source).cumsum(-1)
    start = torch.stack(before, dim=-1)  # (H, N, B, blocks + 1)
    start = start.gather(-1, block.expand(*start.shape[:2], -1).unsqueeze(-1)).squeeze(-1)
    last = _advance(table, v, document, start, rest)
    return y, last.permute(2, 0, 1).reshape(*batch, width, last.shape[1])


def _advance(table: Krylov, v: Tensor, document: Tensor, x: Tensor, count: Tensor | None) -> Tensor:
    """Return the state x (H, N, B) after the first ``count`` (B,) samples of a block, or all."""
    if count is None:
        at_end, moved = document[:, -1:], table.steps[0] @ x
    else:
        # document 0 before the first sample
        earlier = torch.constant_pad_nd(document, (1, 0)).gather(-1, count.unsqueeze(-1))
        at_end, moved = earlier, powers(table.squares, count, x)
    kept = torch.where((document == at_end).unsqueeze(-1), v, torch.zeros_like(v))
    late = kept if count is None else align_right(kept, count)
    left = table.vectors @ late.flip(-2).permute(2, 1, 0)
    return left + torch.where(at_end.squeeze(-1) == 0, moved, torch.zeros_like(moved))
