# SPDX-License-Identifier: MIT
"""One step of the selective scan on CUDA: shapes, strides, the launch of cuda/selective_step.cu."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import cuda

THREADS = 128  # of a block, at most
BLOCKS = (6, 4)  # on a multiprocessor, at least, without and with a loop over states
COMMON_BLOCKS = 8  # the same for common calls
ROWS = 2  # of the batch that a thread works on together, at most
LANES = 16  # of a channel, at most
MOST_OF_A_ROW = 2**28  # numbers of a row's state, and of strides, where a call is common
CHANNELS, STATES = "P3q", "P4q"
LAYOUT = CHANNELS * 8 + STATES * 4 + "2P" + "10q"
# The tensors of a call in the order of the arguments' struct, and in that of the leaf operator.
FIELDS: tuple[str, ...] = (
    "u", "dt", "D", "z", "dt_bias", "decay_dt", "timesteps", "reset", "A", "h0", "B", "C",
)  # fmt: skip
ACTIVATIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Strides = tuple[int, ...]


def partition(states: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return (neighbouring states of a lane, lanes of a channel).

    They fix the order of the sum over states, so they depend on nothing else: a row's result does
    not depend on the rows around it, nor on how its numbers lie in memory.
    """
    vector = 16 // dtype.itemsize
    while states % vector:
        vector //= 2
    lanes = 1
    while lanes < LANES and lanes * vector < states:
        lanes *= 2
    return vector, lanes


@functools.cache
def kernel(
    activations: torch.dtype,
    state: torch.dtype,
    B: torch.dtype,
    C: torch.dtype,
    scheme: str,
    split: bool,
    states: int,
    rows: int,
    state_aligned: bool = True,
    matrix_aligned: bool = True,
    *,
    common: bool = False,
) -> cuda.Kernel:
    """Return a kernel.

    Args:
        activations: dtype of u and y.
        state: dtype of A and the state.
        B: dtype of the matrix.
        C: dtype of the matrix.
        scheme: the discretization.
        split: whether decay and input may have different steps.
        states: N; kernels of different N are the same unless `partition` tells them apart.
        rows: of the batch that a thread works on together.
        state_aligned: whether A and h0 may be read some neighbours at a time.
        matrix_aligned: whether B and C may.
        common: whether it is the call of a Mamba block, as `_common` says.
    """
    vector, lanes = partition(states, state)
    return _kernel(
        activations, state, B, C, scheme, split, vector, lanes, rows, states > vector * lanes,
        vector if state_aligned else 1, vector if matrix_aligned else 1, common,
    )  # fmt: skip


@functools.cache
def _kernel(
    activations: torch.dtype,
    state: torch.dtype,
    B: torch.dtype,
    C: torch.dtype,
    scheme: str,
    split: bool,
    vector: int,
    lanes: int,
    rows: int,
    loop: bool,
    state_width: int,
    matrix_width: int,
    common: bool,
) -> cuda.Kernel:
    definitions = {
        "DTYPE": cuda.NAMES[activations],
        "STATE": cuda.NAMES[state],
        "B_TYPE": cuda.NAMES[B],
        "C_TYPE": cuda.NAMES[C],
        "SCHEME": scheme.upper(),
        "SPLIT": "true" if split else "false",
        "VECTOR": vector,
        "LANES": lanes,
        "ROWS": rows,
        "LOOP": "true" if loop else "false",
        "STATE_WIDTH": state_width,
        "MATRIX_WIDTH": matrix_width,
        "COMMON": "true" if common else "false",
        "THREADS": THREADS,
        "BLOCKS": COMMON_BLOCKS if common else BLOCKS[loop],
    }
    return cuda.Kernel("selective_step.cu", "selective_step", definitions, LAYOUT, overlaps=True)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of the library's models: N = 16, 64 and, complex, 8; one row and many."""
    found: list[cuda.Kernel] = []
    for activations, rows in (
        (torch.float32, 2), (torch.float32, 1), (torch.bfloat16, 2), (torch.bfloat16, 1),
        (torch.float16, 2), (torch.float64, 1),
    ):  # fmt: skip
        state = torch.promote_types(activations, torch.float32)
        kind = (activations, state, activations, activations)
        found.append(kernel(*kind, "mamba", False, 16, rows, common=True))
    for activations in (torch.float32, torch.bfloat16):
        kind = (activations, torch.float32, activations, activations)
        found.append(kernel(*kind, "mamba", False, 256, 2, common=True))
        found.append(kernel(*kind, "zoh", False, 16, 2, common=True))
        found.append(kernel(*kind, "mamba", True, 16, 2))  # STREAM
    real = (torch.float32, torch.complex64)
    found.append(kernel(*real, torch.complex64, torch.complex64, "zoh", False, 8, 2))
    return found


