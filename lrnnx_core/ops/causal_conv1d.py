# SPDX-License-Identifier: MIT
"""The short depthwise convolution in front of Mamba-like recurrences, with its streaming state.

Built like `selective_scan`: one forward and one backward leaf hold the values and the first
derivatives, and where more is asked for a composite of differentiable pieces runs instead.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_conv1d, cpu, cuda_conv1d, library
from lrnnx_core.backends.reference import state_dtype
from lrnnx_core.backends.transforms import (
    allow_in_graph,
    differentiation_depth,
    dual_level_active,
    forward_mode_depth,
    positional_only,
)


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
    tail = None if tail is None else tail.to(x.dtype)
    reset = None if reset is None or taps == 1 else reset.expand(x.shape[:-1])
    y, last = _causal_conv1d(x, weight, bias, tail, reset, activation == "silu")
    if lengths is None or taps == 1:
        return y, last
    return y, _tail_at(lengths.expand(x.shape[:-2]), x, tail, reset, taps)


def _tail_at(
    lengths: Tensor, x: Tensor, tail: Tensor | None, reset: Tensor | None, taps: int
) -> Tensor:
    """Return the tail (..., K - 1, C) after the first ``lengths`` samples of every row."""
    length, width = x.shape[-2:]
    # position 0 is the oldest sample of the tail before x, K - 1 the first one of x
    index = lengths.unsqueeze(-1) + torch.arange(taps - 1, device=x.device)
    earlier = (index < taps - 1).unsqueeze(-1)

    def pick(source: Tensor, position: Tensor) -> Tensor:
        position = position.clamp(0, source.shape[-2] - 1).unsqueeze(-1)
        return source.gather(-2, position.expand(*index.shape, width))

    zeros = x.new_zeros(*index.shape, width)
    found = zeros if length == 0 else pick(x, index - (taps - 1))
    found = torch.where(earlier, zeros if tail is None else pick(tail, index), found)
    if reset is None or length == 0:
        return found
    # what the last reset hid must not come back with the next piece
    segment = torch.nn.functional.pad(reset.to(torch.int32).cumsum(-1), (taps - 1, 0))
    last = segment.gather(-1, (lengths + taps - 2).unsqueeze(-1))
    return torch.where((segment.gather(-1, index) == last).unsqueeze(-1), found, zeros)


def _composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Compose the operator of differentiable pieces: right to any order."""
    taps, (length, width) = weight.shape[-1], x.shape[-2:]
    before = x.new_zeros(*x.shape[:-2], taps - 1, width) if tail is None else tail
    past = torch.cat([before, x], dim=-2)
    w = weight.squeeze(1).to(state_dtype(torch.promote_types(x.dtype, weight.dtype)))
    y = torch.zeros_like(x, dtype=w.dtype) if bias is None else bias.to(w.dtype).expand(x.shape)
    seen = segment = None
    if reset is not None:
        segment = reset.to(torch.int32).cumsum(-1)
        seen = torch.cat([segment.new_zeros(*segment.shape[:-1], taps - 1), segment], dim=-1)
    for k in range(taps):
        term = past.narrow(-2, k, length).to(w.dtype) * w[:, k]
        if seen is not None and segment is not None:
            same = seen.narrow(-1, k, length) == segment
            term = torch.where(same.unsqueeze(-1), term, torch.zeros_like(term))
        y = y + term
    y = torch.nn.functional.silu(y) if silu else y
    if seen is not None:
        past = torch.where((seen == seen[..., -1:]).unsqueeze(-1), past, torch.zeros_like(past))
    # a copy: as a view the state would keep the whole sequence in memory
    return y.to(x.dtype), past.narrow(-2, length, taps - 1).clone()


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    if differentiation_depth() > 1 or forward_mode_depth() or dual_level_active():
        return _composite(x, weight, bias, tail, reset, silu)
    if not torch.is_grad_enabled():
        return _leaf(x, weight, bias, tail, reset, silu)
    return _Convolution.apply(x, weight, bias, tail, reset, silu)


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tail: Tensor | None,
        reset: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        return _leaf(x, weight, bias, tail, reset, silu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, tail, reset = ctx.saved_tensors
        dx, dweight, dbias, dtail = _ConvolutionBackward.apply(
            *grads, x, weight, bias, tail, reset, ctx.silu
        )
        dbias, dtail = None if bias is None else dbias, None if tail is None else dtail
        return dx, dweight, dbias, dtail, None, None


class _ConvolutionBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_y: Tensor,
        grad_last: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tail: Tensor | None,
        reset: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _leaf_backward(grad_y, grad_last, x, weight, bias, tail, reset, silu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, grad_last, *inputs, reset = ctx.saved_tensors
        present = [i for i, t in enumerate(inputs) if t is not None]

        def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            arguments = list(inputs)
            for i, t in zip(present, tensors, strict=True):
                arguments[i] = t
            x, weight, bias, tail = arguments
            return _composite(x, weight, bias, tail, reset, ctx.silu)

        def gradient(grad_y: Tensor, grad_last: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(forward, *tensors)[1]((grad_y, grad_last))

        pull = torch.func.vjp(gradient, grad_y, grad_last, *(inputs[i] for i in present))[1]
        g_y, g_last, *g_inputs = pull(tuple(grads[i] for i in present))
        result: list[Tensor | None] = [g_y, g_last, *(None,) * (len(inputs) + 2)]
        for i, g in zip(present, g_inputs, strict=True):
            result[2 + i] = g
        return tuple(result)


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


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? tail, Tensor? reset, bool silu"


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    last = (*x.shape[:-2], weight.shape[-1] - 1, x.shape[-1])
    return x.new_empty(x.shape), x.new_empty(last)


def _fake_backward(
    grad_y: Tensor, grad_last: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    tail: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, tail)
    )


_leaf = library.define(
    f"causal_conv1d({_ARGUMENTS}) -> (Tensor, Tensor)",
    default=blocked_conv1d.causal_conv1d,
    fake=_fake,
)
_leaf_backward = library.define(
    f"causal_conv1d_backward(Tensor grad_y, Tensor grad_last, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    default=blocked_conv1d.causal_conv1d_backward,
    fake=_fake_backward,
)
for _function in (_Convolution.forward, _ConvolutionBackward.forward):
    positional_only(_function)
allow_in_graph(_causal_conv1d)
_CUDA = cuda_conv1d.implement()
_CPU = cpu.implement("causal_conv1d", "causal_conv1d", "causal_conv1d_backward")
