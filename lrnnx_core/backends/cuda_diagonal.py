# SPDX-License-Identifier: MIT
# pyright: basic
"""The diagonal scan's leaf operators on CUDA: shapes, strides, launches of diagonal_scan.cu."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_diagonal, cuda, cuda_tiles, library
from lrnnx_core.backends.blocked_diagonal import Arguments
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
WINDOW = 32  # tiles that a block looks back at together
NARROW = 8  # the same where shared memory decides how many blocks there are
HEARD = 16  # bytes of these tiles' products that a lane waits for together
BLOCKS = 4  # that a multiprocessor has registers for: at most 128 a thread
UNROLL = {False: 16, True: 4}  # steps of the backward, by whether the decay varies
THREADS = 256  # that add up one number of a gradient
HALVES = STRIDED + "q"
MODEL = INITIAL * 2 + STRIDED + INITIAL + BITS * 2  # A, steps, dt, timesteps, reset, mask
LAYOUTS = {
    "forward": HALVES + MODEL + INITIAL + "2Pq" + EXCHANGE + SIZE,
    "backward": HALVES * 3 + MODEL + INITIAL * 2 + "3P2q2P" + EXCHANGE + SIZE,
}
C64, C128 = torch.complex64, torch.complex128
PLANS = {  # with the steps of a warp where the decay varies in time
    torch.float32: Plan("float32", C64, 16),
    torch.float64: Plan("float64", C128, 8),
    torch.bfloat16: Plan("bfloat16", C64, 16),
    torch.float16: Plan("float16", C64, 16),
}
LONGER = 2  # times as many where it does not and shared memory holds little else
UNSCALED = ("none", "dirac")  # schemes without the step in the gain


class Choice(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        dtype: of the sequences.
        scheme: the discretization's name.
        varying: whether the decay varies in time.
        split: whether timesteps are in the decay alone.
    """

    dtype: torch.dtype
    scheme: str
    varying: bool
    split: bool


def plan_of(step: str, choice: Choice) -> Plan:
    """Return how a kernel computes; what it depends on fixes the order of operations."""
    plan = PLANS[choice.dtype]
    if choice.varying or (step == "backward" and choice.scheme not in UNSCALED):
        return plan
    return plan._replace(steps=LONGER * plan.steps)


def _window(step: str, choice: Choice) -> int:
    return NARROW if choice.varying and step == "backward" else WINDOW


