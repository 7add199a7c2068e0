# SPDX-License-Identifier: MIT
"""RG-LRU: a gated real diagonal recurrence, in the recurrent block of Griffin and RecurrentGemma.

    v = conv_1d(linear_x(u));   out = linear_out(gelu(linear_y(u)) h)
    r_t = sigmoid(W_a v_t + b_a);   i_t = sigmoid(W_x v_t + b_x)        W_a, W_x block-diagonal
    log a_t = -c r_t softplus(Lambda)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t v_t)

At the first sample of a document a_t = 0 and the square root's place is taken by 1. Parameter names
are those of published checkpoints.

Source: De et al. 2024 (Griffin), arXiv:2402.19427, sections 2.3 and 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.models import _griffin, _projected
from lrnnx_core.models._common import (
    check_input,
    check_sizes,
    check_timestep,
    full_precision,
)
from lrnnx_core.models._griffin import (
    DISCRETIZATIONS,
    MODES,
    TIMESTEP_MODES,
    Gelu,
    State,
    options_of,
)
from lrnnx_core.sequences import Layout, layout
from lrnnx_core.types import Discrete, Mode, Number, Params, TimestepMode

__all__ = [
    "DISCRETIZATIONS",
    "MODES",
    "TIMESTEP_MODES",
    "State",
    "discretize",
    "init",
    "init_state",
    "scan",
    "step",
]

PROJECTIONS = ("linear_x", "linear_y", "linear_out")
MAX_BLOCK = 256
"""The width of a gate block in the published models, and the widest one made by default."""


def init(
    d_model: int,
    d_state: int | None = None,
    *,
    heads: int | None = None,
    d_conv: int = 4,
    expand: int | None = None,
    r_min: Number = 0.9,
    r_max: Number = 0.999,
    init_power: Number = 1.0,
    out_variance: Number = 1.0,
    conv_bias: bool = True,
    bias: bool = True,
    bidirectional: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Params:
    """Return fresh parameters.

    Args:
        d_model: channels H.
        d_state: width W of the recurrence; H if None.
        heads: diagonal blocks of the gates' matrices, a divisor of W; 1 is dense. If None, the
            fewest that are at most 256 wide, which is the published width.
        d_conv: width K of the convolution.
        expand: W / H, in place of d_state.
        r_min: smallest initial a0^init_power, where a0 = exp(-softplus(Lambda)).
        r_max: largest one, at most 1; its square is uniform in between.
        init_power: which power of a0 starts there. 1 as the published code: the decay at half-open
            recurrence gate, a0^(c/2), is then in [0.656, 0.996]. c puts a0^c, the fastest decay, on
            [r_min, r_max].
        out_variance: linear_out.weight has variance out_variance / W; 2 / (number of layers) in the
            published models.
        conv_bias: whether the convolution has a bias.
        bias: whether the three projections have one.
        bidirectional: add a second set of what stands between the projections, drawn alike, for
            the reverse direction.
        generator: source of the random numbers; torch's own if None.
        device: where the tensors are made.
        dtype: real dtype, at least float32; torch's default if None.

    Returns:
        linear_x.weight and linear_y.weight (W, H), conv_1d.weight (W, 1, K), conv_1d.bias (W,),
        rg_lru.recurrent_param (Lambda) (W,), rg_lru.input_gate_weight and
        rg_lru.recurrent_gate_weight (heads, W/heads, W/heads), rg_lru.input_gate_bias and
        rg_lru.recurrent_gate_bias (heads, W/heads), linear_out.weight (H, W); with ``bias``
        linear_x.bias and linear_y.bias (W,), linear_out.bias (H,); with ``bidirectional`` all but
        linear_x, linear_y and linear_out again, under ``reverse.``.

    Raises:
        ValueError: a size < 1; both d_state and expand; heads that do not divide W; bounds given as
            floats outside 0 <= r_min < r_max <= 1.

    Source: the released code of De et al. 2024; section 2.4 has the ring for a0^c.
    """
    width, heads = _sizes(d_model, d_state, heads, d_conv, expand)
    if not (isinstance(r_min, Tensor) or isinstance(r_max, Tensor) or 0 <= r_min < r_max <= 1):
        raise ValueError(
            f"rglru.init: r_min = {r_min}, r_max = {r_max}, expected 0 <= r_min < r_max <= 1"
        )
    draw = initialize.Drawer(generator, device, dtype).resolved()
    block = width // heads

    def one_way() -> Params:
        params: Params = {
            "linear_x.weight": draw.normal(width, d_model) * d_model**-0.5,
            "linear_y.weight": draw.normal(width, d_model) * d_model**-0.5,
            "conv_1d.weight": draw.normal(width, 1, d_conv) * (0.01 / d_conv) ** 0.5,
            "rg_lru.recurrent_param": _ring(draw.uniform(width), r_min, r_max, init_power),
        }
        for gate in ("input_gate", "recurrent_gate"):
            weight = draw.normal(heads, block, block) * block**-0.5
            params[f"rg_lru.{gate}_weight"] = weight
            params[f"rg_lru.{gate}_bias"] = torch.zeros_like(weight[..., 0])
        weight = draw.normal(d_model, width)
        variance = initialize.as_tensor(out_variance, weight)
        params["linear_out.weight"] = weight * (variance / width).sqrt()
        if conv_bias:
            params["conv_1d.bias"] = torch.zeros_like(params["rg_lru.recurrent_param"])
        if bias:
            for name in PROJECTIONS:
                params[f"{name}.bias"] = torch.zeros_like(params[f"{name}.weight"][:, 0])
        return params

    return _projected.with_reverse(one_way, PROJECTIONS) if bidirectional else one_way()


def init_state(
    params: Params, batch_shape: Sequence[int] = (), *, dtype: torch.dtype | None = None
) -> State:
    """Return the state before a document: zeros, and started False.

    Args:
        params: from `init`.
        batch_shape: leading dimensions.
        dtype: of the activations, and so of conv; h is at least float32.

    Returns:
        conv (*batch_shape, K - 1, W), h (*batch_shape, W), started (*batch_shape) bool.
    """
    conv, h = _griffin.state_shapes(params)
    like = params["conv_1d.weight"]
    wide = torch.promote_types(params["rg_lru.recurrent_param"].dtype, torch.float32)
    kind = like.dtype if dtype is None else dtype
    return State(
        like.new_zeros((*batch_shape, *conv), dtype=kind),
        like.new_zeros((*batch_shape, *h), dtype=torch.promote_types(kind, wide)),
        like.new_zeros(tuple(batch_shape), dtype=torch.bool),
    )


def discretize(
    params: Params,
    v: Tensor,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Literal["none"] | None = None,
    c: Number = 8.0,
    dt_scale: Number = 1.0,
) -> Discrete:
    """Return (a, multiplier), each (..., L, W), for the input v of the recurrence.

    The factor of v is the multiplier times the input gate. The start of a document, where they are
    0 and 1, is left to `scan`.

    Args:
        params: from `init`.
        v: (..., L, W), what the convolution gives.
        integration_timesteps: (..., L), time elapsed before each sample: a to that power.
        timestep_mode: whether the multiplier goes with the timed a (``both``) or with the untimed
            one (``state_only``).
        discretization: ``none``, the only one: the model is discrete.
        c: multiplies log a.
        dt_scale: multiplies log a in decay and multiplier: a^dt_scale.

    Raises:
        ValueError: an unknown choice, a v of another width.

    Source: De et al. 2024, section 2.4; the powers of a are ours.
    """
    options = options_of(
        "rglru.discretize", discretization, timestep_mode, c, dt_scale, True, "auto"
    )
    width = params["rg_lru.recurrent_param"].shape[0]
    if v.shape[-1] != width:
        raise ValueError(f"rglru.discretize: v {tuple(v.shape)}, expected (..., L, W = {width})")
    log_decay, log_gain = _griffin.logs(params, v, integration_timesteps, options)
    with full_precision(v.device):
        return torch.exp(log_decay), _griffin.multiplier(log_gain)


def scan(
    params: Params,
    u: Tensor,
    state: State | None = None,
    *,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: Literal["none"] | None = None,
    c: Number = 8.0,
    dt_scale: Number = 1.0,
    start_rule: bool = True,
    gelu: Gelu = "tanh",
    bidirectional: bool = False,
    mode: Mode = "auto",
) -> tuple[Tensor, State]:
    """Run the block over a sequence.

    Args:
        params: from `init`.
        u: (..., L, H), real.
        state: before the first sample, from `init_state`, `scan` or `step`; zeros if None.
        integration_timesteps: (..., L), time elapsed before each sample: a to that power.
        timestep_mode: see `discretize`. Under ``both`` a gap of zero drops the sample's input.
        lengths: (...), samples per row of a right-padded batch.
        mask: (..., L) bool, False is padding: state untouched, output zero.
        reset: (..., L) bool, a new document starts with that sample: forget everything, the
            convolution's tail included.
        discretization: see `discretize`.
        c: see `discretize`.
        dt_scale: see `discretize`.
        start_rule: whether a = 0 and multiplier 1 at the first sample of a document: at resets, and
            at the first one that counts for a state that has met none. A call that goes on with a
            state starts nothing.
        gelu: of the gate: its ``tanh`` form, as published, or the exact one (``erf``).
        bidirectional: add the reverse direction, which has its own convolution and recurrence
            between the same projections; both count the current sample, and a document starts there
            with its last one.
        mode: ``scan`` (``auto`` is the same) or ``recurrent`` (a loop, the specification).

    Returns:
        y (..., L, H) in u's dtype, and the state after the last sample (of the forward direction
        where bidirectional).

    Raises:
        ValueError: shapes, dtypes, devices or choices that do not fit; a state of another model or
            batch, or any with ``bidirectional``.

    Source: De et al. 2024, sections 2.3 and 2.4; the start of a document is that of its released
    code; ``bidirectional`` as for `lrnnx_core.mamba.scan`.
    """
    options = options_of(
        "rglru.scan", discretization, timestep_mode, c, dt_scale, start_rule, mode, bidirectional,
        gelu,
    )  # fmt: skip
    weight = params["linear_x.weight"]
    check_input("rglru.scan", u, weight.shape[1], weight, rank=2, shape="(..., L, H)")
    seq = layout(
        "rglru.scan", u, lengths=lengths, mask=mask, reset=reset,
        integration_timesteps=integration_timesteps,
    )  # fmt: skip
    return _run("rglru.scan", params, u, state, seq, options)


def step(
    params: Params,
    u_t: Tensor,
    state: State,
    *,
    integration_timestep: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    discretization: Literal["none"] | None = None,
    c: Number = 8.0,
    dt_scale: Number = 1.0,
    start_rule: bool = True,
    gelu: Gelu = "tanh",
) -> tuple[Tensor, State]:
    """Take one step.

    Args:
        params: from `init`.
        u_t: (..., H), real.
        state: from `init_state`, `scan` or `step`.
        integration_timestep: (...), time elapsed since the previous sample.
        timestep_mode: see `scan`.
        discretization: see `discretize`.
        c: see `discretize`.
        dt_scale: see `discretize`.
        start_rule: see `scan`.
        gelu: see `scan`.

    Returns:
        y_t (..., H) in u_t's dtype, and the new state.

    Raises:
        ValueError: as `scan`.
    """
    options = options_of(
        "rglru.step", discretization, timestep_mode, c, dt_scale, start_rule, "auto", False, gelu
    )
    weight = params["linear_x.weight"]
    check_input("rglru.step", u_t, weight.shape[1], weight, rank=1, shape="(..., H)")
    check_timestep("rglru.step", integration_timestep, u_t)
    x, y = (_projected.linear(params, name, u_t) for name in ("linear_x", "linear_y"))
    out, new = _griffin.step("rglru.step", params, x, y, state, integration_timestep, options)
    return _projected.linear(params, "linear_out", out).to(u_t.dtype), new


def _run(
    where: str,
    params: Params,
    u: Tensor,
    state: State | None,
    seq: Layout,
    options: _griffin.Options,
) -> tuple[Tensor, State]:
    def body(u: Tensor, seq: Layout) -> tuple[Tensor, State]:
        x, y = (_projected.linear(params, name, u) for name in ("linear_x", "linear_y"))
        out, new = _griffin.inner(where, params, x, y, state, seq, options)
        return _projected.linear(params, "linear_out", out), new

    y, new = _projected.around_padding(u, seq, body)
    return y.to(u.dtype), new


def _sizes(
    d_model: int, d_state: int | None, heads: int | None, d_conv: int, expand: int | None
) -> tuple[int, int]:
    """Check the sizes; return W and the number of gate blocks."""
    check_sizes("rglru.init", d_model=d_model, d_conv=d_conv)
    if d_state is not None and expand is not None:
        raise ValueError(
            f"rglru.init: d_state = {d_state} and expand = {expand}, expected one of them"
        )
    check_sizes("rglru.init", expand=1 if expand is None else expand)
    width = d_model * (1 if expand is None else expand) if d_state is None else d_state
    check_sizes("rglru.init", d_state=width)
    if heads is None:
        fewest = -(-width // MAX_BLOCK)
        heads = next(n for n in range(fewest, width + 1) if width % n == 0)
    check_sizes("rglru.init", heads=heads)
    if width % heads:
        raise ValueError(f"rglru.init: heads = {heads} does not divide the width {width}")
    return width, heads


def _ring(uniform: Tensor, r_min: Number, r_max: Number, power: Number) -> Tensor:
    """Map standard uniforms to Lambda with exp(-power softplus(Lambda)) on the ring."""
    r_min, r_max, power = (initialize.as_tensor(v, uniform) for v in (r_min, r_max, power))
    # log of sqrt(r_max^2 - u (r_max^2 - r_min^2)); log1p, so that no decay of 1 comes of rounding
    log_r = torch.log(r_max) + 0.5 * torch.log1p(-uniform * (1 - (r_min / r_max) ** 2))
    return _projected.softplus_inverse(-log_r / power)
