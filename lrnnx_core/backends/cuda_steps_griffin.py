# SPDX-License-Identifier: MIT
"""One step of a Griffin block on CUDA: launches of cuda/step_griffin.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lrnnx_core.backends import cuda
from lrnnx_core.backends.cuda_steps import (
    MOST_ROWS,
    address,
    ceil,
    either,
    fit,
    kernel,
    names,
    next_state,
    ready,
    rows_of,
)

LAYOUT = "5PPqPq2PPqPq2P6P4q6q3q"
ENTRIES = ("griffin_taps", "griffin_gates", "griffin_close")
TILE, THREADS = 8, 256


@functools.cache
def _kernel(
    entry: str, activations: torch.dtype, real: torch.dtype, weight: torch.dtype, rows: int
) -> cuda.Kernel:
    definitions = {
        "ENTRY": ENTRIES.index(entry),
        **names(activations, real),
        "WEIGHT": cuda.NAMES[weight],
        "ROWS": rows,
    }
    return cuda.Kernel("step_griffin.cu", entry, definitions, LAYOUT, overlaps=True)


def _rows(count: int, real: torch.dtype) -> int:
    """Return how many rows a block works on."""
    if count == 1:
        return 1
    return 8 if count <= 16 and real is torch.float32 else 4 if real is torch.float64 else 16


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of RG-LRU that ordinary batches meet."""
    found: list[cuda.Kernel] = []
    for dtype, real, rows in (
        (torch.float32, torch.float32, (1, 8, 16)), (torch.bfloat16, torch.float32, (1, 16)),
        (torch.float64, torch.float64, (4,)),
    ):  # fmt: skip
        found.append(_kernel("griffin_taps", dtype, real, dtype, 1))
        found += [_kernel("griffin_gates", dtype, real, dtype, r) for r in rows]
    found.append(_kernel("griffin_close", torch.float32, torch.float32, torch.float32, 1))
    return found


@kernel
def griffin_step(
    device: int,
    x: Tensor,
    gate: Tensor,
    conv: Tensor,
    h: Tensor,
    started: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    input_weight: Tensor,
    input_bias: Tensor,
    recurrent_weight: Tensor,
    recurrent_bias: Tensor,
    rate: Tensor,
    timesteps: Tensor | None,
    state_only: bool,
    start_rule: bool,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.griffin_step`."""
    dtype, real, width = x.dtype, rate.dtype, rate.shape[0]
    heads, block, _ = input_weight.shape
    count = x.numel() // width if width else 0
    if not fit(dtype, real) or count == 0 or conv.dtype is not dtype or gate.dtype is not dtype:
        return None
    given, x_row = rows_of(x, count, 1, dtype)
    gate, gate_row = rows_of(gate, count, 1, dtype)
    past, conv_row = rows_of(conv, count, 2, dtype)
    before, h_row = rows_of(h, count, 1, real)
    flags, started_row = rows_of(started, count, 0, torch.bool)
    elapsed, elapsed_row = None, 0
    if timesteps is not None:
        elapsed, elapsed_row = rows_of(timesteps, count, 0, real)
    taps = conv_weight.shape[-1]
    (weight, weight_wide), (bias, bias_wide), (bias_i, i_wide), (bias_r, r_wide) = (
        either(t, dtype, real) for t in (conv_weight, conv_bias, input_bias, recurrent_bias)
    )
    rate = ready(rate, real)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    tail, new, after = (
        next_state(t, kind) for t, kind in ((conv, dtype), (h, real), (started, torch.bool))
    )
    met = torch.empty(count, dtype=torch.bool, device=x.device)
    v = torch.empty((count, width), dtype=real, device=x.device)
    same = input_weight.dtype is recurrent_weight.dtype is dtype
    stored = dtype if same and count <= MOST_ROWS else real

    def launch(entry: str, rows: int, blocks: int, to_i: Tensor, to_r: Tensor) -> None:
        # of kernels that read no weights, one is enough
        weights = {"griffin_taps": dtype, "griffin_gates": stored, "griffin_close": real}[entry]
        _kernel(entry, dtype, real, weights, rows).launch(
            device, blocks, THREADS, 0, given.data_ptr(), gate.data_ptr(), past.data_ptr(),
            before.data_ptr(), flags.data_ptr(), address(weight), weight_wide, address(bias),
            bias_wide, to_i.data_ptr(), to_r.data_ptr(), address(bias_i), i_wide, address(bias_r),
            r_wide, rate.data_ptr(), address(elapsed), y.data_ptr(), tail.data_ptr(),
            new.data_ptr(), v.data_ptr(), after.data_ptr(), met.data_ptr(), count, width, taps,
            block, x_row, gate_row, conv_row, h_row, started_row, elapsed_row, state_only,
            start_rule, tanh,
        )  # fmt: skip

    each = ceil(count * width, THREADS)
    launch("griffin_taps", 1, each, v, v)
    to_i, to_r = ready(input_weight, stored), ready(recurrent_weight, stored)
    if count <= MOST_ROWS:
        rows = _rows(count, real)
        blocks = heads * ceil(block, TILE) * ceil(count, rows)
        launch("griffin_gates", rows, blocks, to_i, to_r)
    else:
        inputs = v.view(count, heads, block).transpose(0, 1)
        to_i, to_r = (
            torch.bmm(inputs, w).transpose(0, 1).reshape(count, width) for w in (to_i, to_r)
        )
        launch("griffin_close", 1, each, to_i, to_r)
    return y, tail, new, after


cuda.KERNELS["griffin_step"] = kernels