class Shape(NamedTuple):
    """Everything of a launch that does not change while shapes, strides and dtypes do not.

    Attributes:
        casts: tensors, by name, that must first be brought to another dtype.
        kernel: what is launched; None where the batch dimensions need a copy to become two.
        blocks: the grid.
        threads: of a block.
        values: the fields of the arguments, zeros for the pointers.
        last: the shape of the last state.
    """

    casts: dict[str, torch.dtype]
    kernel: cuda.Kernel | None
    blocks: int
    threads: int
    values: tuple[int, ...]
    last: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _shape(
    shape: torch.Size,
    A_shape: torch.Size,
    groups: tuple[int, int],
    dtypes: tuple[torch.dtype | None, ...],
    strides: tuple[Strides | None, ...],
    alignment: tuple[int, int],
    softplus: bool,
    state_only: bool,
    scheme: str,
) -> Shape:
    """Return the launch.

    Args:
        shape: of u.
        A_shape: of A.
        groups: of B and C.
        dtypes: of the tensors in the order of `FIELDS`, None for one that is not given.
        strides: the same.
        alignment: the bits below 16 of the addresses of A and h0, and of B and C.
        softplus: the argument.
        state_only: the argument.
        scheme: the argument.
    """
    batch, channels, states = shape[:-2], shape[-1], A_shape[-1]
    named = dict(zip(FIELDS, dtypes, strict=True))
    where = dict(zip(FIELDS, strides, strict=True))
    activations, A = named["u"], named["A"]
    if activations not in ACTIVATIONS or A is None:
        names = ", ".join(cuda.NAMES[d] for d in ACTIVATIONS)
        raise ValueError(f"selective_step: dtype {activations} on CUDA, expected one of {names}")
    real = torch.promote_types(activations, A.to_real() if A.is_complex else A)
    real = torch.promote_types(real, torch.float32)
    state = torch.promote_types(real, A) if A.is_complex else real
    casts = _casts(named, activations, real, state)
    if casts:
        return Shape(casts, None, 0, 0, (), ())

    shared = len(A_shape) - 2
    spread = (0,) * (len(batch) - shared)
    places: list[Strides] = []
    for name in FIELDS:
        s = where[name]
        if s is None:
            places.append((0,) * len(batch))
        elif name in ("A", "D", "dt_bias"):
            places.append(s[:shared] + spread)
        else:
            places.append(tuple(0 if n == 1 else x for x, n in zip(s, batch, strict=False)))
    merged = cuda.merge_batch(batch, places)
    if merged is None:
        return Shape({}, None, 0, 0, (), ())
    inner, outers = merged
    fields = _fields(where, dict(zip(FIELDS, outers, strict=True)), groups)
    vector, lanes = partition(states, state)
    rows, total = 1, math.prod(batch)
    most = 1 if any(fields["A"][:2]) else min(ROWS, lanes)
    while rows < most and 2 * rows <= total:
        rows *= 2
    matrices = [named["B"] or real, named["C"] or real]
    state_aligned = (
        _aligned([fields["A"], fields["h0"]], vector, alignment[0], state.itemsize)
        and fields["A"][-1] == 1 and (where["h0"] is None or fields["h0"][-1] == 1)
    )  # fmt: skip
    matrix_aligned = (
        _aligned([fields["B"], fields["C"]], vector, alignment[1], max(
            m.itemsize for m in matrices)) and fields["B"][-1] == fields["C"][-1] == 1
    )  # fmt: skip
    call = kernel(
        activations, state, matrices[0], matrices[1], scheme,
        where["decay_dt"] is not None or (where["timesteps"] is not None and state_only),
        states, rows, state_aligned, matrix_aligned,
        common=softplus and state_aligned and matrix_aligned
        and states >= vector * lanes and inner == total
        and _common(named, fields, real, channels, states),
    )  # fmt: skip
    threads = min(THREADS, -(-max(channels, 1) * lanes // cuda.WARP) * cuda.WARP)
    blocks = -(-channels // (threads // lanes))
    wide = sum(1 << i for i, name in enumerate(FIELDS[:7]) if named[name] == real)
    values = [v for name in FIELDS for v in (0, *fields[name])]
    sizes = (
        total, inner, channels, states, channels // groups[0], channels // groups[1], blocks,
        wide, int(softplus), int(state_only),
    )  # fmt: skip
    last = (*batch, channels, states)
    return Shape({}, call, blocks * -(-total // rows), threads, (*values, 0, 0, *sizes), last)


def _common(
    named: dict[str, torch.dtype | None],
    fields: dict[str, Strides],
    real: torch.dtype,
    channels: int,
    states: int,
) -> bool:
    """Return whether a call is that of a Mamba block, but for the number of states.

    Args:
        named: dtypes; None for a tensor that is not given.
        fields: strides.
        real: the real dtype of the state.
        channels: E.
        states: N.
    """
    given = {name for name, dtype in named.items() if dtype is not None}
    return (
        given == {"u", "dt", "D", "z", "dt_bias", "A", "h0", "B", "C"}
        and named["D"] == named["dt_bias"] == real
        and named["u"] == named["dt"] == named["z"]
        and all(fields[name][-1] == 1 for name in ("u", "dt", "z"))
        and fields["D"] == fields["dt_bias"] == (0, 0, 1)
        and fields["A"] == (0, 0, states, 1)
        and fields["h0"][2:] == (states, 1)
        and fields["B"][2:] == fields["C"][2:] == (0, 1)
        and channels * states < MOST_OF_A_ROW
        and all(fields[name][1] < MOST_OF_A_ROW for name in ("u", "dt", "z"))
    )


def _casts(
    named: dict[str, torch.dtype | None],
    activations: torch.dtype,
    real: torch.dtype,
    state: torch.dtype,
) -> dict[str, torch.dtype]:
    """Return what must become another dtype, and which."""
    casts: dict[str, torch.dtype] = {}
    for name, dtype in named.items():
        if dtype is None or name == "reset":
            continue
        if name in ("A", "h0"):
            allowed: tuple[torch.dtype, ...] = (state,)
        elif name in ("B", "C"):
            allowed = (state, real, activations) if not dtype.is_complex else (state,)
        else:
            allowed = (real, activations)
        if dtype not in allowed:
            casts[name] = allowed[0]
    return casts


def _fields(
    where: dict[str, Strides | None], outers: dict[str, tuple[int, int]], groups: tuple[int, int]
) -> dict[str, Strides]:
    """Return the strides of every tensor in the order of its struct."""
    fields: dict[str, Strides] = {}
    for name in FIELDS[:8]:
        s = where[name]
        channel = 0 if s is None or name in ("timesteps", "reset") else s[-1]
        fields[name] = (*outers[name], channel)
    for name in FIELDS[8:]:
        s = where[name]
        fields[name] = (0, 0, 0, 0) if s is None else (*outers[name], s[-2], s[-1])
    for name, number in zip(("B", "C"), groups, strict=True):
        if number == 1:
            fields[name] = (*fields[name][:2], 0, fields[name][-1])
    return fields


def _aligned(fields: Sequence[Strides], vector: int, alignment: int, size: int) -> bool:
    return not alignment % min(16, vector * size) and not any(
        s % vector for strides in fields for s in strides[:3]
    )


def selective_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    decay_dt: Tensor | None,
    timesteps: Tensor | None,
    reset: Tensor | None,
    softplus: bool,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor]:
    """Return y (*batch, 1, E) and the next state (*batch, E, N) for L = 1.

    The arguments are those of `blocked_selective.selective_scan`.

    Raises:
        ValueError: a tensor on another device, or a dtype without a kernel.
    """
    tensors = (u, dt, D, z, dt_bias, decay_dt, timesteps, reset, A, h0, B, C)
    device = u.get_device()
    for t in tensors:
        if t is not None and t.get_device() != device:
            name = next(n for n, x in zip(FIELDS, tensors, strict=True) if x is t)
            raise ValueError(
                f"selective_step: {name} is on {t.device}, the other tensors on {u.device}"
            )
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return selective_step(
                u, dt, A, B, C, D, z, dt_bias, h0, decay_dt, timesteps, reset, softplus,
                state_only, scheme,
            )  # fmt: skip
    at_A, at_B, at_C = A.data_ptr(), B.data_ptr(), C.data_ptr()
    at_h0 = 0 if h0 is None else h0.data_ptr()
    shape = u.shape
    call = _shape(
        shape, A.shape, (B.shape[-2], C.shape[-2]),
        tuple([None if t is None else t.dtype for t in tensors]),
        tuple([None if t is None else t.stride() for t in tensors]),
        ((at_A | at_h0) & 15, (at_B | at_C) & 15), softplus, state_only, scheme,
    )  # fmt: skip
    if call.kernel is None:
        named = dict(zip(FIELDS, tensors, strict=True))
        for name, t in named.items():
            if t is None:
                continue
            named[name] = t.to(call.casts[name]) if name in call.casts else (
                t if call.casts else t.contiguous()
            )  # fmt: skip
        return selective_step(**named, softplus=softplus, state_only=state_only, scheme=scheme)  # pyright: ignore[reportArgumentType]
    y, last = u.new_empty(shape), A.new_empty(call.last)
    if call.blocks == 0:
        return y, last
    values = list(call.values)
    values[0], values[4] = u.data_ptr(), dt.data_ptr()
    if D is not None:
        values[8] = D.data_ptr()
    if z is not None:
        values[12] = z.data_ptr()
    if dt_bias is not None:
        values[16] = dt_bias.data_ptr()
    if decay_dt is not None:
        values[20] = decay_dt.data_ptr()
    if timesteps is not None:
        values[24] = timesteps.data_ptr()
    if reset is not None:
        values[28] = reset.data_ptr()
    values[32], values[37], values[42], values[47] = at_A, at_h0, at_B, at_C
    values[52], values[53] = y.data_ptr(), last.data_ptr()
    call.kernel.launch(device, call.blocks, call.threads, 0, *values)
    return y, last


cuda.KERNELS["selective_step"] = kernels
