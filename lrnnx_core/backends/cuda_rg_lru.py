# SPDX-License-Identifier: MIT
# pyright: basic
"""The RG-LRU's leaf operators on CUDA: shapes, strides, launches of cuda/rg_lru.cu."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_rg_lru, cuda, cuda_tiles, library
from lrnnx_core.backends.blocked_rg_lru import Arguments
from lrnnx_core.backends.cuda_tiles import (
    BITS,
    EXCHANGE,
    INITIAL,
    SIZE,
    STRIDED,
    Layout,
    Plan,
    Strides,
    beside,
    compact,
    fields,
)

WARPS = 4  # of a block, at most
HEARD = 8  # bytes of these tiles' products that a lane waits for together
UNROLL = 4  # steps, of one channel in float32
GATES = INITIAL * 3 + "P3q" + BITS * 2 + "2q"
LAYOUTS = {
    "forward": STRIDED * 3 + GATES + INITIAL + "PqP" + EXCHANGE + SIZE,
    "backward": STRIDED * 5 + GATES + INITIAL * 2 + "3Pq3P" + EXCHANGE + SIZE,
}
PLANS = {
    torch.float32: Plan("float32", torch.float32, 16),
    torch.float64: Plan("float64", torch.float64, 8),
    torch.bfloat16: Plan("bfloat16", torch.float32, 16),
    torch.float16: Plan("float16", torch.float32, 16),
}


@functools.cache
def kernel(step: str, dtype: torch.dtype, pack: int, shared: int) -> cuda.Kernel:
    """Return a kernel.

    Args:
        step: "forward" or "backward".
        dtype: of the sequences.
        pack: neighbouring channels that a lane computes.
        shared: the shared memory that a block of the device may have.
    """
    plan = PLANS[dtype]
    # blocks of 128 threads that a multiprocessor has registers for: 6 have 80 a thread, 4 have 128
    crowded = plan.state == torch.float64 or (pack == 2 and step == "backward")
    definitions = {
        "DTYPE": plan.name,
        "PACK": pack,
        "WARPS": WARPS,
        "STEPS": plan.steps,
        "BLOCKS": 4 if crowded else 6,
        "WINDOW": _window(dtype),
        "AT_ONCE": max(1, HEARD // (plan.state.itemsize * pack)),
        "UNROLL": UNROLL * 4 // (plan.state.itemsize * pack),
        step.upper(): 1,
    }
    entry = "rg_lru" if step == "forward" else "rg_lru_backward"
    most = _tile(step, dtype, pack, shared)[1]
    return cuda.Kernel("rg_lru.cu", entry, definitions, LAYOUTS[step], most)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return every kernel of rg_lru.cu on a device; the sums are listed by the linear scan."""
    return [
        kernel(step, dtype, pack, limits.shared_per_block)
        for dtype in PLANS
        for step in ("forward", "backward")
        for pack in ((1, 2) if dtype.itemsize == 2 else (1,))
    ]


def _window(dtype: torch.dtype) -> int:
    """Return how many tiles a block looks back at together; they hold three sums of each warp."""
    return 16 if dtype.itemsize == 2 else 8


def _tile(step: str, dtype: torch.dtype, pack: int, shared: int) -> tuple[int, int, int]:
    """Return a tile's warps, its dynamic shared memory, and the static one of the kernel."""
    plan = PLANS[dtype]
    static = cuda_tiles.static_shared(plan, pack, WARPS, _window(dtype))
    number = dtype.itemsize * (5 if step == "backward" else 3)
    if step == "forward" and plan.state != dtype:
        number += 2 * plan.state.itemsize  # decay and drive
    warps = WARPS
    while True:
        dynamic = number * warps * plan.steps * cuda.WARP * pack
        if warps == 1 or dynamic + static <= shared:
            return warps, dynamic, static
        warps //= 2


