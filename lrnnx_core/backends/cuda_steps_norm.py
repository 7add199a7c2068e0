# SPDX-License-Identifier: MIT
"""Division of rows by their root mean square on CUDA: the launch of cuda/step_norm.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lrnnx_core.backends import cuda
from lrnnx_core.backends.cuda_steps import (
    HALVES,
    REALS,
    address,
    ceil,
    either,
    kernel,
    names,
    pack,
    rows_of,
)

LAYOUT = "PPqPd3q"
NARROW = 1024  # channels up to which a warp has a row


@functools.cache
def _kernel(dtype: torch.dtype, lanes: int, vector: int) -> cuda.Kernel:
    real = torch.promote_types(dtype, torch.float32)
    definitions = {**names(dtype, real), "LANES": lanes, "VECTOR": vector}
    return cuda.Kernel("step_norm.cu", "rms_norm", definitions, LAYOUT, overlaps=True)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of widths that 16 bytes divide."""
    wide = [(torch.float32, 256), (torch.bfloat16, 256)]
    narrow = [(d, 32) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    return [_kernel(dtype, lanes, pack(512, dtype)) for dtype, lanes in narrow + wide]


@kernel
def rms_norm(device: int, x: Tensor, weight: Tensor | None, eps: float) -> Tensor | None:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.rms_norm`."""
    dtype, width = x.dtype, x.shape[-1]
    if dtype not in (*REALS, *HALVES) or x.numel() == 0:
        return None
    count = x.numel() // width
    given, x_row = rows_of(x, count, 1, dtype)
    scale, is_wide = either(weight, dtype, torch.promote_types(dtype, torch.float32))
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    lanes = 32 if width <= NARROW else 256
    blocks = ceil(count, 4) if lanes == 32 else count
    _kernel(dtype, lanes, pack(width, dtype)).launch(
        device, blocks, 128 if lanes == 32 else lanes, 0, given.data_ptr(), address(scale), is_wide,
        y.data_ptr(), eps, count, width, x_row,
    )  # fmt: skip
    return y


cuda.KERNELS["rms_norm"] = kernels
