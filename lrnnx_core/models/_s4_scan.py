# SPDX-License-Identifier: MIT
"""What S4 does around its runs: checks, the choice of a mode, padding, both directions, D."""

from __future__ import annotations

import torch
from torch import Tensor

from lrnnx_core.models import _s4_run
from lrnnx_core.models._auto import chunk_length, resolve_mode
from lrnnx_core.models._common import (
    check_discrete,
    check_kernel,
    check_lti_run,
    check_steady,
    compute_dtype,
    full_precision,
    read_next,
)
from lrnnx_core.models._s4_run import Choices, Direction
from lrnnx_core.sequences import Layout
from lrnnx_core.types import Discrete, Mode, Params

# Up to this length blocks of time are as quick as a convolution, whose kernel has l_kernel taps.
SCAN_LENGTH = 16


def convolves(length: int, l_kernel: int | None) -> bool:
    """Return whether ``mode="auto"`` convolves: where C~ is stored, and for that length.

    With C itself stored the kernel needs the same powers of A_bar as the blocks of time do.
    """
    return l_kernel is not None and SCAN_LENGTH < length <= l_kernel


def convolved_at_once(where: str, chunk_size: int | None, u: Tensor, l_kernel: int | None) -> int:
    """Return how many samples a convolution takes at once.

    Unasked, nothing is cut where C~ is stored: a kernel costs as much as one of l_kernel taps, and
    so does the response to every state that is carried over.
    """
    if chunk_size is None and l_kernel is not None:
        return u.shape[-2]
    return chunk_length(where, chunk_size, u)


def check_reach(where: str, length: int, l_kernel: int | None) -> None:
    """Raise where a kernel would be longer than what C~ is stored for."""
    if l_kernel is not None and length > l_kernel:
        raise ValueError(
            f"{where}: length = {length} is beyond l_kernel = {l_kernel}, for which C~ is stored; "
            "double it with s4.extend, or recover C with s4.ctilde_to_c"
        )


def check_given(where: str, params: Params, discrete: Discrete, timesteps: Tensor | None) -> None:
    """Raise unless a precomputed (A_bar, B_bar) fits, and comes without timesteps."""
    if timesteps is not None:
        what = "integration_timestep" + "s" * (where == "s4.scan")
        raise ValueError(f"{where}: give discrete or {what}, not both")
    width, states = params["C_re"].shape[-2:]
    sizes = torch.Size((width, 2 * states, 2 * states)), torch.Size((width, 2 * states))
    check_discrete(where, discrete, *sizes)


def scan(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    choices: Choices,
    *,
    layout: Layout,
    mode: Mode,
    bidirectional: bool,
    kernel: Tensor | None,
    discrete: Discrete | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Run a model over u (..., L, H); return y (..., L, [Ch] H) and the final state (..., H, M)."""
    D, length = params["D"], u.shape[-2]
    steady = discrete is None or discrete[0].ndim == 3
    size = convolved_at_once(where, chunk_size, u, choices.l_kernel)
    _check(where, params, u, state, layout, mode, bidirectional, kernel, size)
    if discrete is not None:
        check_given(where, params, discrete, layout.timesteps)
        conv = mode == "conv" or kernel is not None
        if not steady and (bidirectional or conv):
            check_steady(where, discrete[0], backwards=bidirectional, convolves=conv)
    mode = resolve_mode(
        where, mode, steady=layout.uniform and steady, kernel=kernel, chunk_size=chunk_size,
        prefers=convolves(length, choices.l_kernel),
    )  # fmt: skip
    if mode == "conv" and kernel is None:
        check_reach(where, size, choices.l_kernel)
    with full_precision(u.device):
        dtype = compute_dtype(params, u, state)
        x, valid = u.to(dtype), layout.valid(length)
        if valid is not None:
            x = torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))
        K = None if kernel is None else kernel.to(dtype)
        if K is not None and D.ndim == 1:
            K = K.unsqueeze(-3)
        direction = Direction(params, "C", choices, dtype, discrete)
        forward = K[0] if bidirectional and K is not None else K
        y, last = _s4_run.run(direction, x, state, layout, mode, forward, size)
        if bidirectional:
            back = direction._replace(key="C2")
            y = y + _backwards(back, x, layout, mode, None if K is None else K[1], size)
        y = (y + D.to(dtype) * x.unsqueeze(-2)).flatten(-2)
        if valid is not None:
            y = torch.where(valid.unsqueeze(-1), y, torch.zeros_like(y))
        return y.to(u.dtype), last


def _backwards(
    direction: Direction, x: Tensor, layout: Layout, mode: str, K: Tensor | None, size: int
) -> Tensor:
    """Return y (..., L, Ch, H) of the reverse direction, moved on so that u_t counts once."""
    flipped = layout.backwards(x.shape[-2])
    y, _ = _s4_run.run(direction, x.flip(-2), None, flipped, mode, K, size)
    return read_next(y.flatten(-2), flipped).unflatten(-1, y.shape[-2:])


def _check(
    where: str,
    params: Params,
    u: Tensor,
    state: Tensor | None,
    layout: Layout,
    mode: Mode,
    bidirectional: bool,
    kernel: Tensor | None,
    at_least: int,
) -> None:
    states, D = params["C_re"].shape[-2:], params["D"]
    check_lti_run(where, params, u, state, states, layout, mode, bidirectional, kernel)
    check_kernel(where, kernel, (2,) * bidirectional + D.shape[:-1], at_least, D.shape[-1:])
