# SPDX-License-Identifier: MIT
"""What models with projections and a short convolution share: Mamba, STREAM, RG-LRU, S7.

Such a model is ``out_proj(inner(in_proj(u)))``. The core does all three; a Module calls its own
projections, so that what wraps them (LoRA, quantisation) applies, and the same ``inner``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.backends.transforms import autocasting
from lrnnx_core.models._common import check_device, check_real, check_whole
from lrnnx_core.sequences import Compaction, Layout
from lrnnx_core.types import Number, Params

Body = Callable[[Tensor, Layout], tuple[Tensor, Any]]
Inner = Callable[[Params, tuple[Tensor, ...], Layout], tuple[Tensor, Any]]

REVERSE = "reverse."
"""Prefix of the second set of inner parameters, which runs backwards in a bidirectional model."""


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """Apply the projection stored as name.weight and, if there, name.bias, in the wider dtype."""
    weight, bias = params[name + ".weight"], params.get(name + ".bias")
    if autocasting(x.device):
        return torch.nn.functional.linear(x, weight, bias)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)


def around_padding(u: Tensor, layout: Layout, body: Body) -> tuple[Tensor, Any]:
    """Run ``body(u, layout)`` on sequences whose padding, if any, is on the right and zero.

    Holes of a mask are closed before and opened after, so padding touches neither the recurrence
    nor the convolution's tail; outputs at padding are zero.
    """
    length = u.shape[-2]
    if layout.mask is not None:
        valid = layout.valid(length)
        closing = Compaction.of((layout.mask if valid is None else valid).expand(u.shape[:-1]))

        def close(t: Tensor | None) -> Tensor | None:
            return None if t is None else closing.close(t.expand(u.shape[:-1]))

        closed = Layout(closing.lengths, None, close(layout.reset), close(layout.timesteps))
        y, state = body(_zero_padding(closing.close(u), closed), closed)
        return closing.open(y), state
    y, state = body(_zero_padding(u, layout), layout)
    return _zero_padding(y, layout), state


def in_directions(
    where: str,
    params: Params,
    parts: tuple[Tensor, ...],
    state: Any,
    layout: Layout,
    inner: Inner,
    *,
    bidirectional: bool,
) -> tuple[Tensor, Any]:
    """Run ``inner(params, parts, layout)``, and add a run backwards if bidirectional.

    Backwards the same projections' outputs are read from the end of each row, or of each document
    in it, with the parameters under `REVERSE`. Both directions count the current sample.

    Args:
        where: who asks, for the messages of errors.
        params: of both directions; projections may be among them.
        parts: what the projections into the model give, each (..., L, X).
        state: what ``inner`` starts from; None if bidirectional.
        layout: of the parts.
        inner: the model between its projections.
        bidirectional: whether to run backwards too.

    Returns:
        What the projection out of the model takes, and the state of the forward direction.

    Raises:
        ValueError: bidirectional with a state, or without the second set.

    Source: Zhu et al. 2024 (Vision Mamba), arXiv:2401.09417: one pair of projections around two
    convolutions and two selective scans, whose gated outputs are summed before the second one.
    """
    if not bidirectional:
        return inner(params, parts, layout)
    second = {k.removeprefix(REVERSE): v for k, v in params.items() if k.startswith(REVERSE)}
    if not second:
        raise ValueError(
            f"{where}: params have no {REVERSE}*; make them with init(bidirectional=True)"
        )
    check_whole(where, state)
    forward, last = inner(params, parts, layout)
    mirrored = tuple(layout.mirror(p) for p in parts)
    backward, _ = inner(second, mirrored, layout.mirrored(parts[0].shape[-2]))
    return forward + layout.mirror(backward), last


def with_reverse(make: Callable[[], Params], shared: Collection[str]) -> Params:
    """Return the parameters of both directions, from two calls of ``make``.

    Args:
        make: draws the parameters of a model that runs forwards.
        shared: the projections, of which there is one set.
    """
    params, second = make(), make()
    own = {k: v for k, v in second.items() if k.split(".")[0] not in shared}
    return params | {REVERSE + k: v for k, v in own.items()}


def _zero_padding(u: Tensor, layout: Layout) -> Tensor:
    valid = layout.valid(u.shape[-2])
    return u if valid is None else torch.where(valid.unsqueeze(-1), u, torch.zeros_like(u))


def linear_init(draw: initialize.Drawer, out_features: int, in_features: int) -> Tensor:
    """Draw a weight as `torch.nn.Linear` does: U(-1/sqrt(in), 1/sqrt(in))."""
    return (2 * draw.uniform(out_features, in_features) - 1) / math.sqrt(in_features)


def softplus_inverse(steps: Tensor) -> Tensor:
    """Return x with softplus(x) = steps."""
    return steps + torch.log(-torch.expm1(-steps))


def dt_bias(
    draw: initialize.Drawer, width: int, dt_min: Number, dt_max: Number, dt_floor: Number
) -> Tensor:
    """Draw the bias under a softplus that makes steps log-uniform in [dt_min, dt_max]."""
    steps = torch.exp(initialize.log_dt(draw.uniform(width), dt_min, dt_max))
    return softplus_inverse(torch.maximum(steps, initialize.as_tensor(dt_floor, steps)))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise by the root mean square in float32, then cast back and scale."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return out if weight is None else weight.to(x.dtype) * out


def check_parts(
    where: str, state: Any, kind: type, shapes: dict[str, tuple[int, ...]], like: Tensor
) -> None:
    """Raise unless the state is a ``kind`` whose parts have these shapes, where ``like`` is."""
    if not isinstance(state, kind):
        raise ValueError(f"{where}: state is a {type(state).__name__}, expected {kind.__name__}")
    for name, shape in shapes.items():
        part = getattr(state, name)
        if tuple(part.shape) != shape:
            raise ValueError(
                f"{where}: state.{name} {tuple(part.shape)}, expected {shape} for this input"
            )
        check_real(where, f"state.{name}", part)
        check_device(where, f"state.{name}", part, like)
