# SPDX-License-Identifier: MIT
# pyright: basic
"""What launchers over cuda/tiles.cuh share: fields of its structs, widths of accesses, grids."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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


class Layout(NamedTuple):
    """Where kernels begin in their arguments, and how they step.

    Attributes:
        inner: the inner one of two batch dimensions.
        sequences: strides (outer, inner, time, row) of what has numbers a step and row.
        rows: strides (outer, inner, row) of what has one number a row.
        steps: strides (outer, inner, time) of what has one number a step.
        offsets: in bytes, to the first step in the order of running: of sequences, then of steps.

    What is absent has zeros.
    """

    inner: int
    sequences: tuple[Strides, ...]
    rows: tuple[Strides, ...]
    steps: tuple[Strides, ...]
    offsets: tuple[int, ...]


def fields(
    tensors: Sequence[Tensor | None],
    strides: Sequence[Strides],
    offsets: Iterable[int] = itertools.repeat(0),
) -> list[int]:
    """Return (address, *strides) of every tensor; there may be more strides and offsets."""
    values: list[int] = []
    for t, s, offset in zip(tensors, strides, offsets, strict=False):
        values += (0 if t is None else t.data_ptr() + offset, *s)
    return values


def lay_out(
    batch: Sequence[int],
    length: int,
    sequences: Sequence[Strides | None],
    rows: Sequence[Strides | None],
    steps: Sequence[Strides | None],
    sizes: Sequence[int],
    falling: bool,
) -> Layout | None:
    """Return the layout, None where the batch dimensions need copies to become two.

    Args:
        batch: the dimensions before those of `Layout`.
        length: steps.
        sequences: strides of all dimensions, None where absent, as those of rows and steps.
        rows: the same.
        steps: the same.
        sizes: bytes of a number of each of the sequences, then of the steps.
        falling: run from the last step to the first.
    """
    merged = cuda.merge_batch(batch, [s for s in (*sequences, *rows, *steps) if s is not None])
    if merged is None:
        return None
    inner, found = merged
    outers = iter(found)
    sign, last = (-1, length - 1) if falling else (1, 0)
    times = [0 if s is None else s[-2] for s in sequences]
    times += [0 if s is None else s[-1] for s in steps]
    absent = (0, 0, 0)
    return Layout(
        inner,
        tuple(
            (*absent, 0) if s is None else (*next(outers), sign * s[-2], s[-1]) for s in sequences
        ),
        tuple(absent if s is None else (*next(outers), s[-1]) for s in rows),
        tuple(absent if s is None else (*next(outers), sign * s[-1]) for s in steps),
        tuple(last * time * size for time, size in zip(times, sizes, strict=True)),
    )


def beside(parameter: Tensor | None, shape: torch.Size) -> Tensor | None:
    """View (*shared, S) as (*batch, S), for sequences of ``shape`` (*batch, L, ...)."""
    if parameter is None:
        return None
    lead = parameter.shape[:-1]
    ones = (1,) * (len(shape) - 2 - len(lead))
    return parameter.view(*lead, *ones, -1).expand(*shape[:-2], -1)


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


def compact(x: Any) -> Any:
    """Return a copy of a tensor, whose batch dimensions merge and which is aligned."""
    return x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x


def words(count: int, device: torch.device) -> Tensor | None:
    """Return the words of a `Grid`, None where there are none."""
    return torch.zeros(count, dtype=torch.int64, device=device) if count else None


def exchange(words: Tensor | None) -> tuple[int, int]:
    """Return the fields through which tiles speak: the ticket, and the words behind it."""
    at = 0 if words is None else words.data_ptr()
    return at, at + 8


@functools.cache
def sum_kernel(dtype: torch.dtype, pack: int = 1) -> cuda.Kernel:
    """Return the kernel that adds up partial sums over tiles, of ``pack`` rows a thread."""
    definitions = {"DTYPE": cuda.NAMES[dtype], "WARPS": WARPS, "PACK": pack}
    return cuda.Kernel("sum.cu", "sum_partials", definitions, "2P2q")


def plan_of(operator: str, plans: Mapping[torch.dtype, Plan], dtype: torch.dtype) -> Plan:
    """Return how a dtype is computed.

    Raises:
        ValueError: it is not.
    """
    plan = plans.get(dtype)
    if plan is None:
        names = ", ".join(p.name for p in plans.values())
        raise ValueError(f"{operator}: dtype {dtype} on CUDA, expected one of {names}")
    return plan


def agree(
    operator: str,
    name: str,
    first: Tensor,
    others: Iterable[Tensor | None],
    dtypes: Iterable[torch.dtype],
) -> int:
    """Return the index of the device of all tensors.

    Args:
        operator: its name, for messages.
        name: of the first tensor, likewise.
        first: on a CUDA device.
        others: None where absent.
        dtypes: what those of the others must be, in their order; there may be more of these.

    Raises:
        ValueError: a tensor on another device or of another dtype.
    """
    device = first.get_device()
    for other, dtype in zip(others, dtypes, strict=False):
        if other is None:
            continue
        if other.get_device() != device:
            raise ValueError(f"{operator}: a tensor is on {other.device}, {name} on {first.device}")
        if other.dtype != dtype:
            raise ValueError(f"{operator}: a tensor is {other.dtype}, expected {dtype}")
    return device


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
