# SPDX-License-Identifier: MIT
# pyright: basic
"""What launchers over cuda/tiles.cuh share: fields of its structs, widths of accesses, grids."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import cuda

Strides = tuple[int, ...]

WARPS = 8  # of a block, at most
MANY = 128  # blocks of a sum from which on a thread sums several rows
STRIDED, INITIAL, BITS, EXCHANGE, SIZE = "P4q", "P3q", "P3q", "2P", "7q"


class Plan(NamedTuple):
    """How a dtype is computed.

    Attributes:
        name: of the dtype in numbers.cuh.
        state: dtype of states and sums.
        steps: consecutive steps of a warp. Together with the warps of a block it fixes the order of
            operations; both depend on dtype, length and device alone, so that a row's result does
            not depend on the rows around it.
    """

    name: str
    state: torch.dtype
    steps: int


def access(
    shape: torch.Size, sequences: Sequence[Strides], alignment: int, size: int, paired: int
) -> tuple[int, int]:
    """Return which sequences are copied 16 bytes at a time, as bits, and the channels of a lane.

    Args:
        shape: of the sequences, (..., L, S).
        sequences: strides.
        alignment: the bits of all sequences' addresses below 16.
        size: bytes of a number.
        paired: bytes of a number up to which a lane may compute two neighbouring channels.
    """
    channels = shape[-1]
    whole = [s[-1] == 1 and all(x * size % 16 == 0 for x in s[:-1]) for s in sequences]
    wide = sum(1 << i for i, w in enumerate(whole) if w)
    if alignment or channels * size % 16:
        wide = 0
    even = channels % 2 == 0 and alignment % (2 * size) == 0
    pairs = all(s[-1] == 1 and not any(x % 2 for x in s[:-1]) for s in sequences)
    return wide, 2 if size <= paired and even and pairs else 1


def static_shared(plan: Plan, pack: int, warps: int, window: int) -> int:
    """Return a bound on the static shared memory of a kernel compiled for so many warps."""
    return (3 * warps + 2 * window + 1) * cuda.WARP * pack * plan.state.itemsize + 512


class Grid(NamedTuple):
    """The size of a launch.

    Attributes:
        blocks: the grid.
        threads: of a block.
        tiles: in time; more than one speak to each other.
        chains: groups of rows.
        words: 64-bit words through which tiles do, the ticket included.
    """

    blocks: int
    threads: int
    tiles: int
    chains: int
    words: int


def grid(
    limits: cuda.Limits, plan: Plan, shape: torch.Size, pack: int, warps: int, shared: int
) -> Grid:
    """Return the grid for sequences of ``shape`` whose blocks take ``shared`` bytes in all."""
    length = shape[-2]
    rows = math.prod(shape[:-2]) * shape[-1]
    tiles, chains = -(-length // (warps * plan.steps)), -(-rows // (cuda.WARP * pack))
    threads = cuda.WARP * min(warps, -(-length // plan.steps))
    resident = min(limits.shared // (shared + 1024), 2048 // threads)
    numbers = tiles * chains * cuda.WARP * pack * plan.state.itemsize // 4
    return Grid(
        min(tiles * chains, max(resident, 1) * limits.multiprocessors),
        threads,
        tiles,
        chains,
        1 + 2 * numbers if tiles > 1 else 0,
    )


@functools.cache
def sum_kernel(dtype: torch.dtype, pack: int = 1) -> cuda.Kernel:
    """Return the kernel that adds up partial sums over tiles, of ``pack`` rows a thread."""
    definitions = {"DTYPE": cuda.NAMES[dtype], "WARPS": WARPS, "PACK": pack}
    return cuda.Kernel("sum.cu", "sum_partials", definitions, "2P2q")


def add_up(device: int, partial: Tensor, out: Tensor, tiles: int) -> None:
    """Add up partial (tiles, *out.shape) into out, in an order that depends on tiles alone.

    Args:
        device: index of the current device, which both are on.
        partial: compact, in the dtype of sums for out's.
        out: compact.
        tiles: their number.
    """
    rows, threads = out.numel(), cuda.WARP * WARPS
    at, to = partial.data_ptr(), out.data_ptr()
    pack = 16 // partial.itemsize
    aligned = rows % pack == 0 and at % 16 == 0 and to % (pack * out.itemsize) == 0
    if not aligned or rows < pack * threads * MANY:
        pack = 1
    each = pack * threads if pack > 1 else cuda.WARP  # rows of a block
    sum_kernel(out.dtype, pack).launch(device, -(-rows // each), threads, 0, at, to, tiles, rows)
