# SPDX-License-Identifier: MIT
"""One step of S7 on CUDA: a matrix product and the launch of cuda/step_s7.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lrnnx_core.backends import cuda
from lrnnx_core.backends.cuda_linear_step import linear_step
from lrnnx_core.backends.cuda_steps import (
    HALVES,
    REALS,
    SHARED,
    kernel,
    names,
    next_state,
    ready,
    rows_of,
)

LAYOUT = "6P6q"
THREADS = 512


@functools.cache
def _kernel(real: torch.dtype, lanes: int) -> cuda.Kernel:
    definitions = {**names(real, real), "LANES": lanes}
    return cuda.Kernel("step_s7.cu", "s7_step", definitions, LAYOUT, overlaps=True)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of S7 with 16 states."""
    return [_kernel(torch.float32, 16), _kernel(torch.float64, 16)]


@kernel
def s7_step(
    device: int, v: Tensor, h: Tensor, weight: Tensor, base: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.s7_step`."""
    real, width, states = base.dtype, v.shape[-1], base.shape[0]
    shared = (states + THREADS) * real.itemsize
    if real not in REALS or v.numel() == 0 or states == 0 or shared > SHARED:
        return None
    count = v.numel() // width
    x, v_row = rows_of(v, count, 1, real)
    before, h_row = rows_of(h, count, 1, real)
    if v.dtype is weight.dtype and v.dtype in HALVES and real is torch.float32:
        # a copy of the weight in float32 would be most of the work
        made = torch.mm(v.reshape(count, width), weight.mT, out_dtype=real)
    else:
        made = linear_step(x.view(count, width) if x.is_contiguous() else x, weight.to(real), None)
    base = ready(base, real)
    y = torch.empty(v.shape, dtype=real, device=v.device)
    new = next_state(h, real)
    lanes = 1
    while lanes < min(states, cuda.WARP):
        lanes *= 2
    _kernel(real, lanes).launch(
        device, count, THREADS, shared, x.data_ptr(), before.data_ptr(), made.data_ptr(),
        base.data_ptr(), y.data_ptr(), new.data_ptr(), count, width, states, v_row, h_row,
        made.shape[-1],
    )  # fmt: skip
    return y, new


cuda.KERNELS["s7_step"] = kernels
