# SPDX-License-Identifier: MIT
"""A linear map of some rows on CUDA: shapes, and the launch of cuda/linear_tile.cu."""

from __future__ import annotations

import functools

import torch

from lrnnx_core.backends import cuda
from lrnnx_core.backends.cuda_linear import Map, Shape

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


def _tile(x: Map, limits: cuda.Limits) -> tuple[int, int]:
    """Return the largest tile of which there are enough and half of whose rows exist."""
    _, slices, long = partition(x.inputs, x.dtype)
    busy, best = BUSY * limits.multiprocessors, TILES[0]
    for high, wide in TILES[1 : len(TILES) - long - (x.dtype.itemsize > 4)]:  # registers
        tiles = -(-x.rows // (4 * high)) * -(-x.outputs // (8 * wide))
        fits = slices * _region(x.dtype, (high, wide), 1) <= limits.shared_per_block
        if fits and 2 * high < x.rows and tiles * slices >= busy:
            best = (high, wide)
    return best


def _stages(inputs: int, dtype: torch.dtype, tile: tuple[int, int], limits: cuda.Limits) -> int:
    """Return how many chunks of a warp are under way."""
    chunk, slices, _ = partition(inputs, dtype)
    stages = min(STAGES, -(-inputs // (slices * chunk)))
    while stages > 1 and slices * _region(dtype, tile, stages) > limits.shared_per_block:
        stages -= 1
    return stages


def shape(x: Map) -> Shape | None:
    """Return the launch, None where torch's product is faster."""
    most = MOST_PRODUCTS.get(x.dtype, 0)
    if x.tf32 and x.dtype is torch.float32:
        most = min(most, MOST_IN_TF32)
    if x.rows * x.inputs * x.outputs > most:
        return None
    _, slices, long = partition(x.inputs, x.dtype)
    width, size = 16 // x.dtype.itemsize, x.dtype.itemsize
    while x.inputs % width or x.weight_row % width or x.alignment % (width * size):
        width //= 2
    limits = cuda.limits(x.device)
    tile = _tile(x, limits)
    call = kernel(x.dtype, tile, slices, long, _stages(x.inputs, x.dtype, tile, limits), width)
    tiles = -(-x.rows // (4 * tile[0]))
    blocks = tiles * -(-x.outputs // (8 * tile[1]))
    sizes = (x.rows, x.inputs, x.outputs, x.inputs, x.weight_row, tiles, x.settled)
    return Shape(call, blocks, cuda.WARP * slices, call.shared, sizes)


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
