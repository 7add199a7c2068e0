# SPDX-License-Identifier: MIT
"""The short depthwise convolution in front of Mamba-like recurrences, with its streaming state."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lrnnx_core.backends.reference import state_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    *,
    activation: Literal["none", "silu"] = "none",
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y_t = act(bias + sum_k w_k x_{t-K+1+k}), each channel with its own taps.

    Args:
        x: (..., L, C), real.
        weight: (C, 1, K), as `torch.nn.Conv1d` stores it: the last tap meets the current sample.
        bias: (C,).
        tail: (..., K - 1, C), the inputs before x, oldest first; zeros if None.
        activation: ``"silu"`` or ``"none"``.
        reset: (..., L) bool; a sample never sees what came before the last reset at or before it.
        lengths: (...), samples per row of a right-padded batch; only the new tail depends on it.

    Returns:
        y (..., L, C) in x's dtype (computed in at least float32), and the tail after x (..., K - 1,
        C), in x's dtype. Any split of a sequence gives the same result, also in pieces shorter than
        K.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown activation, tensors on different
            devices.

    Source: Gu & Dao 2023 (Mamba), arXiv:2312.00752, section 3.4 (the block).
    """
    taps = _check(x, weight, bias, tail, activation)
    _check_layout(x, reset, lengths)
    lengths = None if lengths is None else lengths.expand(x.shape[:-2])
    length, width = x.shape[-2:]
    before = x.new_zeros(*x.shape[:-2], taps - 1, width) if tail is None else tail.to(x.dtype)
    past = torch.cat([before, x], dim=-2)
    w = weight.squeeze(1).to(state_dtype(torch.promote_types(x.dtype, weight.dtype)))
    y = torch.zeros_like(x, dtype=w.dtype) if bias is None else bias.to(w.dtype).expand(x.shape)
    seen = segment = None
    if reset is not None and taps > 1:
        segment = reset.expand(x.shape[:-1]).to(torch.int32).cumsum(-1)
        seen = torch.cat([segment.new_zeros(*segment.shape[:-1], taps - 1), segment], dim=-1)
    for k in range(taps):
        term = past.narrow(-2, k, length).to(w.dtype) * w[:, k]
        if seen is not None and segment is not None:
            same = seen.narrow(-1, k, length) == segment
            term = torch.where(same.unsqueeze(-1), term, torch.zeros_like(term))
        y = y + term
    y = torch.nn.functional.silu(y) if activation == "silu" else y
    if seen is not None:
        # what the last reset hid must not come back with the next piece
        end = seen.shape[-1] - 1 if lengths is None else (lengths + taps - 2).unsqueeze(-1)
        last = seen[..., end:] if isinstance(end, int) else seen.gather(-1, end)
        past = torch.where((seen == last).unsqueeze(-1), past, torch.zeros_like(past))
    if lengths is None:
        # a copy: as a view the state would keep the whole sequence in memory
        return y.to(x.dtype), past.narrow(-2, length, taps - 1).clone()
    index = lengths.unsqueeze(-1) + torch.arange(taps - 1, device=x.device)
    return y.to(x.dtype), past.gather(-2, index.unsqueeze(-1).expand(*index.shape, width))


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: str
) -> int:
    """Raise the errors; return K."""
    if activation not in ("none", "silu"):
        raise ValueError(f"causal_conv1d: activation {activation!r}, expected 'none' or 'silu'")
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"causal_conv1d: x {tuple(x.shape)} {x.dtype}, expected real (..., L, C)")
    width = x.shape[-1]
    if weight.ndim != 3 or weight.shape[:2] != (width, 1) or weight.shape[2] < 1:
        raise ValueError(
            f"causal_conv1d: weight {tuple(weight.shape)}, expected ({width}, 1, K) for "
            f"x {tuple(x.shape)}"
        )
    taps = weight.shape[2]
    shapes = {"bias": (bias, (width,)), "tail": (tail, (*x.shape[:-2], taps - 1, width))}
    for name, (value, shape) in shapes.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"causal_conv1d: {name} {tuple(value.shape)}, expected {shape}")
    for name, value in {"weight": weight, "bias": bias, "tail": tail}.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {value.device} and x on {x.device}")
    return taps


def _check_layout(x: Tensor, reset: Tensor | None, lengths: Tensor | None) -> None:
    """Raise unless reset and lengths broadcast to x's samples and rows, on its device."""
    given = {"reset": (reset, x.shape[:-1]), "lengths": (lengths, x.shape[:-2])}
    for name, (value, shape) in given.items():
        if value is None:
            continue
        pairs = zip(reversed(value.shape), reversed(shape), strict=False)
        if value.ndim > len(shape) or any(have not in (1, want) for have, want in pairs):
            raise ValueError(
                f"causal_conv1d: {name} {tuple(value.shape)}, expected {tuple(shape)} or what "
                "broadcasts to it"
            )
        counts = not value.is_floating_point() and value.dtype != torch.bool
        if not (value.dtype == torch.bool if name == "reset" else counts):
            raise ValueError(f"causal_conv1d: {name} has dtype {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {value.device} and x on {x.device}")
