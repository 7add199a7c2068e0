# SPDX-License-Identifier: MIT
"""The linear scan's leaf operators on CUDA: shapes, strides, launches of cuda/linear_scan.cu."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import blocked, cuda, cuda_tiles, library
from lrnnx_core.backends.cuda_tiles import (
    BITS,
    EXCHANGE,
    INITIAL,
    SIZE,
    STRIDED,
    Layout,
    Plan,
    Strides,
)

# Chosen by timing (benchmarks/cuda/NOTES.md).
WARPS = 4  # of a block, at most
WINDOW = 32  # tiles that a block looks back at together
HEARD = 16  # bytes of these tiles' products that a lane waits for together
BLOCKS = 4  # that a multiprocessor has registers for: at most 128 a thread
PAIRED = 2  # bytes of a number that a lane computes in pairs, at most
LAYOUTS = {
    "forward": STRIDED * 2 + INITIAL + BITS + "PqP" + EXCHANGE + SIZE,
    "backward": STRIDED * 3 + INITIAL * 2 + BITS + "2Pq2P" + EXCHANGE + SIZE,
}

PLANS = {
    torch.float32: Plan("float32", torch.float32, 32),
    torch.float64: Plan("float64", torch.float64, 16),
    torch.bfloat16: Plan("bfloat16", torch.float32, 32),
    torch.float16: Plan("float16", torch.float32, 32),
    torch.complex64: Plan("complex64", torch.complex64, 16),
    torch.complex128: Plan("complex128", torch.complex128, 8),
}


@functools.cache
def kernel(step: str, dtype: torch.dtype, varying: bool, pack: int, shared: int) -> cuda.Kernel:
    """Return a kernel.

    Args:
        step: "forward" or "backward".
        dtype: of the sequences.
        varying: whether `a` varies in time.
        pack: neighbouring channels that a lane computes.
        shared: the shared memory that a block of the device may have.
    """
    plan = PLANS[dtype]
    definitions = {
        "DTYPE": plan.name,
        "PACK": pack,
        "WARPS": WARPS,
        "STEPS": plan.steps,
        "BLOCKS": BLOCKS,
        "WINDOW": WINDOW,
        "AT_ONCE": max(1, HEARD // (plan.state.itemsize * pack)),
        "VARYING": "true" if varying else "false",
        step.upper(): 1,
    }
    entry = "linear_scan" if step == "forward" else "linear_scan_backward"
    most = _tile(step, dtype, varying, pack, shared)[1]
    return cuda.Kernel("linear_scan.cu", entry, definitions, LAYOUTS[step], most)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return every kernel that the two operators may launch on a device."""
    found: list[cuda.Kernel] = []
    for dtype in PLANS:
        packs = (1, 2) if dtype.itemsize == 2 else (1,)
        found += [
            kernel(step, dtype, varying, pack, limits.shared_per_block)
            for step in ("forward", "backward")
            for varying in (True, False)
            for pack in packs
        ]
        found.append(cuda_tiles.sum_kernel(dtype))
    found += [cuda_tiles.sum_kernel(d, 4) for d in (torch.float32, torch.bfloat16)]
    return found


def _tile(
    step: str, dtype: torch.dtype, varying: bool, pack: int, shared: int
) -> tuple[int, int, int]:
    """Return a tile's warps, its dynamic shared memory, and the static one of the kernel."""
    plan, rows = PLANS[dtype], cuda.WARP * pack
    static = cuda_tiles.static_shared(plan, pack, WARPS, WINDOW)
    warps = WARPS
    while True:
        arrays = (2 if step == "backward" else 1) + (1 if varying else 0)
        numbers = (arrays * warps * plan.steps + (0 if varying else 1)) * rows
        if warps == 1 or numbers * dtype.itemsize + static <= shared:
            return warps, numbers * dtype.itemsize, static
        warps //= 2


