# SPDX-License-Identifier: MIT
"""Where the largest number of each row is, on CUDA: the launch of cuda/argmax.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lrnnx_core.backends import cuda, library

THREADS = 1024  # of a block, which has a row
UNROLL = 8  # pieces of 16 bytes that a thread asks for at a time
LEAST, MOST_ROWS = 4096, 1024  # numbers of a row, and rows, between which torch is slower
LAYOUT = "2P3q"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def kernel(dtype: torch.dtype, vector: int) -> cuda.Kernel:
    """Return the kernel for pieces of so many neighbours."""
    definitions = {
        "DTYPE": cuda.NAMES[dtype],
        "VECTOR": vector,
        "THREADS": THREADS,
        "UNROLL": UNROLL,
    }
    return cuda.Kernel("argmax.cu", "argmax", definitions, LAYOUT, overlaps=True)


def argmax(x: Tensor) -> Tensor:
    """Return what ``x.argmax(-1)`` does, for x (..., count)."""
    count = x.shape[-1] if x.ndim else 0
    rows = x.numel() // count if count else 0
    if not (count >= LEAST and 0 < rows <= MOST_ROWS and x.dtype in DTYPES and cuda.ready()):
        return library.default("argmax")(x)
    device = x.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return argmax(x)
    x = x.contiguous()
    vector = 16 // x.dtype.itemsize
    while count % vector or x.data_ptr() % (vector * x.dtype.itemsize):
        vector //= 2
    index = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    kernel(x.dtype, vector).launch(
        device, rows, THREADS, 0, x.data_ptr(), index.data_ptr(), rows, count, count
    )
    return index


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of vocabularies that are multiples of eight."""
    return [kernel(torch.bfloat16, 8), kernel(torch.float32, 4)]


cuda.KERNELS["argmax"] = kernels
