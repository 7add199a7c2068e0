# SPDX-License-Identifier: MIT
"""A linear map of some rows on CUDA: shapes, and the launch of cuda/linear_tile.cu."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lrnnx_core.backends import cuda

MOST_PRODUCTS = {torch.float32: 100_000_000, torch.float64: 8_000_000}
"""rows * inputs * outputs, above which torch is faster."""
MOST_IN_TF32 = 40_000_000  # where torch multiplies float32 in TF32
PIECES = 4  # of 16 bytes, of a row of a chunk: the inputs that a warp has in one go
SLICES = 16  # warps of a block among which the inputs are divided, at most
IN_A_ROW = 4  # chunks that a warp sums in a row, at most; more are summed two and two
STAGES = 3  # chunks of a warp under way, at most
TILES = ((1, 1), (2, 1), (4, 2), (4, 4), (8, 4), (8, 8))
"""(rows / 4, outputs / 8) of a block: sums of a lane, the smallest first."""
BUSY = 8  # warps of a multiprocessor, enough for a larger tile
LAYOUT = "4P7q"


def partition(inputs: int, dtype: torch.dtype) -> tuple[int, int, bool]:
    """Return what fixes the order of sums.

    Returns:
        Neighbouring inputs of a warp, warps of a block, whether a warp has more of them than it
        sums in a row.
    """
    chunk, slices = PIECES * 16 // dtype.itemsize, 1
    while slices < SLICES and slices * chunk < inputs:
        slices *= 2
    return chunk, slices, inputs > IN_A_ROW * slices * chunk


@functools.cache
def kernel(
    dtype: torch.dtype, tile: tuple[int, int], slices: int, long: bool, stages: int, width: int
) -> cuda.Kernel:
    """Return a kernel.

    Args:
        dtype: of everything.
        tile: rows / 4 and outputs / 8 of a block.
        slices: warps of a block, each with its share of the inputs.
        long: whether a warp's share is more than it sums in a row.
        stages: chunks of a warp under way.
        width: neighbouring numbers copied together.
    """
    definitions = {
        "DTYPE": cuda.NAMES[dtype],
        "LANE_ROWS": tile[0],
        "LANE_OUTPUTS": tile[1],
        "SHARES": slices,
        "LONG": "true" if long else "false",
        "PIECES": PIECES,
        "STAGES": stages,
        "COPIED": width,
        "UNROLL": 1 if tile[0] * tile[1] > 16 else PIECES,
        "BLOCKS": _blocks(tile, slices),
    }
    return cuda.Kernel(
        "linear_tile.cu", "linear_tile", definitions, LAYOUT,
        slices * _region(dtype, tile, stages), overlaps=True,
    )  # fmt: skip


def _blocks(tile: tuple[int, int], slices: int) -> int:
    """Return for how many blocks a multiprocessor shall have registers."""
    sums = tile[0] * tile[1]
    return 65536 // (32 * slices * (64 if sums <= 4 else 80 if sums <= 16 else 128))


def _region(dtype: torch.dtype, tile: tuple[int, int], stages: int) -> int:
    """Return the bytes of shared memory of a warp."""
    rows, outputs = tile
    return max(
        stages * (4 * rows + 8 * outputs) * PIECES * 16, rows * outputs * 32 * dtype.itemsize
    )


class Shape(NamedTuple):
    """The launch for inputs of certain shapes."""

    kernel: cuda.Kernel
    blocks: int
    threads: int
    shared: int
    sizes: tuple[int, ...]


def _tile(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, limits: cuda.Limits
) -> tuple[int, int]:
    """Return the largest tile of which there are enough and half of whose rows exist."""
    _, slices, long = partition(inputs, dtype)
    busy, best = BUSY * limits.multiprocessors, TILES[0]
    for high, wide in TILES[1 : len(TILES) - long - (dtype.itemsize > 4)]:  # registers
        tiles = -(-rows // (4 * high)) * -(-outputs // (8 * wide))
        fits = slices * _region(dtype, (high, wide), 1) <= limits.shared_per_block
        if fits and 2 * high < rows and tiles * slices >= busy:
            best = (high, wide)
    return best


def _stages(inputs: int, dtype: torch.dtype, tile: tuple[int, int], limits: cuda.Limits) -> int:
    """Return how many chunks of a warp are under way."""
    chunk, slices, _ = partition(inputs, dtype)
    stages = min(STAGES, -(-inputs // (slices * chunk)))
    while stages > 1 and slices * _region(dtype, tile, stages) > limits.shared_per_block:
        stages -= 1
    return stages


def takes(rows: int, inputs: int, outputs: int, dtype: torch.dtype, tf32: bool) -> bool:
    """Return whether this is faster than torch's product, which may be one in TF32."""
    most = MOST_PRODUCTS.get(dtype, 0)
    if tf32 and dtype is torch.float32:
        most = min(most, MOST_IN_TF32)
    return rows * inputs * outputs <= most


def shape(
    rows: int,
    inputs: int,
    outputs: int,
    weight_row: int,
    dtype: torch.dtype,
    alignment: int,
    device: int,
    settled: bool,
) -> Shape:
    """Return the launch; its arguments are those of `lrnnx_core.backends.cuda_linear_step`.

    Args:
        rows: of x, which is compact.
        inputs: neighbours in x and in the weight.
        outputs: rows of the weight.
        weight_row: from one to the next, in elements.
        dtype: of everything.
        alignment: what the addresses of x and the weight leave, divided by 16.
        device: the index of the device.
        settled: whether no kernel in flight writes the weight.
    """
    _, slices, long = partition(inputs, dtype)
    width = 16 // dtype.itemsize
    while inputs % width or weight_row % width or alignment % (width * dtype.itemsize):
        width //= 2
    limits = cuda.limits(device)
    tile = _tile(rows, inputs, outputs, dtype, limits)
    call = kernel(dtype, tile, slices, long, _stages(inputs, dtype, tile, limits), width)
    tiles = -(-rows // (4 * tile[0]))
    sizes = (rows, inputs, outputs, inputs, weight_row, tiles, settled)
    return Shape(call, tiles * -(-outputs // (8 * tile[1])), 32 * slices, call.shared, sizes)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return kernels of some dozens of rows for 128, 256 and 768 inputs."""
    found: list[cuda.Kernel] = []
    for dtype, inputs, tile in (
        (torch.float32, 128, (2, 1)), (torch.float32, 256, (1, 1)), (torch.float32, 768, (2, 1)),
        (torch.float32, 768, (8, 4)), (torch.float64, 128, (2, 1)),
    ):  # fmt: skip
        _, slices, long = partition(inputs, dtype)
        stages = _stages(inputs, dtype, tile, limits)
        found.append(kernel(dtype, tile, slices, long, stages, 16 // dtype.itemsize))
    return found


cuda.KERNELS["linear_tile"] = kernels