class Shape(NamedTuple):
    """Everything of a launch that does not change while shapes and strides do not.

    Attributes:
        kernel: what is launched.
        grid: its size.
        shared: dynamic shared memory.
        layout: of the arguments.
        sizes: the last fields of the arguments.
    """

    kernel: cuda.Kernel
    grid: cuda_tiles.Grid
    shared: int
    layout: Layout
    sizes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _shape(
    step: str,
    dtype: torch.dtype,
    shape: torch.Size,
    sequences: tuple[Strides, ...],
    rows: tuple[Strides | None, ...],
    steps: tuple[Strides | None, ...],
    alignment: int,
    device: int,
) -> Shape | None:
    """Return the launch, None where it takes copies; strides as in `Layout`, whole ones."""
    *batch, length, channels = shape
    size = dtype.itemsize
    sizes = (*(size,) * len(sequences), PLANS[dtype].state.itemsize, 1, 1)  # timesteps, bits
    layout = cuda_tiles.lay_out(batch, length, sequences, rows, steps, sizes, step == "backward")
    if layout is None or alignment % size:
        return None
    wide, pack = cuda_tiles.access(shape, sequences, alignment, size, 2)
    limits = cuda.limits(device)
    warps, shared, static = _tile(step, dtype, pack, limits.shared_per_block)
    grid = cuda_tiles.grid(limits, PLANS[dtype], shape, pack, warps, shared + static)
    of_rows = math.prod(batch) * channels
    return Shape(
        kernel(step, dtype, pack, limits.shared_per_block),
        grid,
        shared,
        layout,
        (length, channels, layout.inner, of_rows, grid.tiles, grid.chains, wide),
    )


def _launch_shape(
    step: str,
    sequences: tuple[Tensor, ...],
    rows: tuple[Tensor | None, ...],
    steps: tuple[Tensor | None, ...],
    device: int,
) -> Shape | None:
    alignment = 0
    for t in sequences:
        alignment |= t.data_ptr()
    first = sequences[0]
    return _shape(
        step, first.dtype, first.shape, tuple(t.stride() for t in sequences),
        tuple(None if t is None else t.stride() for t in rows),
        tuple(None if t is None else t.stride() for t in steps), alignment & 15, device,
    )  # fmt: skip


def _fields(
    call: Shape,
    sequences: tuple[Tensor, ...],
    rows: tuple[Tensor | None, ...],
    steps: tuple[Tensor | None, ...],
    choices: tuple[bool, bool],
) -> list[int]:
    """Return sequences, `struct Gates`, then the other rows: the three of Gates come first."""
    at = call.layout
    return [
        *fields(sequences, at.sequences, at.offsets),
        *fields(rows[:3], at.rows),
        *fields(steps, at.steps, at.offsets[len(sequences) :]),
        *choices,
        *fields(rows[3:], at.rows[3:]),
    ]


