# SPDX-License-Identifier: MIT
"""The linear scan's leaf operators on CUDA: shapes, strides, launches of cuda/linear_scan.cu."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import blocked, cuda, cuda_tiles, library
from lrnnx_core.backends.cuda_tiles import BITS, EXCHANGE, INITIAL, SIZE, STRIDED, Plan, Strides

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
        offsets: in bytes, to the first step in the order of running: sequences, reset.
        strides: (outer, inner, time, row) of the sequences, then (outer, inner, row) of the states,
            then (outer, inner, time) of reset.
        sizes: the last fields of the arguments.
    """

    kernel: cuda.Kernel
    blocks: int
    threads: int
    shared: int
    tiles: int
    words: int
    offsets: tuple[int, ...]
    strides: tuple[Strides, ...]
    sizes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _shape(
    step: str,
    dtype: torch.dtype,
    shape: torch.Size,
    varying: bool,
    sequences: tuple[Strides, ...],
    states: tuple[Strides, ...],
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
        states: strides.
        reset: strides.
        backwards: run from the last step to the first.
        alignment: the bits of all sequences' addresses below 16.
        device: its index.
    """
    *batch, length, channels = shape
    size = dtype.itemsize
    all_strides = [*sequences, *states, *(() if reset is None else (reset,))]
    merged = cuda.merge_batch(batch, all_strides)
    if merged is None or alignment % size:
        return None
    inner, outers = merged
    wide, pack = cuda_tiles.access(shape, sequences, alignment, size, PAIRED)
    limits = cuda.limits(device)
    warps, shared, static = _tile(step, dtype, varying, pack, limits.shared_per_block)
    grid = cuda_tiles.grid(limits, PLANS[dtype], shape, pack, warps, shared + static)
    sign = -1 if backwards else 1
    pieces = [(*o, sign * s[-2], s[-1]) for o, s in zip(outers, sequences, strict=False)]
    if not varying:
        pieces[0] = (*outers[0], 0, sequences[0][-1])
    k = len(sequences)
    pieces += [(*o, s[-1]) for o, s in zip(outers[k:], states, strict=False)]
    if reset is not None:
        pieces.append((*outers[-1], sign * reset[-1]))
    shifts = [(length - 1) * s[-2] * size if backwards else 0 for s in sequences]
    if not varying:
        shifts[0] = 0
    shifts.append((length - 1) * reset[-1] if backwards and reset is not None else 0)
    rows = math.prod(batch) * channels
    return Shape(
        kernel(step, dtype, varying, pack, limits.shared_per_block),
        grid.blocks,
        grid.threads,
        shared,
        grid.tiles,
        grid.words,
        tuple(shifts),
        tuple(pieces),
        (length, channels, inner, rows, grid.tiles, grid.chains, wide),
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
        () if h0 is None else (h0.stride(),), None if reset is None else reset.stride(),
        reverse, (at_a | at_b) & 15, device,
    )  # fmt: skip
    if call is None:
        return linear_scan(*_copies(a, b, h0, reset), reverse)
    words = torch.zeros(call.words, dtype=torch.int64, device=b.device) if call.words else None
    exchange = 0 if words is None else words.data_ptr()
    offsets, strides = call.offsets, call.strides
    at_h = h.data_ptr()
    call.kernel.launch(
        device, call.blocks, call.threads, call.shared,
        at_a + offsets[0], *strides[0],
        at_b + offsets[1], *strides[1],
        *((0, 0, 0, 0) if h0 is None else (h0.data_ptr(), *strides[2])),
        *((0, 0, 0, 0) if reset is None else (reset.data_ptr() + offsets[-1], *strides[-1])),
        at_h + (length - 1) * channels * h.itemsize if reverse else at_h,
        -channels if reverse else channels,
        last.data_ptr(),
        exchange, exchange + 8,
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
    states = (grad_last.stride(),) if h0 is None else (grad_last.stride(), h0.stride())
    call = _shape(
        "backward", h.dtype, shape, varying, (a.stride(), h.stride(), grad_h.stride()), states,
        None if reset is None else reset.stride(), not reverse, (at_a | at_h | at_g) & 15, device,
    )  # fmt: skip
    if call is None:
        a, h, h0, reset = _copies(a, h, h0, reset)
        grad_h, grad_last = grad_h.clone(memory_format=COMPACT), grad_last.contiguous()
        return linear_scan_backward(a, h, h0, reset, grad_h, grad_last, reverse)
    words = torch.zeros(call.words, dtype=torch.int64, device=a.device) if call.words else None
    exchange = 0 if words is None else words.data_ptr()
    offsets, strides, tiles = call.offsets, call.strides, call.tiles
    partial = None
    if not varying and tiles > 1:
        partial = torch.empty(tiles * dh0.numel(), dtype=plan.state, device=a.device)
    end = 0 if reverse else (length - 1) * channels * h.itemsize
    call.kernel.launch(
        device, call.blocks, call.threads, call.shared,
        at_a + offsets[0], *strides[0],
        at_h + offsets[1], *strides[1],
        at_g + offsets[2], *strides[2],
        *((0, 0, 0, 0) if h0 is None else (h0.data_ptr(), *strides[4])),
        grad_last.data_ptr(), *strides[3],
        *((0, 0, 0, 0) if reset is None else (reset.data_ptr() + offsets[-1], *strides[-1])),
        da.data_ptr() + end if varying else da.data_ptr(),
        db.data_ptr() + end,
        channels if reverse else -channels,
        dh0.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        exchange, exchange + 8,
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
    plan = PLANS.get(main.dtype)
    if plan is None:
        names = ", ".join(p.name for p in PLANS.values())
        raise ValueError(f"{operator}: dtype {main.dtype} on CUDA, expected one of {names}")
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
