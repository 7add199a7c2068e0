# SPDX-License-Identifier: MIT
"""A linear map of some dozens of rows on tensor cores: shapes, and the launch of linear_mma.cu."""

from __future__ import annotations

import functools

import torch

from lrnnx_core.backends import cuda
from lrnnx_core.backends.cuda_linear import Map, Shape

MOST_ROWS = 128  # of x; more are cuBLAS's
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


def _arrange(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, limits: cuda.Limits
) -> tuple[cuda.Kernel, int, int] | None:
    """Return (kernel, blocks, tiles of x) on a device, None where cuBLAS is faster."""
    chosen = tile(rows, inputs, outputs, limits)
    if chosen is None or dtype.itemsize * inputs * outputs > MOST_WEIGHT:
        return None
    if reading(rows, inputs, outputs, *chosen, limits) > MOST_READ:
        return None
    height, wide = chosen
    row_tiles, chunks = -(-rows // height), -(-inputs // (CHUNK * WARPS))
    return kernel(dtype, height, wide, chunks), row_tiles * -(-outputs // wide), row_tiles


def shape(x: Map) -> Shape | None:
    """Return the launch, None where there is no kernel or cuBLAS is faster."""
    if x.rows > MOST_ROWS or x.dtype not in DTYPES:
        return None
    if x.alignment % 16 or x.inputs % 8 or x.weight_row % 8:
        return None
    if torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return None
    found = _arrange(x.rows, x.inputs, x.outputs, x.dtype, cuda.limits(x.device))
    if found is None:
        return None
    call, blocks, row_tiles = found
    sizes = (x.rows, x.inputs, x.outputs, x.weight_row, row_tiles, x.settled)
    return Shape(call, blocks, cuda.WARP * WARPS, call.shared, sizes)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of 8 and 64 rows for 768 and 1536 inputs."""
    if limits.shared < LISTED_SHARED:
        return []
    cases = (
        (8, 768, 3072, torch.bfloat16), (64, 768, 3072, torch.bfloat16),
        (64, 1536, 768, torch.bfloat16), (64, 1536, 768, torch.float16),
    )  # fmt: skip
    found = (_arrange(*case, limits) for case in cases)
    return [x[0] for x in found if x is not None]


cuda.KERNELS["linear_mma"] = kernels
