# SPDX-License-Identifier: MIT
"""S7 with every matrix made from the input: `s7` with ``variant="full"``.

    v = in_proj(u);   (a_t, B_t, C_t, d_t, beta_t) = x_proj(v_t);   a_t += base
    A_bar_t = 1 - 1/(a_t^2 + 1/2);   h_t = A_bar_t h_{t-1} + B_t^T v_t + beta_t
    y_t = C_t h_t + d_t v_t;   out_t = y_t sigmoid(gate_proj(gelu(y_t)))

B_t and C_t, (H, N) each, are products of a weight with v_t; `trilinear` applies them in chunks.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lrnnx_core import initialize
from lrnnx_core.models._common import (
    check_choice,
    check_keys,
    check_state,
    compute_dtype,
    full_precision,
)
from lrnnx_core.models._projected import in_directions, linear, linear_init, with_reverse
from lrnnx_core.ops.linear_scan import linear_scan
from lrnnx_core.ops.steps import s7_step
from lrnnx_core.ops.trilinear import trilinear
from lrnnx_core.sequences import Layout
from lrnnx_core.types import Discrete, Number, Params

InitMemory = Literal["log", "upstream"]
PROJECTIONS = ("in_proj", "gate_proj")
X_PROJ_STD = 0.02
"""Standard deviation of the initial x_proj.weight."""


class Generators(NamedTuple):
    """The parts of x_proj.weight: a (N, H), B and C (H, N, H), d (H, H), beta (N, H).

    The last axis meets v_t.
    """

    a: Tensor
    B: Tensor
    C: Tensor
    d: Tensor
    beta: Tensor


def init(
    d_model: int,
    d_state: int,
    *,
    init_memory: InitMemory,
    abar_min: Number,
    abar_max: Number,
    bidirectional: bool,
    draw: initialize.Drawer,
) -> Params:
    """Return fresh parameters; see `lrnnx_core.models.s7.init`."""
    check_choice("s7.init", "init_memory", init_memory, ("log", "upstream"))
    floats = not isinstance(abar_min, Tensor) and not isinstance(abar_max, Tensor)
    if floats and not 0 <= abar_min <= abar_max < 1:
        raise ValueError(
            f"s7.init: abar_min = {abar_min}, abar_max = {abar_max}, expected 0 <= abar_min <= "
            "abar_max < 1"
        )
    if init_memory == "upstream":
        for name, value, default in (("abar_min", abar_min, 0.9), ("abar_max", abar_max, 0.999)):
            if isinstance(value, Tensor) or value != default:
                raise ValueError(f"s7.init: {name} belongs to init_memory='log'")
    rows = 2 * d_state + 2 * d_model * d_state + d_model
    grid = draw.tensor(torch.arange(d_state, dtype=torch.float64, device="cpu"))
    if init_memory == "log":
        # 1 - A_bar on a geometric grid, longest memory last
        slow, fast = (1 - initialize.as_tensor(r, grid) for r in (abar_max, abar_min))
        forget = torch.exp(initialize.log_dt(1 - grid / max(d_state - 1, 1), slow, fast))
        base = torch.sqrt(1 / forget - 0.5)
    else:
        base = torch.full_like(grid, -0.5)

    def one_way() -> Params:
        return {
            "in_proj.weight": linear_init(draw, d_model, d_model),
            "x_proj.weight": X_PROJ_STD * draw.normal(rows, d_model),
            "base": base.clone(),
            "gate_proj.weight": linear_init(draw, d_model, d_model),
        }

    return with_reverse(one_way, PROJECTIONS) if bidirectional else one_way()


def check(where: str, params: Params) -> None:
    """Raise unless the parameters are of this variant."""
    check_keys(
        where, params, ("in_proj.weight", "x_proj.weight", "base"),
        "variant='full' has them; were these made with variant='delta'?",
    )  # fmt: skip


def generators(params: Params, dtype: torch.dtype) -> Generators:
    """Split x_proj.weight; rows h N + n of the parts B and C belong to B_t[h, n] and C_t[h, n]."""
    states = params["base"].shape[0]
    weight = params["x_proj.weight"].to(dtype)
    width = weight.shape[1]
    sizes = [states, width * states, width * states, width, states]
    a, B, C, d, beta = weight.split(sizes)
    shape = (width, states)
    return Generators(a, B.unflatten(0, shape), C.unflatten(0, shape), d, beta)


def decay(params: Params, v: Tensor, parts: Generators) -> Tensor:
    """Return A_bar_t (..., L, N), in [-1, 1), for v (..., L, H)."""
    a = v @ parts.a.mT + params["base"].to(v.dtype)
    return 1 - 1 / (a.square() + 0.5)


def discretize(params: Params, u: Tensor) -> Discrete:
    """Return A_bar (..., L, N) and B_t^T (..., L, N, H), which acts on v = in_proj(u)."""
    v = linear(params, "in_proj", u)
    with full_precision(u.device):
        v = v.to(compute_dtype(params, u))
        parts = generators(params, v.dtype)
        B = (v @ parts.B.flatten(0, 1).mT).unflatten(-1, parts.B.shape[:2])
        return decay(params, v, parts), B.mT


def scan(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    layout: Layout,
    *,
    chunk_size: int | None = None,
    recurrent: bool = False,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the model on u (..., L, H) whose padding, if any, is zero."""
    if state is not None:
        check_state(where, state, u.shape[:-2], params["base"].shape, u, real=True)
    v = linear(params, "in_proj", u)
    y, last = inner(
        where, params, v, state, layout, chunk_size=chunk_size, recurrent=recurrent,
        bidirectional=bidirectional,
    )  # fmt: skip
    return gate(params, y).to(u.dtype), last