class Shape(NamedTuple):
    """Everything of a launch that does not change while shapes and strides do not.

    Attributes:
        kernel: what is launched.
        blocks: the grid.
        threads: of a block.
        shared: dynamic shared memory.
        tiles: in time; more than one speak to each other.
        words: 64-bit words through which they do.
        layout: of the arguments.
        sizes: the last fields of the arguments.
    """

    kernel: cuda.Kernel
    blocks: int
    threads: int
    shared: int
    tiles: int
    words: int
    layout: Layout
    sizes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _shape(
    step: str,
    dtype: torch.dtype,
    shape: torch.Size,
    varying: bool,
    sequences: tuple[Strides, ...],
    states: tuple[Strides | None, ...],
    reset: Strides | None,
    backwards: bool,
    alignment: int,
    device: int,
) -> Shape | None:
    """Return the launch, None where the batch dimensions need a copy to become two.

    Args:
        step: "forward" or "backward".
        dtype: of the sequences.
        shape: of the sequences that vary in time.
        varying: whether the first one does.
        sequences: strides.
        states: strides, None where absent.
        reset: strides, None where absent.
        backwards: run from the last step to the first.
        alignment: the bits of all sequences' addresses below 16.
        device: its index.
    """
    *batch, length, channels = shape
    size, a = dtype.itemsize, sequences[0]
    stepped = sequences if varying else ((*a[:-2], 0, a[-1]), *sequences[1:])
    sizes = (*(size,) * len(sequences), 1)
    layout = cuda_tiles.lay_out(batch, length, stepped, states, (reset,), sizes, backwards)
    if layout is None or alignment % size:
        return None
    wide, pack = cuda_tiles.access(shape, sequences, alignment, size, PAIRED)
    limits = cuda.limits(device)
    warps, shared, static = _tile(step, dtype, varying, pack, limits.shared_per_block)
    grid = cuda_tiles.grid(limits, PLANS[dtype], shape, pack, warps, shared + static)
    rows = math.prod(batch) * channels
    return Shape(
        kernel(step, dtype, varying, pack, limits.shared_per_block),
        grid.blocks,
        grid.threads,
        shared,
        grid.tiles,
        grid.words,
        layout,
        (length, channels, layout.inner, rows, grid.tiles, grid.chains, wide),
    )


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Leaf: all states h (..., L, S) and the last one (..., S), as `blocked.linear_scan`."""
    if not cuda.ready() or a.dtype != b.dtype:
        return blocked.linear_scan(a, b, h0, reset, reverse)
    plan, device = _check("linear_scan", b, a=a, h0=h0, reset=reset)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return linear_scan(a, b, h0, reset, reverse)
    shape = b.shape
    h = torch.empty(shape, dtype=b.dtype, device=b.device)
    last = torch.empty(shape[:-2] + shape[-1:], dtype=plan.state, device=b.device)
    if last.numel() == 0:
        return h, last
    length, channels = shape[-2:]
    if length == 0:
        return h, last.zero_() if h0 is None else last.copy_(h0)
    if h0 is not None and h0.dtype != plan.state:
        h0 = h0.to(plan.state)
    at_a, at_b = a.data_ptr(), b.data_ptr()
    call = _shape(
        "forward", b.dtype, shape, a.shape[-2] == length, (a.stride(), b.stride()),
        (None if h0 is None else h0.stride(),), None if reset is None else reset.stride(),
        reverse, (at_a | at_b) & 15, device,
    )  # fmt: skip
    if call is None:
        return linear_scan(*_copies(a, b, h0, reset), reverse)
    words = cuda_tiles.words(call.words, b.device)
    at_h, (_, sequences, states, steps, offsets) = h.data_ptr(), call.layout
    call.kernel.launch(
        device, call.blocks, call.threads, call.shared,
        at_a + offsets[0], *sequences[0],
        at_b + offsets[1], *sequences[1],
        0 if h0 is None else h0.data_ptr(), *states[0],
        0 if reset is None else reset.data_ptr() + offsets[2], *steps[0],
        at_h + (length - 1) * channels * h.itemsize if reverse else at_h,
        -channels if reverse else channels,
        last.data_ptr(),
        *cuda_tiles.exchange(words),
        *call.sizes,
    )  # fmt: skip
    return h, last


def linear_scan_backward(
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    grad_h: Tensor,
    grad_last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: gradients (da, db, dh0), as `blocked.linear_scan_backward`."""
    if not cuda.ready() or not a.dtype == h.dtype == grad_h.dtype:
        return blocked.linear_scan_backward(a, h, h0, reset, grad_h, grad_last, reverse)
    plan, device = _check(
        "linear_scan_backward", h, a=a, h0=h0, reset=reset, grad_h=grad_h, grad_last=grad_last
    )
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return linear_scan_backward(a, h, h0, reset, grad_h, grad_last, reverse)
    shape = h.shape
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    db = torch.empty(shape, dtype=h.dtype, device=a.device)
    dh0 = torch.empty(shape[:-2] + shape[-1:], dtype=plan.state, device=a.device)
    if dh0.numel() == 0:
        return da, db, dh0
    length, channels = shape[-2:]
    if length == 0:
        return da.zero_(), db, dh0.copy_(grad_last)
    if grad_last.dtype != plan.state:
        grad_last = grad_last.to(plan.state)
    if h0 is not None and h0.dtype != plan.state:
        h0 = h0.to(plan.state)
    varying = a.shape[-2] == length
    at_a, at_h, at_g = a.data_ptr(), h.data_ptr(), grad_h.data_ptr()
    states = (None if h0 is None else h0.stride(), grad_last.stride())
    call = _shape(
        "backward", h.dtype, shape, varying, (a.stride(), h.stride(), grad_h.stride()), states,
        None if reset is None else reset.stride(), not reverse, (at_a | at_h | at_g) & 15, device,
    )  # fmt: skip
    if call is None:
        a, h, h0, reset = _copies(a, h, h0, reset)
        grad_h, grad_last = grad_h.clone(memory_format=COMPACT), grad_last.contiguous()
        return linear_scan_backward(a, h, h0, reset, grad_h, grad_last, reverse)
    words = cuda_tiles.words(call.words, a.device)
    _, sequences, states, steps, offsets = call.layout
    partial, tiles = None, call.tiles
    if not varying and tiles > 1:
        partial = torch.empty(tiles * dh0.numel(), dtype=plan.state, device=a.device)
    end = 0 if reverse else (length - 1) * channels * h.itemsize
    call.kernel.launch(
        device, call.blocks, call.threads, call.shared,
        at_a + offsets[0], *sequences[0],
        at_h + offsets[1], *sequences[1],
        at_g + offsets[2], *sequences[2],
        0 if h0 is None else h0.data_ptr(), *states[0],
        grad_last.data_ptr(), *states[1],
        0 if reset is None else reset.data_ptr() + offsets[3], *steps[0],
        da.data_ptr() + end if varying else da.data_ptr(),
        db.data_ptr() + end,
        channels if reverse else -channels,
        dh0.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        *cuda_tiles.exchange(words),
        *call.sizes,
    )  # fmt: skip
    if partial is not None:
        cuda_tiles.add_up(device, partial, da, tiles)
    return da, db, dh0


COMPACT = torch.contiguous_format


def _copies(
    a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return compact copies, whose batch dimensions merge and which are aligned."""
    return (
        a.clone(memory_format=COMPACT),
        b.clone(memory_format=COMPACT),
        None if h0 is None else h0.contiguous(),
        None if reset is None else reset.contiguous(),
    )


def _check(operator: str, main: Tensor, **others: Tensor | None) -> tuple[Plan, int]:
    plan = cuda_tiles.plan_of(operator, PLANS, main.dtype)
    device = main.get_device()
    for name, other in others.items():
        if other is not None and other.get_device() != device:
            raise ValueError(
                f"{operator}: {name} is on {other.device}, the other tensors on {main.device}"
            )
    return plan, device


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["linear_scan"] = kernels
    return (
        library.implement("linear_scan", "cuda", linear_scan),
        library.implement("linear_scan_backward", "cuda", linear_scan_backward),
    )
