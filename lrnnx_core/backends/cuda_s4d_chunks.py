# SPDX-License-Identifier: MIT
# pyright: basic
"""The scan of S4D on tensor cores: launches of cuda/s4d_chunks.cu and its backward.

It takes what `cuda_s4d` has brought to strides and segments, where `takes` says so. Rows that share
parameters stand in groups of `PIECES` (or segments of rows do, where time is cut).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from lrnnx_core.backends import cuda

if TYPE_CHECKING:
    from lrnnx_core.backends.cuda_s4d import Inputs, Launch, Problem

PIECES = 8  # rows, or segments of rows, of a block
PAIRS = 4  # states of a tile
STAGES = 3
MOST = 64  # states of a channel
SHORTEST, LONGEST = 512, 2**30
"""Steps of a row: making the matrices takes as long as some hundred steps of the other form."""
FILLED = 0.5
"""Part of the chip that the blocks of a backward with more than 16 states have to fill."""
SHARED = 160 * 1024
"""Shared memory of a block on the devices that are meant: sm_80, 90 and 100, whose tensor cores and
float64 (of the matrices) are fast."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"forward": "3P10qP4q4P", "backward": "3P10qP4qP4q6Pq"}
ENTRIES = {"forward": "s4d_chunks", "backward": "s4d_chunks_backward"}


class Shape(NamedTuple):
    """What a kernel is compiled for, beside the dtype.

    Attributes:
        times: steps of a chunk.
        tiles: of four states, that a warp has.
        parts: warps of a channel.
        group: channels of a block.
        batch: tiles whose products are under way together.
        chain: tiles whose products are summed by the tensor cores.
        span: steps of a tile of the input in shared memory.
    """

    times: int
    tiles: int
    parts: int
    group: int
    batch: int
    chain: int
    span: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return cuda.WARP * self.group * self.parts

    def shared_bytes(self, step: str, dtype: torch.dtype) -> int:
        """Return the shared memory of a block: `struct Shared`."""
        row = self.span * self.group * dtype.itemsize + 16
        column = PIECES * (self.span + 8) + 4
        warps, eights = self.group * self.parts, self.times // 8
        blocks = eights * (eights + 1) // 2
        inputs = 2 if step == "backward" else 1
        total = STAGES * inputs * PIECES * row + 2 * warps * column * 4
        total += self.group * blocks * 512 + warps * self.tiles * 64
        if step == "backward":
            total += warps * self.tiles * 32 + 16 * (self.tiles + blocks) * self.threads
            total += self.group * self.times * 8
        return -(-(total + PIECES * (40 + 8 * inputs)) // 16) * 16


@functools.cache
def kernel(step: str, dtype: torch.dtype, x: Shape) -> cuda.Kernel:
    """Return a kernel."""
    shared = x.shared_bytes(step, dtype)
    numbers = {
        step.upper(): 1, "DTYPE": cuda.NAMES[dtype], "TIMES": x.times, "TILES": x.tiles,
        "PARTS": x.parts, "GROUP": x.group, "BATCH": x.batch, "CHAIN": x.chain, "SPAN": x.span,
        "STAGES": STAGES, "SHARED_BYTES": shared,
    }  # fmt: skip
    return cuda.Kernel(f"{ENTRIES[step]}.cu", ENTRIES[step], numbers, LAYOUTS[step], shared)


def shapes(step: str, states: int) -> tuple[Shape, Shape]:
    """Return a shape of many channels and one of few, which fills a chip with fewer of them.

    Forward: both give the same bits.
    """
    tiles = -(-states // PAIRS)
    backward = step == "backward"
    if tiles <= 4:
        batch = 2 if tiles % 2 == 0 else 1
        wide = Shape(16, tiles, 1, 8, batch, batch, 64)
        return wide, wide._replace(group=4)
    batch = 2 if backward else 4
    if tiles <= 8:
        wide = Shape(8 if backward else 16, 8, 1, 8, batch, 2, 64)
        return wide, Shape(16, 4, 2, 4, batch, 2, 64)
    wide = Shape(8 if backward else 16, 8, 2, 4, batch, 2, 64)
    return wide, wide


@functools.lru_cache(maxsize=4096)
def choose(step: str, p: Problem, groups: int) -> Shape:
    """Return the shape for so many groups of pieces: the one of few channels if one wave runs it.

    In more waves it is slower, half a sector of memory at a time.
    """
    wide, narrow = shapes(step, p.parameters[-1])
    limits = cuda.limits(p.device)
    blocks = groups * -(-p.shape[-1] // narrow.group)
    chosen = narrow if blocks <= limits.multiprocessors else wide
    return fitting(chosen, step, p.dtype, limits)


def fitting(x: Shape, step: str, dtype: torch.dtype, limits: cuda.Limits) -> Shape:
    """Return x, with shorter tiles where shared memory has no room for those."""
    fits = x.shared_bytes(step, dtype) <= limits.shared_per_block
    return x if fits else x._replace(span=32)


def groups_of(p: Problem, segments: int) -> tuple[int, int]:
    """Return the groups of pieces that share parameters, and how many copies of those there are."""
    copies = math.prod(p.parameters[:-2])
    return -(-(p.rows // copies) * segments // PIECES), copies


def takes(p: Problem) -> bool:
    """Return whether this form runs. It does not depend on the batch, as a row's bits may not."""
    return (
        p.reset is None
        and p.state == torch.complex64
        and p.dtype in DTYPES
        and p.parameters[-1] <= MOST
        and SHORTEST <= p.shape[-2] < LONGEST
        and cuda.limits(p.device).shared_per_block >= SHARED
    )


def takes_backward(p: Problem, segments: int) -> bool:
    """Return whether this form runs; few blocks of many states are slower than the other form."""
    if not takes(p):
        return False
    groups, copies = groups_of(p, segments)
    blocks = copies * groups * -(-p.shape[-1] // 4)
    return p.parameters[-1] <= 16 or blocks > FILLED * cuda.limits(p.device).multiprocessors


def run(x: Inputs, p: Problem, call: Launch, step: str, *rest: int) -> None:
    """Launch; ``call`` holds strides and sizes, ``rest`` are the arguments after the sequences."""
    length, channels, states, inner, alike, *_, segment, segments, onward, wide = call.sizes
    groups, copies = groups_of(p, segments)
    shape = choose(step, p, copies * groups)
    order = range(len(x.sequences))[::-1]  # of a backward: the cotangent, u
    if step == "backward":
        wide = wide >> 1 | (wide & 1) << 1
    sequences = [(x.first(x.sequences[i]), *call.sequences[i]) for i in order]
    k = kernel(step, p.dtype, shape)
    k.launch(
        p.device, copies * groups * -(-channels // shape.group), shape.threads, k.shared,
        x.a.data_ptr(), x.v.data_ptr(), 0 if x.lengths is None else x.lengths.data_ptr(),
        length, channels, states, inner, alike, segment, segments, groups, onward, wide,
        *(n for s in sequences for n in s), *rest,
    )  # fmt: skip


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the variants that the library's models launch at ordinary sizes."""
    if limits.shared_per_block < SHARED:
        return []
    dtypes = [(torch.float32, 2), (torch.bfloat16, 1)]
    return [
        kernel(step, dtype, fitting(x, step, dtype, limits))
        for step in ENTRIES
        for dtype, count in dtypes
        for x in shapes(step, 32)[:count]
    ]