@functools.cache
def kernel(step: str, choice: Choice, shared: int) -> cuda.Kernel:
    """Return a kernel.

    Args:
        step: "forward" or "backward".
        choice: what it is compiled for.
        shared: the shared memory that a block of the device may have.
    """
    plan = plan_of(step, choice)
    definitions = {
        "DTYPE": plan.name,
        "STATE_TYPE": cuda.NAMES[plan.state],
        "SCHEME": choice.scheme.upper(),
        "VARYING": "true" if choice.varying else "false",
        "SPLIT": "true" if choice.split else "false",
        "PACK": 1,
        "WARPS": WARPS,
        "STEPS": plan.steps,
        "BLOCKS": BLOCKS,
        "WINDOW": _window(step, choice),
        "AT_ONCE": max(1, HEARD // plan.state.itemsize),
        "UNROLL": UNROLL[choice.varying] // (plan.state.itemsize // 8),
        "EXACT_ANGLES": 1,
        step.upper(): 1,
    }
    if not choice.varying:  # equal factors err in one direction
        definitions["COMPENSATED"] = 1
    entry = "diagonal_scan" if step == "forward" else "diagonal_scan_backward"
    most = _tile(step, choice, True, shared)[1]
    return cuda.Kernel("diagonal_scan.cu", entry, definitions, LAYOUTS[step], most)


@functools.cache
def sum_kernel(choice: Choice) -> cuda.Kernel:
    """Return the kernel that adds up the gradients of A and of a constant step."""
    plan = PLANS[choice.dtype]
    definitions = {
        "DTYPE": cuda.NAMES[plan.state],
        "STATE_TYPE": cuda.NAMES[plan.state],
        "SCHEME": choice.scheme.upper(),
        "VARYING": "true" if choice.varying else "false",
        "SPLIT": "false",
        "THREADS": THREADS,
        "EXACT_ANGLES": 1,
    }
    return cuda.Kernel("diagonal_sums.cu", "diagonal_sums", definitions, "5P4q")


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels that the library's models launch on a device."""
    F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    choices = [
        *(Choice(dtype, "none", False, False) for dtype in (F32, F64, BF16, F16)),
        Choice(F32, "zoh", False, False),
        Choice(F32, "zoh", True, False),
        Choice(F32, "dirac", True, False),
    ]
    found = [
        kernel(step, choice, limits.shared_per_block)
        for choice in choices
        for step in ("forward", "backward")
    ]
    return list(dict.fromkeys([*found, *(sum_kernel(_of_sums(c)) for c in choices)]))


def _of_sums(choice: Choice) -> Choice:
    """Return the choice with what the sums do not depend on left out."""
    wide = torch.float64 if choice.dtype == torch.float64 else torch.float32
    scheme = choice.scheme
    if choice.varying:  # copied as they are: any scheme with two sums
        scheme = "zoh"
    return Choice(wide, scheme, choice.varying, False)


def _tile(step: str, choice: Choice, timed: bool, shared: int) -> tuple[int, int, int]:
    """Return a tile's warps, its dynamic shared memory, and the static one of the kernel."""
    plan, item = plan_of(step, choice), choice.dtype.itemsize
    real = plan.state.itemsize // 2
    static = cuda_tiles.static_shared(plan, 1, WARPS, _window(step, choice))
    warps = WARPS
    while True:
        numbers = warps * plan.steps * cuda.WARP
        if step == "forward":
            number = 2 * item + (choice.varying * 2 * real * (1 if item == real else 2))
            dynamic = numbers * number
        else:
            number = (4 if choice.scheme in UNSCALED else 6) * item + choice.varying * real
            dynamic = numbers * number
            if choice.varying and timed:
                dynamic += warps * plan.steps * (cuda.WARP + 1) * real
        if warps == 1 or dynamic + static <= shared:
            return warps, dynamic, static
        warps //= 2


class Shape(NamedTuple):
    """Everything of a launch that does not change while shapes and strides do not.

    Attributes:
        kernel: what is launched.
        grid: its size.
        shared: dynamic shared memory.
        layout: of the arguments. Its sequences are x (and h, grad_h), with the elements from the
            real to the imaginary parts behind their strides, then dt.
        pieces: groups of rows that one batch element's channels lie in, at most.
        direction: 1 where time rises as the kernel goes, -1 where it falls.
        sizes: the last fields of the arguments.
    """

    kernel: cuda.Kernel
    grid: cuda_tiles.Grid
    shared: int
    layout: Layout
    pieces: int
    direction: int
    sizes: tuple[int, ...]

    @property
    def begins(self) -> int:
        """The first step run."""
        return 0 if self.direction > 0 else self.sizes[0] - 1


@functools.lru_cache(maxsize=4096)
def _shape(
    step: str,
    choice: Choice,
    shape: torch.Size,
    halves: tuple[Strides, ...],
    dt: Strides | None,
    rows: tuple[Strides | None, ...],
    steps: tuple[Strides | None, ...],
    alignment: tuple[int, int],
    reverse: bool,
    device: int,
) -> Shape | None:
    """Return the launch, None where it takes copies; strides as in `Layout`, whole ones."""
    *batch, length, width = shape
    channels = width // 2
    plan, size = plan_of(step, choice), choice.dtype.itemsize
    real = plan.state.itemsize // 2
    falling = reverse != (step == "backward")
    sizes = (*(size,) * len(halves), real, real, 1, 1)  # dt, timesteps, reset, mask
    layout = cuda_tiles.lay_out(batch, length, (*halves, dt), rows, steps, sizes, falling)
    if layout is None or alignment[0] % size or alignment[1] % real:
        return None
    of_rows = torch.Size((*batch, length, channels))
    bits, _ = cuda_tiles.access(of_rows, halves, alignment[0], size, 0)
    wide = bits & 1 | (bits >> 1 & 1) << 2 | (bits >> 2 & 1) << 3
    if dt is not None:
        wide |= cuda_tiles.access(of_rows, (dt,), alignment[1], real, 0)[0] << 1
    limits = cuda.limits(device)
    timed = steps[0] is not None
    warps, shared, static = _tile(step, choice, timed, limits.shared_per_block)
    grid = cuda_tiles.grid(limits, plan, of_rows, 1, warps, shared + static)
    of_all = math.prod(batch) * channels
    *of_halves, of_dt = layout.sequences
    in_halves = ((*s, channels * s[-1]) for s in of_halves)
    return Shape(
        kernel(step, choice, limits.shared_per_block),
        grid,
        shared,
        layout._replace(sequences=(*in_halves, of_dt)),
        _pieces(channels),
        -1 if falling else 1,
        (length, channels, layout.inner, of_all, grid.tiles, grid.chains, wide),
    )


def _launch_shape(
    step: str,
    p: Arguments,
    halves: tuple[Tensor, ...],
    rows: tuple[Tensor | None, ...],
    device: int,
) -> Shape | None:
    alignment, dt = 0, p.dt
    for t in halves:
        at = t.data_ptr()
        alignment |= at | at + t.shape[-1] // 2 * t.stride(-1) * t.itemsize
    return _shape(
        step, _choice(p), halves[0].shape, tuple(t.stride() for t in halves),
        None if dt is None else dt.stride(), tuple(None if t is None else t.stride() for t in rows),
        tuple(None if t is None else t.stride() for t in p.marks),
        (alignment & 15, 0 if dt is None else dt.data_ptr() & 15), p.reverse, device,
    )  # fmt: skip


def _fields(
    call: Shape, p: Arguments, halves: tuple[Tensor, ...], rows: tuple[Tensor | None, ...]
) -> list[int]:
    """Return halves, `struct Model`, then the rows that are no part of it (all but two)."""
    at, count = call.layout, len(halves)
    return [
        *fields(halves, at.sequences, at.offsets),
        *fields(rows[:2], at.rows),
        *fields((p.dt,), at.sequences[count:], at.offsets[count:]),
        *fields(p.marks, at.steps, at.offsets[count + 1 :]),
        *fields(rows[2:], at.rows[2:]),
    ]


def diagonal_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Leaf: all states h (*batch, L, 2S) and the last one, as `blocked_diagonal`."""
    if not cuda.ready():
        return blocked_diagonal.diagonal_scan(*arguments)
    p = Arguments(*arguments)
    plan, device = _check("diagonal_scan", *p.tensors)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return diagonal_scan(*p)
    x, A, h0, shape = p.x, p.A, p.h0, p.x.shape
    h = torch.empty(shape, dtype=x.dtype, device=x.device)
    last = torch.empty((*shape[:-2], A.shape[-1]), dtype=plan.state, device=x.device)
    if last.numel() == 0:
        return h, last
    if shape[-2] == 0:
        return h, last.zero_() if h0 is None else last.copy_(h0)
    rows = (beside(A, shape), beside(p.steps, shape), h0)
    call = _launch_shape("forward", p, (x,), rows, device)
    if call is None:
        return diagonal_scan(*map(compact, p))
    grid = call.grid
    words = cuda_tiles.words(grid.words, x.device)
    call.kernel.launch(
        device, grid.blocks, grid.threads, call.shared, *_fields(call, p, (x,), rows),
        h.data_ptr() + call.begins * shape[-1] * h.itemsize, last.data_ptr(), call.direction,
        *cuda_tiles.exchange(words), *call.sizes,
    )  # fmt: skip
    return h, last


def diagonal_scan_backward(
    h: Tensor, grad_h: Tensor, grad_last: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Leaf: gradients of the floating tensors, empty where absent, as `blocked_diagonal`."""
    grads = (h, grad_h, grad_last)
    if not cuda.ready():
        return blocked_diagonal.gradients(*grads, *arguments)
    p = Arguments(*arguments)
    plan, device = _check("diagonal_scan_backward", *p.tensors, *grads)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return diagonal_scan_backward(*grads, *p)
    x, A, dt, shape, size = p.x, p.A, p.dt, p.x.shape, p.A.shape[-1]
    if x.numel() == 0:
        return _empty_gradients(grad_last, p)
    halves = (x, h, grad_h)
    rows = (beside(A, shape), beside(p.steps, shape), p.h0, grad_last)
    call = _launch_shape("backward", p, halves, rows, device)
    if call is None:
        return diagonal_scan_backward(*map(compact, (*grads, *p)))
    real = _real(plan)
    dx = torch.empty(shape, dtype=x.dtype, device=x.device)
    dh0 = torch.empty(grad_last.shape, dtype=plan.state, device=x.device)
    ddt = d_tau = None
    if dt is not None:
        ddt = torch.empty(dt.shape, dtype=real, device=x.device)
    if p.timesteps is not None:
        make = torch.empty if _is_whole(size) else torch.zeros
        d_tau = make((*shape[:-1], call.pieces), dtype=real, device=x.device)
    grid = call.grid
    sums = 1 if p.scheme == "none" else 2
    partial = torch.empty((grid.tiles, sums, *dh0.shape), dtype=plan.state, device=x.device)
    words = cuda_tiles.words(grid.words, x.device)
    end = call.begins
    call.kernel.launch(
        device, grid.blocks, grid.threads, call.shared, *_fields(call, p, halves, rows),
        dx.data_ptr() + end * 2 * size * dx.itemsize,
        0 if ddt is None else ddt.data_ptr() + end * size * ddt.itemsize,
        0 if d_tau is None else d_tau.data_ptr() + end * call.pieces * d_tau.itemsize,
        call.pieces, call.direction, dh0.data_ptr(), partial.data_ptr(),
        *cuda_tiles.exchange(words), *call.sizes,
    )  # fmt: skip
    dA, dsteps = _add_up(device, _choice(p), partial, A, p.steps)
    absent = torch.empty(0, dtype=real, device=x.device)
    return (
        dx,
        dA,
        absent if dsteps is None else dsteps,
        absent.clone() if ddt is None else ddt,
        dh0,
        absent.clone() if d_tau is None else d_tau.sum(-1) if call.pieces > 1 else d_tau[..., 0],
    )


def _add_up(
    device: int, choice: Choice, partial: Tensor, A: Tensor, steps: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return dA and dsteps from the sums of every tile (tiles, sums, *batch, S)."""
    A = A.contiguous()
    steps = None if steps is None else steps.contiguous()
    dA, dsteps = torch.empty_like(A), None if steps is None else torch.empty_like(steps)
    tiles, rows = partial.shape[0], math.prod(partial.shape[2:])
    sum_kernel(_of_sums(choice)).launch(
        device, A.numel(), THREADS, 0,
        partial.data_ptr(), A.data_ptr(), 0 if steps is None else steps.data_ptr(), dA.data_ptr(),
        0 if dsteps is None else dsteps.data_ptr(), tiles, rows, A.shape[-1], rows // A.numel(),
    )  # fmt: skip
    return dA, dsteps


COMPACT = torch.contiguous_format


def _real(plan: Plan) -> torch.dtype:
    return torch.float64 if plan.state == C128 else torch.float32


def _is_whole(size: int) -> bool:
    """Return whether groups of rows and batch elements share their borders."""
    return size % cuda.WARP == 0 or cuda.WARP % size == 0


def _pieces(size: int) -> int:
    """Return how many groups of rows the channels of one batch element lie in, at most."""
    if _is_whole(size):
        return -(-size // cuda.WARP)
    return (size + cuda.WARP - 2) // cuda.WARP + 1


def _choice(p: Arguments) -> Choice:
    timed = p.timesteps is not None
    return Choice(p.x.dtype, p.scheme, timed or p.dt is not None, timed and p.state_only)


def _empty_gradients(grad_last: Tensor, p: Arguments) -> tuple[Tensor, ...]:
    """Return the gradients where there is no step, row or channel."""
    real = grad_last.real.dtype
    found = [
        grad_last.new_empty(0, dtype=real)
        if t is None
        else torch.zeros_like(t, memory_format=COMPACT)
        for t in p.tensors[:6]
    ]
    found[4] = grad_last.clone(memory_format=COMPACT)
    return tuple(found)


def _check(operator: str, x: Tensor, *others: Tensor | None) -> tuple[Plan, int]:
    plan = cuda_tiles.plan_of(operator, PLANS, x.dtype)
    state, real = plan.state, _real(plan)
    expected = (
        state, real, real, state, real, *(torch.bool,) * 2,  # A to mask
        *(x.dtype,) * 2, state,  # h, grad_h, grad_last
    )  # fmt: skip
    return plan, cuda_tiles.agree(operator, "x", x, others, expected)


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["diagonal_scan"] = kernels
    return (
        library.implement("diagonal_scan", "cuda", diagonal_scan),
        library.implement("diagonal_scan_backward", "cuda", diagonal_scan_backward),
    )