def inner(
    where: str,
    params: Params,
    v: Tensor,
    state: Tensor | None,
    layout: Layout,
    *,
    chunk_size: int | None = None,
    recurrent: bool = False,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run what stands between in_proj and the gate on v (..., L, H).

    Returns:
        y (..., L, H), zero at padding, at least float32, and the final state (..., N), of the
        forward direction if there are two.
    """

    def run(params: Params, parts: tuple[Tensor, ...], layout: Layout) -> tuple[Tensor, Tensor]:
        return _one_way(params, parts[0], state, layout, chunk_size, recurrent)

    return in_directions(where, params, (v,), state, layout, run, bidirectional=bidirectional)


def step(where: str, params: Params, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step between in_proj and the gate: v (..., H); return y, at least float32."""
    check_state(where, state, v.shape[:-1], params["base"].shape, v, real=True)
    with full_precision(v.device):
        base = params["base"].to(compute_dtype(params, v, state))
        return s7_step(v, state, params["x_proj.weight"], base)


def _one_way(
    params: Params,
    v: Tensor,
    state: Tensor | None,
    layout: Layout,
    chunk_size: int | None,
    recurrent: bool,
) -> tuple[Tensor, Tensor]:
    length = v.shape[-2]
    backend = "reference" if recurrent else "auto"
    with full_precision(v.device):
        v = v.to(compute_dtype(params, v, state))
        parts = generators(params, v.dtype)
        valid = layout.valid(length)
        if valid is not None:
            v = torch.where(valid.unsqueeze(-1), v, torch.zeros_like(v))
        A_bar = decay(params, v, parts)
        if valid is not None:  # v is zero there, and the drive with it
            A_bar = torch.where(valid.unsqueeze(-1), A_bar, torch.ones_like(A_bar))
        apply = partial(trilinear, chunk_size=chunk_size, backend=backend)
        drive = apply(parts.B.transpose(0, 1), v, v) + v @ parts.beta.mT
        h, last = linear_scan(A_bar, drive, state, reset=layout.resets(length), backend=backend)
        y = apply(parts.C, h, v) + (v @ parts.d.mT) * v
    return y, last


def gate(params: Params, y: Tensor) -> Tensor:
    """Return y sigmoid(gate_proj(gelu(y)))."""
    return y * torch.sigmoid(linear(params, "gate_proj", torch.nn.functional.gelu(y)))
