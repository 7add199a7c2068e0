# SPDX-License-Identifier: MIT
"""The state-space dual form of Mamba-2: a scan with one decay a head, as matrix products by chunk.

    h_t = exp(g_t) h_{t-1} + x_t (outer) B_t,    y_t = h_t C_t

with h (P, N) a head and g_t <= 0 the logarithm of the decay. Written in differentiable PyTorch, so
every transform goes through it; the states between chunks go through `linear_scan`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrnnx_core.ops.linear_scan import linear_scan


def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    *,
    reset: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence.

    Args:
        x: (..., L, nh, P), the input times its step; real, at least float32.
        log_decay: (..., L, nh).
        B: (..., L, G, N); head k belongs to group k // (nh/G).
        C: (..., L, G, N).
        h0: (..., nh, P, N), the state before the first step.
        reset: (..., L) bool, clear the state before that step.
        chunk_size: steps Q of a chunk; the cost is about Q (N + P) + 2 N P a step and head.

    Returns:
        y (..., L, nh, P) and the last state (..., nh, P, N).

    Source: Dao & Gu 2024 (Mamba-2), arXiv:2405.21060, section 6 (block decomposition).
    """
    length, heads = x.shape[-3], x.shape[-2]
    if torch.compiler.is_exporting():  # for every length: of one or two chunks it would hold alone
        q, chunks = chunk_size, length // chunk_size + 3
    else:
        q = max(1, min(chunk_size, length))
        chunks = -(-length // q)
    pad = chunks * q - length

    def cut(t: Tensor, tail: int) -> Tensor:
        """(..., L, *tail) -> (..., chunks, Q, *tail); zeros in the slack leave the state alone."""
        t = torch.constant_pad_nd(t, [0, 0] * tail + [0, pad])
        return t.unflatten(t.ndim - tail - 1, (chunks, q))

    per_group = heads // B.shape[-2]
    x = cut(x, 2)
    B, C = (cut(t.repeat_interleave(per_group, -2), 2) for t in (B, C))
    s = cut(log_decay, 1).cumsum(-2)  # (..., c, Q, nh): decay from the chunk's start, inclusive
    total = s[..., -1:, :]
    order = torch.arange(q, device=x.device)
    causal = order[:, None] >= order  # (Q i, Q j)
    opens = closes = None
    if reset is not None:
        segment = cut(reset.to(torch.int32), 0).cumsum(-1)
        same = segment.unsqueeze(-1) == segment.unsqueeze(-2)
        causal = causal & same
        opens = segment == 0  # still sees the state before the chunk
        closes = segment == segment[..., -1:]  # is seen by the state after it
    gap = (s.unsqueeze(-2) - s.unsqueeze(-3)).masked_fill(~causal.unsqueeze(-1), -torch.inf)
    scores = torch.einsum("...ihn,...jhn->...ijh", C, B) * torch.exp(gap)
    y = torch.einsum("...ijh,...jhp->...ihp", scores, x)

    out_weight = torch.exp(total - s)
    in_weight, decay = torch.exp(s), torch.exp(total.squeeze(-2))
    if opens is not None and closes is not None:
        out_weight = out_weight * closes.unsqueeze(-1)
        in_weight = in_weight * opens.unsqueeze(-1)
        decay = decay * opens[..., -1:]
    # in pairs: the order that einsum looks for would bind what torch.export traces to a length
    made = torch.einsum("...jhp,...jhn->...hpn", out_weight.unsqueeze(-1) * x, B)
    a = decay[..., None, None].expand(made.shape).flatten(-3)
    h, last = linear_scan(a, made.flatten(-3), h0.flatten(-3))
    before = torch.cat([h0.flatten(-3).unsqueeze(-2), h[..., :-1, :]], dim=-2)[..., :chunks, :]
    before = before.unflatten(-1, made.shape[-3:])
    y = y + in_weight.unsqueeze(-1) * torch.einsum("...ihn,...hpn->...ihp", C, before)
    y = y.flatten(-4, -3).narrow(-3, 0, length)
    return y, last.unflatten(-1, h0.shape[-3:])
