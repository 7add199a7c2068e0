# SPDX-License-Identifier: MIT
# pyright: basic
"""The gradients of D x on CUDA: launches of cuda/feedthrough.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lrnnx_core.backends import cuda, cuda_tiles

THREADS = 256
HEIGHT = 512  # rows of a block
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def kernel(dtype: torch.dtype, pack: int) -> cuda.Kernel:
    """Return the kernel for a dtype, with so many channels in one access."""
    definitions = {"DTYPE": cuda.NAMES[dtype], "PACK": pack, "THREADS": THREADS}
    return cuda.Kernel("feedthrough.cu", "feedthrough_backward", definitions, "5P5q")


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels that the library's models launch."""
    return [kernel(torch.float32, 4), kernel(torch.float32, 1), kernel(torch.float64, 2)]


def usable(x: Tensor) -> bool:
    """Return whether tensors like x run this kernel."""
    return x.is_cuda and x.dtype in DTYPES and x.numel() > 0 and cuda.ready()


def add_gradients(dx: Tensor, g: Tensor, x: Tensor, D: Tensor) -> Tensor:
    """Add D g to dx (*shared, ..., H) in place; return dD, the sum of g x, (*shared, H).

    dx is compact; all are on one CUDA device and of one dtype.
    """
    device = x.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return add_gradients(dx, g, x, D)
    g, x, D = g.contiguous(), x.contiguous(), D.contiguous()
    channels = D.shape[-1]
    shared = D.numel() // channels
    each = x.numel() // D.numel()
    whole = 16 // x.itemsize
    at = dx.data_ptr() | g.data_ptr() | x.data_ptr() | D.data_ptr()
    pack = whole if channels % whole == 0 and at % 16 == 0 else 1
    blocks = -(-each // HEIGHT)
    wide = torch.promote_types(x.dtype, torch.float32)
    partial = torch.empty((blocks, *D.shape), dtype=wide, device=x.device)
    kernel(x.dtype, pack).launch(
        device, blocks * shared, THREADS, 0,
        x.data_ptr(), g.data_ptr(), D.data_ptr(), dx.data_ptr(), partial.data_ptr(),
        each, channels, HEIGHT, blocks, shared,
    )  # fmt: skip
    dD = torch.empty(D.shape, dtype=D.dtype, device=x.device)
    cuda_tiles.add_up(device, partial, dD, blocks)
    return dD


def implement() -> None:
    """List the kernels for warm-up and the compile check."""
    cuda.KERNELS["feedthrough"] = kernels