def rg_lru_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Leaf: all states h (*batch, L, W) and the last one (*batch, W), as `blocked_rg_lru`."""
    if not cuda.ready():
        return blocked_rg_lru.rg_lru_scan(*arguments)
    p = Arguments(*arguments)
    plan, device = _check("rg_lru_scan", *p.tensors)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return rg_lru_scan(*p)
    x, h0, shape = p.x, p.h0, p.x.shape
    h = torch.empty(shape, dtype=x.dtype, device=x.device)
    last = torch.empty(shape[:-2] + shape[-1:], dtype=plan.state, device=x.device)
    if last.numel() == 0:
        return h, last
    length, channels = shape[-2:]
    if length == 0:
        return h, last.zero_() if h0 is None else last.copy_(h0)
    rows = (*(beside(t, shape) for t in p.parameters), h0)
    call = _launch_shape("forward", p.sequences, rows, p.steps, device)
    if call is None:
        return rg_lru_scan(*map(compact, p))
    grid = call.grid
    words = cuda_tiles.words(grid.words, x.device)
    call.kernel.launch(
        device, grid.blocks, grid.threads, call.shared,
        *_fields(call, p.sequences, rows, p.steps, p.choices),
        h.data_ptr(), channels, last.data_ptr(), *cuda_tiles.exchange(words), *call.sizes,
    )  # fmt: skip
    return h, last


def rg_lru_scan_backward(
    h: Tensor, grad_h: Tensor, grad_last: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Leaf: gradients of the floating tensors, empty where absent, as `blocked_rg_lru`."""
    grads = (h, grad_h, grad_last)
    if not cuda.ready():
        return blocked_rg_lru.gradients(*grads, *arguments)
    p = Arguments(*arguments)
    plan, device = _check("rg_lru_scan_backward", *p.tensors, *grads)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return rg_lru_scan_backward(*grads, *p)
    x, shape = p.x, p.x.shape
    length, channels = shape[-2:]
    if x.numel() == 0:
        return _empty_gradients(grad_last, p)
    sequences = (*p.sequences, h, grad_h)
    rows = (*(beside(t, shape) for t in p.parameters), p.h0, grad_last)
    call = _launch_shape("backward", sequences, rows, p.steps, device)
    if call is None:
        return rg_lru_scan_backward(*map(compact, (*grads, *p)))
    dx, d_input, d_recurrent = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in "xir")
    dh0 = torch.empty(grad_last.shape, dtype=plan.state, device=x.device)
    grid = call.grid
    partial = torch.empty((grid.tiles, 3, *dh0.shape), dtype=plan.state, device=x.device)
    d_tau = None
    if p.timesteps is not None:
        d_tau = torch.empty(shape, dtype=plan.state, device=x.device)
    words = cuda_tiles.words(grid.words, x.device)
    end = (length - 1) * channels
    call.kernel.launch(
        device, grid.blocks, grid.threads, call.shared,
        *_fields(call, sequences, rows, p.steps, p.choices),
        *(t.data_ptr() + end * t.itemsize for t in (dx, d_input, d_recurrent)), -channels,
        0 if d_tau is None else d_tau.data_ptr() + end * d_tau.itemsize,
        dh0.data_ptr(), partial.data_ptr(), *cuda_tiles.exchange(words), *call.sizes,
    )  # fmt: skip
    sums = partial[0]
    if grid.tiles > 1:
        sums = torch.empty_like(sums)
        cuda_tiles.add_up(device, partial, sums, grid.tiles)
    return (
        dx,
        d_input,
        d_recurrent,
        *(
            grad_last.new_empty(0) if t is None else _over_batch(s, t)
            for t, s in zip(p.parameters, sums, strict=True)
        ),
        dh0,
        grad_last.new_empty(0) if d_tau is None else d_tau.sum(-1),
    )


COMPACT = torch.contiguous_format


def _over_batch(x: Tensor, parameter: Tensor) -> Tensor:
    """Sum (*batch, W) to the shape of a parameter, (*shared, W), in memory of its own."""
    dims = tuple(range(parameter.ndim - 1, x.ndim - 1))
    return x.sum(dims) if dims else x.clone()


def _empty_gradients(grad_last: Tensor, p: Arguments) -> tuple[Tensor, ...]:
    """Return the gradients where there is no step, row or channel."""
    found = [
        grad_last.new_empty(0) if t is None else torch.zeros_like(t, memory_format=COMPACT)
        for t in p.tensors[:8]
    ]
    found[6] = grad_last.clone(memory_format=COMPACT)
    return tuple(found)


def _check(operator: str, x: Tensor, *others: Tensor | None) -> tuple[Plan, int]:
    plan = cuda_tiles.plan_of(operator, PLANS, x.dtype)
    sequence, state = x.dtype, plan.state
    expected = (
        *(sequence,) * 2, *(state,) * 5, *(torch.bool,) * 2,  # gates to mask
        *(sequence,) * 2, state,  # h, grad_h, grad_last
    )  # fmt: skip
    return plan, cuda_tiles.agree(operator, "x", x, others, expected)


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["rg_lru_scan"] = kernels
    return (
        library.implement("rg_lru_scan", "cuda", rg_lru_scan),
        library.implement("rg_lru_scan_backward", "cuda", rg_lru_scan_backward),
    )
