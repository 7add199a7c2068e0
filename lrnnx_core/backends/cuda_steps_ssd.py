# SPDX-License-Identifier: MIT
"""One step of a Mamba-2 block on CUDA: launches of cuda/step_ssd.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lrnnx_core.backends import cuda
from lrnnx_core.backends.cuda_steps import (
    REALS,
    SHARED,
    address,
    either,
    fit,
    kernel,
    names,
    next_state,
    pack,
    ready,
    rows_of,
)

LAYOUT = "3PPqPq4PPq4P4d7q4q2q"
ENTRIES = ("ssd_update", "ssd_close")
THREADS, LEAST_PIECE, BLOCKS = 256, 8, 2  # BLOCKS a multiprocessor, if there is so much to do
EPS = 1e-5


@functools.cache
def _kernel(entry: str, activations: torch.dtype, real: torch.dtype, vector: int) -> cuda.Kernel:
    definitions = {
        "ENTRY": ENTRIES.index(entry), **names(activations, real), "VECTOR": vector
    }  # fmt: skip
    return cuda.Kernel("step_ssd.cu", entry, definitions, LAYOUT, overlaps=True)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of Mamba-2 with 128 states."""
    return [
        _kernel(entry, dtype, real, pack(128, real, 32))
        for dtype, real in (
            (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
            (torch.float64, torch.float64),
        )
        for entry in ENTRIES
    ]  # fmt: skip


@kernel
def ssd_step(
    device: int,
    parts: Tensor,
    conv: Tensor,
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    timesteps: Tensor | None,
    n_groups: int,
    low: float,
    high: float,
    dt_scale: float,
    state_only: bool,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.ssd_step`."""
    dtype, real, (heads, size, states) = parts.dtype, A.dtype, h.shape[-3:]
    mixed, _, taps = conv_weight.shape
    width = heads * size
    count = parts.numel() // (width + mixed + heads)
    piece, wanted = size, BLOCKS * cuda.limits(device).multiprocessors
    while piece % 2 == 0 and piece > LEAST_PIECE and count * heads * (size // piece) < wanted:
        piece //= 2
    if real not in REALS or not fit(dtype, real) or conv.dtype is not dtype:
        return None
    shared = (2 * states + piece) * real.itemsize
    if count == 0 or states == 0 or width == 0 or shared > SHARED:
        return None
    given, parts_row = rows_of(parts, count, 1, dtype)
    past, conv_row = rows_of(conv, count, 2, dtype)
    before, h_row = rows_of(h, count, 3, real)
    elapsed, elapsed_row = None, 0
    if timesteps is not None:
        elapsed, elapsed_row = rows_of(timesteps, count, 0, real)
    (weight, weight_wide), (bias, bias_wide), (norm, norm_wide) = (
        either(t, dtype, real) for t in (conv_weight, conv_bias, norm_weight)
    )
    dt_bias, A, D = (ready(t, real) for t in (dt_bias, A, D))
    y = torch.empty((*parts.shape[:-1], width), dtype=dtype, device=parts.device)
    tail, new = next_state(conv, dtype), next_state(h, real)
    made = torch.empty((count, width), dtype=real, device=parts.device)
    values = (
        given.data_ptr(), past.data_ptr(), before.data_ptr(), address(weight), weight_wide,
        address(bias), bias_wide, dt_bias.data_ptr(), A.data_ptr(), D.data_ptr(), address(elapsed),
        address(norm), norm_wide, y.data_ptr(), tail.data_ptr(), new.data_ptr(), made.data_ptr(),
        low, high, dt_scale, EPS, count, heads, size, states, n_groups, taps, piece, parts_row,
        conv_row, h_row, elapsed_row, state_only, norm_before_gate,
    )  # fmt: skip
    vector = pack(states, real, cuda.WARP)
    blocks = count * heads * (size // piece)
    _kernel("ssd_update", dtype, real, vector).launch(device, blocks, THREADS, shared, *values)
    _kernel("ssd_close", dtype, real, vector).launch(device, count * n_groups, THREADS, 0, *values)
    return y, tail, new


cuda.KERNELS["ssd_step"] = kernels
