# SPDX-License-Identifier: MIT
"""The softmax of attention over what each sample may see, and the rotation of queries and keys.

Sequences are (B, L, heads, head_dim) here. Query head i reads from key head i // (n_heads /
n_kv_heads).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_core.backends.transforms import dual_level_active, transform_active
from lrnnx_nn.kv_cache import AttentionRing, Cache, Place, in_order


class Softmax(NamedTuple):
    """How it is computed.

    Attributes:
        dropout: probability that a weight is dropped.
        fused: call ``scaled_dot_product_attention`` where it has the derivatives; else the softmax
            is written out.
    """

    dropout: float
    fused: bool


# --------------------------------------------------------------------------------- who sees whom


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at: Place,
    old: Cache | None,
    window: int | None,
    softmax: Softmax,
) -> Tensor:
    """Attend from a chunk to itself and to what a state holds; return (B, L, n_heads, head_dim).

    A ring acts as a window of its size, which is exact while its documents fit.
    """
    length = q.shape[1]
    if isinstance(old, AttentionRing):
        window = min(old.k.shape[1], window or old.k.shape[1])
    elif old is not None and not old.k.shape[1]:
        old = None
    if old is None and at.document is None and (window is None or length <= window):
        return attend(q, k, v, None, softmax)
    if window is not None and length > 2 * window:
        return _attend_in_blocks(q, k, v, at, old, window, softmax)
    seen, document = at.position, at.document
    if old is not None:
        k, v = torch.cat([old.k, k], 1), torch.cat([old.v, v], 1)
        seen = torch.cat([old.position, seen.expand(len(q), -1)], 1)
        if document is not None:
            document = torch.cat([_continued(document, old), document], 1)
    return attend(q, k, v, _visible(at.position, seen, at.document, document, window), softmax)


def _attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at: Place,
    old: Cache | None,
    window: int,
    softmax: Softmax,
) -> Tensor:
    """Attend in blocks of a window's length, each to itself and the block in front of it."""
    rows, length = q.shape[:2]
    blocks = -(-length // window)
    rest = blocks * window - length

    def pairs(x: Tensor, front: Tensor | None, fill: int) -> Tensor:
        """Cut x (b, L, ...) into blocks, each behind the one before: (B blocks, 2 window, ...)."""
        parts = [x] if front is None else [front, x]
        ahead = window - (0 if front is None else front.shape[1])
        edges = [x.new_full((len(x), n, *x.shape[2:]), fill) for n in (ahead, rest)]
        x = torch.cat([edges[0], *parts, edges[1]], 1).unflatten(1, (blocks + 1, window))
        x = torch.cat([x[:, :-1], x[:, 1:]], 2)
        return x.expand(rows, *x.shape[1:]).flatten(0, 1)

    before = (None, None, None) if old is None else in_order(old)
    position = at.position if old is None else at.position.expand(rows, -1)
    seen, document = pairs(position, before[2], -1), at.document
    if document is not None:
        document = pairs(document, None if old is None else _continued(document, old), 0)
    own = None if document is None else document[:, window:]
    visible = _visible(seen[:, window:], seen, own, document, window)
    queries = F.pad(q, (0, 0, 0, 0, 0, rest)).unflatten(1, (blocks, window)).flatten(0, 1)
    y = attend(queries, pairs(k, before[0], 0), pairs(v, before[1], 0), visible, softmax)
    return y.unflatten(0, (rows, blocks)).flatten(1, 2)[:, :length]


def _continued(document: Tensor, old: Cache) -> Tensor:
    """Return the document of a state's slots: that which the chunk's document 0 continues."""
    return document.new_zeros(len(document), old.k.shape[1])


def _visible(
    position: Tensor, seen: Tensor, document: Tensor | None, of: Tensor | None, window: int | None
) -> Tensor:
    """Return (b, L, S) bool, which keys each query sees; padded queries see all, to see any.

    Args:
        position: (b, L), of queries; -1 is padding.
        seen: (b, S), of keys; -1 is nothing.
        document: (b, L), of queries, or None for one document.
        of: (b, S), of keys.
        window: samples that a query sees, itself included.
    """
    here, there = position.unsqueeze(-1), seen.unsqueeze(-2)
    visible = (there <= here) & (there >= 0)
    if window is not None:
        visible = visible & (there > here - window)
    if document is not None and of is not None:
        visible = visible & (document.unsqueeze(-1) == of.unsqueeze(-2))
    return visible | (here < 0)


# ------------------------------------------------------------------------------------ the softmax


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, softmax: Softmax) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q: (B, L, n_heads, head_dim).
        k: (B, S, n_kv_heads, head_dim), of q's dtype or a wider one.
        v: as k.
        visible: (B or 1, L, S) bool, some key for every query; None for causal attention, S = L.
        softmax: see `Softmax`.
    """
    rows, length, n_heads, head_dim = q.shape
    if not rows or not length:
        return q
    if not softmax.fused or _transformed():
        return _written_out(q, k, v, visible, softmax.dropout)
    n_kv_heads = k.shape[2]
    group = n_heads // n_kv_heads
    mask = None if visible is None else visible.unsqueeze(1)
    k, v = k.transpose(1, 2).to(q.dtype), v.transpose(1, 2).to(q.dtype)
    if length == 1:  # a group's queries as if they were samples: keys need no copies
        q = q.reshape(rows, n_kv_heads, group, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=softmax.dropout)
        return y.reshape(rows, 1, n_heads, head_dim)
    # On a GPU in float32, and mostly with a mask, grouped heads end in a kernel that stores all
    # scores (H100, B 4, 16 heads, L 2048: 2.4 GiB and 5.3 ms in place of 0.1 GiB and 1.2 ms).
    wide = q.device.type != "cpu" and q.dtype not in (torch.float16, torch.bfloat16)
    grouped = group > 1 and mask is None and not wide
    if group > 1 and not grouped:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, mask, dropout_p=softmax.dropout, is_causal=mask is None,
        enable_gqa=grouped,
    )  # fmt: skip
    return y.transpose(1, 2)


def _written_out(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, p: float) -> Tensor:
    """Return what `attend` does, in plain operations and at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, head_dim = k.shape[2:]
    grouped = q.to(wide).unflatten(2, (heads, -1))
    scores = torch.einsum("blgid,bsgd->bgils", grouped, k.to(wide)) / math.sqrt(head_dim)
    if visible is None:
        index = torch.arange(q.shape[1], device=q.device)
        visible = (index <= index.unsqueeze(-1)).unsqueeze(0)
    scores = torch.where(visible[:, None, None], scores, -math.inf)
    weights = F.dropout(torch.softmax(scores, -1), p)
    return torch.einsum("bgils,bsgd->blgid", weights, v.to(wide)).flatten(2, 3).to(q.dtype)


def _transformed() -> bool:
    """Return whether derivatives may be asked for that fused attention does not have."""
    if torch.compiler.is_compiling():
        return False
    return transform_active() or dual_level_active()


# ----------------------------------------------------------------------------------- the rotation


def angles(position: Tensor, size: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (b, L, 1, size/2) at positions (b, L), at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    rates = torch.logspace(
        0, (2 - size) / size, size // 2, base=base, device=position.device, dtype=wide
    )
    turned = (position.to(wide).unsqueeze(-1) * rates).unsqueeze(-2)
    return turned.cos(), turned.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first channels of x (B, L, heads, head_dim), in pairs half of them apart."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest.to(cos.dtype)], -1)
