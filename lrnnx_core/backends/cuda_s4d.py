# SPDX-License-Identifier: MIT
# pyright: basic
"""The scan of S4D on CUDA: shapes, strides, launches of cuda/s4d_scan.cu and those beside it.

The contract is that of `blocked_s4d`. The backward needs no kept states: it runs in reverse alone.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_s4d, cuda, cuda_s4d_chunks, cuda_tiles, library
from lrnnx_core.backends.reference import state_dtype

WARPS, STAGES = 4, 3
MOST_LANES = cuda.WARP
FEWEST = 4  # states that are added in a row: lanes with fewer would change the order of sums
MOST = {"forward": 8, "ends": 16, "backward": 8, "free": 8, "adjoint": 16}
"""States of 8 bytes that the registers of a lane hold."""
WORK = {
    "forward": (6, 10),
    "ends": (4, 3),
    "backward": (14, 14),
    "free": (10, 14),
    "adjoint": (8, 3),
}
"""Instructions a step of a lane: for each state, and besides."""
REGISTERS = {
    "forward": (3, 70),
    "ends": (2, 60),
    "backward": (6, 90),
    "free": (4, 90),
    "adjoint": (3, 75),
}
"""Numbers of a's dtype that a lane has for each state, and registers besides."""
LATENCY = 40  # cycles a step that one warp alone on a scheduler waits
LONG = 32768  # from this length on, time is cut into segments where a row does not fill the chip
NARROW, LONG_IF_NARROW = 32, 8192  # and from this one on where so many rows do not
SHORTEST = 2048  # steps of a segment
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMMON, SEQUENCE = "3PP3q11q", "P4q"
LAYOUTS = {
    "forward": COMMON + SEQUENCE + "5Pq",
    "backward": COMMON + SEQUENCE * 2 + "7P",
    "free": COMMON + SEQUENCE * 2 + "7P",
    "ends": COMMON + SEQUENCE + "2P",
    "adjoint": COMMON + SEQUENCE + "2P",
    "starts": COMMON + "4P",
}
ENTRIES = {
    "forward": "s4d_scan",
    "backward": "s4d_scan_backward",
    "free": "s4d_scan_free",
    "ends": "s4d_ends",
    "adjoint": "s4d_ends",
    "starts": "s4d_starts",
}
"""Entry points, each of a source of its name."""
THREADS_OF_STARTS = 128
TWO_INPUTS = ("backward", "free")


