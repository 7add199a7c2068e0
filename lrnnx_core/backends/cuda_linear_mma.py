# SPDX-License-Identifier: MIT
"""A linear map of some dozens of rows on tensor cores: shapes, and the launch of linear_mma.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrnnx_core.backends import cuda, donation

LEAST_ROWS, MOST_ROWS = 5, 128
"""Of x, where this is taken: fewer are `cuda_linear_step`'s, more are cuBLAS's."""
CHUNK = 32  # inputs that a warp multiplies between reads
WARPS = 8  # of a block; they divide the inputs
HEIGHTS = (16, 32, 64)  # rows of a tile
OUTPUTS = (8, 16, 24, 32, 48, 64, 96)  # of a tile
MOST_SUMS = 96  # registers of a thread
AHEAD = 96  # registers of a thread for x
LOW_OUTPUTS, LOW_WEIGHT = 32, 64 * 1024  # of a low tile, and its bytes of the weight, at most
LOW_BLOCKS = (1 / 5, 3 / 2)  # of a multiprocessor for low tiles, at least and at most
WEIGHT_COST = 1.4  # of a byte of the weight in other tiles; 1 of a byte of x and of warps' sums
MOST_READ = 155_000
"""Bytes of x and of sums that a multiprocessor reads, up to which cuBLAS is slower on an H100."""
MOST_WEIGHT = 24 * 2**20  # bytes of the weight likewise: more take their time in any kernel
LAYOUT = "4P6q"
DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (9, 0)  # launches that overlap, without which little is won
LISTED_SHARED = 228 * 1024  # bytes of shared memory of multiprocessors that kernels are listed for


def room(height: int, outputs: int, chunks: int) -> int:
    """Return the bytes of shared memory of a block."""
    return WARPS * 32 * 16 * max(chunks * outputs // 8, height * outputs // 128)


@functools.cache
def kernel(dtype: torch.dtype, height: int, outputs: int, chunks: int) -> cuda.Kernel:
    """Return a kernel.

    Args:
        dtype: of everything.
        height: rows of a tile.
        outputs: of a tile.
        chunks: of 32 inputs, of a warp.
    """
    definitions = {
        "DTYPE": cuda.NAMES[dtype],
        "HEIGHT": height,
        "OUTPUTS": outputs,
        "WARPS": WARPS,
        "CHUNKS": chunks,
        "AHEAD": max(1, min(chunks, AHEAD // (height // 2))),
    }
    shared = room(height, outputs, chunks)
    return cuda.Kernel(
        "linear_mma.cu", "linear_mma", definitions, LAYOUT, shared=shared, overlaps=True
    )


class Shape(NamedTuple):
    """The launch for inputs of certain shapes; the kernel is None where there is none.

    Attributes:
        kernel: the kernel.
        blocks: of the grid.
        row_tiles: of x.
    """

    kernel: cuda.Kernel | None
    blocks: int
    row_tiles: int


_NONE = Shape(None, 0, 0)


def tile(rows: int, inputs: int, outputs: int, limits: cuda.Limits) -> tuple[int, int] | None:
    """Return the rows and outputs of a tile.

    A low one that holds little, so that the kernels before and after find room beside it, where
    there are about as many as multiprocessors; else what reads little.
    """
    found: list[tuple[float, int, int]] = []
    for height in HEIGHTS:
        for wide in OUTPUTS:
            shared = room(height, wide, -(-inputs // (CHUNK * WARPS)))
            if height * wide > cuda.WARP * MOST_SUMS or shared > limits.shared_per_block:
                continue
            blocks = -(-rows // height) * -(-outputs // wide)
            least, most = (share * limits.multiprocessors for share in LOW_BLOCKS)
            light = wide <= LOW_OUTPUTS and 2 * wide * inputs <= LOW_WEIGHT
            low = height == HEIGHTS[0] and light and least <= blocks <= most
            cost = reading(rows, inputs, outputs, height, wide, limits, WEIGHT_COST)
            found.append((-wide if low else cost, height, wide))
    return min(found)[1:] if found else None


def reading(
    rows: int,
    inputs: int,
    outputs: int,
    height: int,
    wide: int,
    limits: cuda.Limits,
    weight: float = 0.0,
) -> float:
    """Return the bytes that a multiprocessor reads: of x, of warps' sums, ``weight`` of W's."""
    blocks = -(-rows // height) * -(-outputs // wide)
    each = 2 * height * inputs + 4 * height * wide * WARPS + weight * 2 * wide * inputs
    return max(1.0, blocks / limits.multiprocessors) * each


def arrange(rows: int, inputs: int, outputs: int, dtype: torch.dtype, limits: cuda.Limits) -> Shape:
    """Return the launch on a device with these limits."""
    chosen = tile(rows, inputs, outputs, limits)
    if chosen is None or dtype.itemsize * inputs * outputs > MOST_WEIGHT:
        return _NONE
    if reading(rows, inputs, outputs, *chosen, limits) > MOST_READ:
        return _NONE
    height, wide = chosen
    row_tiles, chunks = -(-rows // height), -(-inputs // (CHUNK * WARPS))
    return Shape(kernel(dtype, height, wide, chunks), row_tiles * -(-outputs // wide), row_tiles)


@functools.lru_cache(maxsize=4096)
def _shape(
    rows: int,
    inputs: int,
    outputs: int,
    weight_stride: int,
    dtypes: tuple[torch.dtype, ...],
    alignment: int,
    device: int,
) -> Shape:
    dtype, limits = dtypes[0], cuda.limits(device)
    if not (LEAST_ROWS <= rows <= MOST_ROWS and inputs > 0 and outputs > 0):
        return _NONE
    if dtype not in DTYPES or any(d is not dtype for d in dtypes):
        return _NONE
    if alignment % 16 or inputs % 8 or weight_stride % 8:
        return _NONE
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return _NONE
    return arrange(rows, inputs, outputs, dtype, limits)


def takes(
    rows: int,
    inputs: int,
    outputs: int,
    weight_stride: int,
    dtypes: Sequence[torch.dtype],
    alignment: int,
    device: int,
) -> bool:
    """Return whether `linear_mma` has a kernel for x and a weight with neighbours in the last axis.

    Args:
        rows: of x.
        inputs: of the map.
        outputs: of the map.
        weight_stride: from row to row of the weight, in numbers.
        dtypes: of x, the weight and the bias, if there is one.
        alignment: the lowest bits of the addresses of x and the weight, joined by "or".
        device: the index of the device.
    """
    shape = _shape(rows, inputs, outputs, weight_stride, tuple(dtypes), alignment & 15, device)
    return shape.kernel is not None


def linear_mma(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y (..., outputs) = x W^T + b for x (..., inputs) and W (outputs, inputs).

    Where there is no kernel torch multiplies.

    Raises:
        ValueError: a tensor on another device.
    """
    device = x.get_device()
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.get_device() != device:
            raise ValueError(f"linear_mma: {name} is on {t.device}, x on {x.device}")
    inputs = x.shape[-1]
    outputs, width = weight.shape
    rows = x.numel() // inputs if inputs else 0
    plain = width == inputs and (weight.stride(1) == 1 or inputs == 1)
    if not LEAST_ROWS <= rows <= MOST_ROWS or not plain or not cuda.ready():
        return linear(x, weight, bias)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return linear_mma(x, weight, bias)
    x = x.contiguous()
    at_x, at_weight = x.data_ptr(), weight.data_ptr()
    dtypes = (x.dtype, weight.dtype) if bias is None else (x.dtype, weight.dtype, bias.dtype)
    call = _shape(rows, inputs, outputs, weight.stride(0), dtypes, (at_x | at_weight) & 15, device)
    if call.kernel is None:
        return linear(x, weight, bias)
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty((*x.shape[:-1], outputs))
    call.kernel.launch(
        device, call.blocks, cuda.WARP * WARPS, call.kernel.shared, at_x, at_weight,
        0 if bias is None else bias.data_ptr(), y.data_ptr(), rows, inputs, outputs,
        weight.stride(0), call.row_tiles, donation.settled(weight),
    )  # fmt: skip
    return y


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of 8 and 64 rows for 768 and 1536 inputs."""
    if limits.shared < LISTED_SHARED:
        return []
    cases = (
        (8, 768, 3072, torch.bfloat16), (64, 768, 3072, torch.bfloat16),
        (64, 1536, 768, torch.bfloat16), (64, 1536, 768, torch.float16),
    )  # fmt: skip
    found = (arrange(*case, limits).kernel for case in cases)
    return [kernel for kernel in found if kernel is not None]


cuda.KERNELS["linear_mma"] = kernels