class Choice(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        step: "forward", "backward", "ends" or "adjoint" (of segments), "starts" (of both).
        dtype: of the sequences.
        state: of a and v.
        per_lane: states of a lane.
        lanes: that hold a channel's states.
    """

    step: str
    dtype: torch.dtype
    state: torch.dtype
    per_lane: int = 1
    lanes: int = 1

    @property
    def channels(self) -> int:
        """Channels of a warp."""
        return cuda.WARP // self.lanes


@functools.cache
def kernel(x: Choice) -> cuda.Kernel:
    """Return a kernel."""
    entry = ENTRIES[x.step]
    numbers: dict[str, object] = {"DTYPE": cuda.NAMES[x.dtype], "STATE": cuda.NAMES[x.state]}
    if x.step != "starts":
        held = x.per_lane * x.state.itemsize // 4  # registers of one number a state
        numbers_a_state, more = REGISTERS[x.step]
        registers = held * numbers_a_state + more
        numbers |= {
            "PER_LANE": x.per_lane,
            "LANES": x.lanes,
            "WARPS": WARPS,
            "STAGES": STAGES,
            "TOGETHER": max(4, min(16, (32 if x.step in TWO_INPUTS else 64) // x.per_lane)),
            "BLOCKS": max(1, min(8, 65536 // (cuda.WARP * WARPS * registers))),
        }
    if entry == "s4d_ends":
        numbers["ADJOINT"] = "true" if x.step == "adjoint" else "false"
    shared = shared_bytes(x)
    if shared:
        numbers["SHARED_BYTES"] = shared
    return cuda.Kernel(f"{entry}.cu", entry, numbers, LAYOUTS[x.step], shared)


def shared_bytes(x: Choice) -> int:
    """Return the dynamic shared memory of a block: tiles and sums of the backward."""
    if x.step not in TWO_INPUTS:
        return 0
    tile = x.channels * (8 if x.channels == cuda.WARP else 16) * x.dtype.itemsize
    totals = 2 * x.per_lane * WARPS * cuda.WARP * x.state.itemsize
    return WARPS * STAGES * 2 * tile + totals


def most_held(step: str, state: torch.dtype) -> int:
    """Return the most states of a lane."""
    return max(FEWEST, min(16, MOST[step] * 8 // state.itemsize))


@functools.lru_cache(maxsize=4096)
def choose(x: Choice, states: int, units: int, channels: int, multiprocessors: int) -> Choice:
    """Return x with states laid on lanes such that the chip is full.

    The order in which states are summed does not depend on it.

    Args:
        x: what is computed.
        states: of a channel.
        units: rows times segments.
        channels: of a row.
        multiprocessors: of the device.
    """
    padded = 1 << max(states - 1, 0).bit_length()
    most = most_held(x.step, x.state)
    wide = x.state.itemsize // 8 if x.state.is_complex else x.state.itemsize / 16
    each, more = WORK[x.step]

    def lay(held: int) -> Choice:
        per_lane = max(min(held, padded), padded // MOST_LANES)
        return x._replace(per_lane=per_lane, lanes=padded // per_lane)

    def cost(y: Choice) -> float:
        warps = units * -(-channels // y.channels)
        per_scheduler = -(-warps // (4 * multiprocessors))
        busy = each * y.per_lane * wide + more
        return max(per_scheduler * busy, busy + LATENCY)

    held = [n for n in (most, most // 2, most // 4) if n >= FEWEST]
    return min(dict.fromkeys(map(lay, held)), key=cost)


class Launch(NamedTuple):
    """Everything of a launch that does not change while shapes and strides do not.

    Attributes:
        kernel: what is launched.
        blocks: the grid.
        shared: dynamic shared memory of a block.
        sequences: strides (outer, inner, time, channel).
        reset: strides (outer, inner, time).
        sizes: `struct Size`.
    """

    kernel: cuda.Kernel
    blocks: int
    shared: int
    sequences: tuple[tuple[int, ...], ...]
    reset: tuple[int, ...]
    sizes: tuple[int, ...]


class Problem(NamedTuple):
    """Shapes and strides of the arguments.

    Attributes:
        dtype: of the sequences.
        state: of a and v.
        shape: of u.
        parameters: shape of a.
        sequences: strides of u, and of grad_y in a backward.
        reset: its strides, None where nothing is reset.
        alignment: of every sequence's address, modulo 16 bytes.
        device: its index.
        reverse: whether the scan runs from the last step to the first.
    """

    dtype: torch.dtype
    state: torch.dtype
    shape: torch.Size
    parameters: torch.Size
    sequences: tuple[tuple[int, ...], ...]
    reset: tuple[int, ...] | None
    alignment: tuple[int, ...]
    device: int
    reverse: bool = False

    @property
    def rows(self) -> int:
        """Batch elements."""
        return math.prod(self.shape[:-2])


@functools.lru_cache(maxsize=1024)
def segments(p: Problem) -> tuple[int, int]:
    """Return (steps, number) of the segments of time.

    They depend on a row's size, its dtypes and the device alone, as does the order of operations.
    """
    length, channels = p.shape[-2:]
    whole = max(length, 1), 1
    padded = 1 << max(p.parameters[-1] - 1, 0).bit_length()
    lanes = max(1, padded // most_held("forward", p.state))
    warps = -(-channels * lanes // cuda.WARP)
    fit = 4 * cuda.limits(p.device).multiprocessors // warps  # rows that fill the chip
    number = min(fit, length // SHORTEST)
    if number < 2 or length < (LONG if fit < NARROW else LONG_IF_NARROW):
        return whole
    unit = blocked_s4d.chunk_length(1)
    steps = -(-length // (number * unit)) * unit
    return steps, -(-length // steps)


@functools.lru_cache(maxsize=4096)
def launch(p: Problem, step: str) -> Launch | None:
    """Return a launch, None where batch dimensions take copies."""
    *batch, length, channels = p.shape
    axes, size = len(batch), p.dtype.itemsize
    present = [*p.sequences, *(() if p.reset is None else (p.reset,))]
    merged = cuda.merge_batch(batch, present)
    if merged is None or any(x % size for x in p.alignment):
        return None
    inner, found = merged
    outers = iter(found)
    sign = -1 if p.reverse else 1
    sequences = tuple((*next(outers), sign * s[axes], s[-1]) for s in p.sequences)
    reset = (0, 0, 0) if p.reset is None else (*next(outers), sign * p.reset[axes])
    wide = sum(
        1 << i
        for i, (s, at) in enumerate(zip(sequences, p.alignment, strict=True))
        if s[-1] == 1 and not at and not any(x * size % 16 for x in (*s[:-1], channels))
    )
    states, rows = p.parameters[-1], p.rows
    each, number = segments(p)
    x = Choice(step, p.dtype, p.state)
    if step == "starts":
        units, groups = rows * channels * states, 1
        blocks = -(-units // THREADS_OF_STARTS)
    else:
        x = choose(x, states, rows * number, channels, cuda.limits(p.device).multiprocessors)
        groups = -(-channels // x.channels)
        units = rows * number * groups
        blocks = -(-units // WARPS)
    alike = rows // math.prod(p.parameters[:-2])
    sizes = (
        length, channels, states, inner, alike, units, groups, each, number, sign * channels, wide,
    )  # fmt: skip
    return Launch(kernel(x), blocks, shared_bytes(x), sequences, reset, sizes)


def _launch(p: Problem, step: str) -> Launch:
    call = launch(p, step)
    if call is None:
        raise RuntimeError(f"s4d_scan: no launch for {p}")
    return call


class Inputs(NamedTuple):
    """Tensors of the arguments as the kernels read them."""

    sequences: tuple[Tensor, ...]
    a: Tensor
    v: Tensor
    lengths: Tensor | None
    reset: Tensor | None
    reverse: bool = False

    def problem(self) -> Problem:
        """Return shapes and strides."""
        u, a = self.sequences[0], self.a
        return Problem(
            u.dtype, a.dtype, u.shape, a.shape, tuple(t.stride() for t in self.sequences),
            None if self.reset is None else self.reset.stride(),
            tuple(t.data_ptr() % 16 for t in self.sequences), u.get_device(),
            self.reverse,
        )  # fmt: skip

    def first(self, t: Tensor | None, axis: int = -2) -> int:
        """Return the address of the first step run of a tensor with time on ``axis``."""
        if t is None:
            return 0
        steps = t.shape[axis] - 1 if self.reverse else 0
        return t.data_ptr() + steps * t.stride(axis) * t.itemsize

    def run(self, p: Problem, step: str, *rest: int, of: int | None = None) -> None:
        """Launch on the sequence ``of``, or all; ``rest`` are the arguments after them."""
        call = _launch(p, step)
        values: list[int] = [
            self.a.data_ptr(), self.v.data_ptr(), _at(self.lengths), self.first(self.reset, -1),
            *call.reset,
        ]  # fmt: skip
        *sizes, wide = call.sizes
        chosen = range(len(self.sequences)) if of is None else (of,)
        values += [*sizes, wide if of is None else wide >> of & 1]
        if step != "starts":
            for i in chosen:
                values += (self.first(self.sequences[i]), *call.sequences[i])
        threads = THREADS_OF_STARTS if step == "starts" else WARPS * cuda.WARP
        call.kernel.launch(p.device, call.blocks, threads, call.shared, *values, *rest)

    def starts(self, p: Problem, grad_last: Tensor | None) -> Tensor | None:
        """Return what segments begin with, None where there is one segment."""
        number = segments(p)[1]
        if number == 1:
            return None
        adjoint = grad_last is not None
        shape = (p.rows, number, *p.parameters[-2:])

        def states(kinds: int) -> Tensor:
            return torch.empty((kinds, *shape), dtype=p.state, device=self.a.device)

        ends, found = states(2 if adjoint else 1), states(4 if adjoint else 1)
        cut = torch.empty((p.rows, number), dtype=torch.uint8, device=self.a.device)
        step, of = ("adjoint", 1) if adjoint else ("ends", 0)
        self.run(p, step, ends.data_ptr(), cut.data_ptr(), of=of)
        self.run(
            p, "starts", ends.data_ptr(), _at(grad_last), cut.data_ptr(), found.data_ptr()
        )  # fmt: skip
        return found


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _inputs(
    sequences: tuple[Tensor, ...],
    a: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool = False,
) -> tuple[Inputs, Problem]:
    """Return what the kernels read; copies where they cannot read it as it lies."""
    ends = None if lengths is None else lengths.contiguous()
    x = Inputs(sequences, a.contiguous(), v.contiguous(), ends, reset, reverse)
    p = x.problem()
    if launch(p, "backward" if len(sequences) > 1 else "forward") is None:
        compact = torch.contiguous_format
        x = x._replace(
            sequences=tuple(t.clone(memory_format=compact) for t in sequences),
            reset=None if reset is None else reset.clone(memory_format=compact),
        )
        p = x.problem()
    return x, p


def s4d_scan(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    keep: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf: y (*batch, L, H), the last state (*batch, H, M), the kept ones, as `blocked_s4d`."""
    if not _fits("forward", a):
        return blocked_s4d.s4d_scan(u, a, v, D, lengths, reset, keep, reverse)
    device = _check("s4d_scan", u, a, v, D, lengths, reset)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return s4d_scan(u, a, v, D, lengths, reset, keep, reverse)
    batch, (length, channels), states = u.shape[:-2], u.shape[-2:], a.shape[-1]
    every = blocked_s4d.chunk_length(states)
    chunks = -(-length // every) if keep else 0
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty((*batch, channels, states), dtype=a.dtype, device=u.device)
    kept = torch.empty((*batch, chunks * channels * states), dtype=a.dtype, device=u.device)
    if not y.numel() or not last.numel():
        return blocked_s4d.with_direct(y.zero_(), D, u, lengths), last.zero_(), kept
    x, p = _inputs((u,), a, v, lengths, reset, reverse)
    starts = x.starts(p, None)
    direct = None if D is None else D.contiguous()
    if cuda_s4d_chunks.takes(p) and not chunks:
        addresses = _at(direct), _at(starts), x.first(y), last.data_ptr()
        cuda_s4d_chunks.run(x, p, _launch(p, "forward"), "forward", *addresses)
        return y, last, kept
    x.run(
        p, "forward", _at(direct), _at(starts), x.first(y), last.data_ptr(),
        kept.data_ptr() if chunks else 0, every,
    )  # fmt: skip
    return y, last, kept


def s4d_scan_backward(
    kept: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf: (du, da, dv, dD), as `blocked_s4d`; kept is not read."""
    if not _fits("backward", a):
        return blocked_s4d.s4d_scan_backward(
            kept, grad_y, grad_last, u, a, v, D, lengths, reset, reverse
        )
    device = _check("s4d_scan_backward", u, a, v, D, lengths, reset, grad_y, grad_last)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return s4d_scan_backward(kept, grad_y, grad_last, u, a, v, D, lengths, reset, reverse)
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if not u.numel() or not a.numel():
        compact = torch.contiguous_format
        da, dv = (torch.zeros_like(t, memory_format=compact) for t in (a, v))
        du, dD = blocked_s4d.direct_gradients(du.zero_(), grad_y, u, D, lengths)
        return du, da, dv, dD
    x, p = _inputs((u, grad_y), a, v, lengths, reset, reverse)
    grad_last = grad_last.contiguous()
    starts = x.starts(p, grad_last)
    pieces = p.rows * segments(p)[1]
    da, dv = (
        torch.empty((pieces, *a.shape[-2:]), dtype=a.dtype, device=a.device) for _ in range(2)
    )
    direct = dD = None
    if D is not None:
        direct = D.contiguous()
        dD = torch.empty((pieces, D.shape[-1]), dtype=D.dtype, device=D.device)
    partial = da.data_ptr(), dv.data_ptr(), _at(dD)
    rest = _at(direct), grad_last.data_ptr(), _at(starts), x.first(du), *partial
    if cuda_s4d_chunks.takes_backward(p, segments(p)[1]):
        addresses = _at(direct), _at(starts), x.first(du), *partial
        cuda_s4d_chunks.run(x, p, _launch(p, "backward"), "backward", *addresses, pieces)
        x.run(p, "free", *rest)
    else:
        x.run(p, "backward", *rest)
    return (
        du,
        _summed(da, a, device),
        _summed(dv, v, device),
        u.new_empty(0) if D is None or dD is None else _summed(dD, D, device),
    )


def _summed(partial: Tensor, parameter: Tensor, device: int) -> Tensor:
    """Sum (pieces, H, [M]) over the rows and segments of each copy of the parameter."""
    shared = parameter.shape[: parameter.ndim - partial.ndim + 1]
    pieces = partial.shape[0] // math.prod(shared)
    if math.prod(shared) > 1:
        return partial.view(*shared, pieces, *partial.shape[1:]).sum(len(shared))
    if pieces == 1:
        return partial.view(parameter.shape)
    real = torch.view_as_real(partial) if partial.is_complex() else partial
    out = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    cuda_tiles.add_up(device, real, torch.view_as_real(out) if out.is_complex() else out, pieces)
    return out


def _fits(step: str, a: Tensor) -> bool:
    """Return whether the registers of a warp hold a channel's states; else plain PyTorch runs."""
    return cuda.ready() and a.shape[-1] <= MOST_LANES * most_held(step, a.dtype)


def keeps(u: Tensor, a: Tensor) -> bool:
    """Return whether the backward of these arguments reads the states that the forward kept."""
    return u.device.type != "cuda" or not _fits("backward", a)


def _check(operator: str, u: Tensor, *others: Tensor | None) -> int:
    if u.dtype not in DTYPES:
        names = ", ".join(cuda.NAMES[t] for t in DTYPES)
        raise ValueError(f"{operator}: dtype {u.dtype} on CUDA, expected one of {names}")
    a, real = others[0], state_dtype(u.dtype)
    state = real if a is None or not a.is_complex() else torch.promote_types(real, torch.complex64)
    expected = (state, state, real, torch.int64, torch.bool, u.dtype, state)
    return cuda_tiles.agree(operator, "u", u, others, expected)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the variants that the library's models launch at ordinary sizes."""
    f32, bf16, c64 = torch.float32, torch.bfloat16, torch.complex64
    sizes = [(f32, c64, rows) for rows in (64, 1)] + [(bf16, c64, 64)]
    sizes += [(torch.float16, c64, 64), (torch.float64, torch.complex128, 64), (f32, f32, 64)]
    found: list[cuda.Kernel] = []
    for step in ("forward", "backward"):
        for dtype, state, rows in sizes:
            x = Choice(step, dtype, state)
            found.append(kernel(choose(x, 32, rows, 512, limits.multiprocessors)))
    for step in ("ends", "adjoint"):
        x = Choice(step, f32, c64)
        found.append(kernel(choose(x, 32, 64, 512, limits.multiprocessors)))
    found.append(kernel(Choice("starts", f32, c64)))
    chunks = cuda_s4d_chunks.kernels(limits)
    if chunks:
        x = Choice("free", f32, c64)
        found += [*chunks, kernel(choose(x, 32, 64, 512, limits.multiprocessors))]
    return list(dict.fromkeys(found))


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["s4d_scan"] = kernels
    return (
        library.implement("s4d_scan", "cuda", s4d_scan),
        library.implement("s4d_scan_backward", "cuda", s4d_scan_backward),
    )
