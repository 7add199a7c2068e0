# SPDX-License-Identifier: MIT
"""One step of a state for each channel on CUDA: launches of cuda/step_siso.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lrnnx_core.backends import cuda
from lrnnx_core.backends.cuda_steps import (
    PARTS,
    address,
    ceil,
    fit,
    kernel,
    names,
    next_state,
    pack,
    ready,
    rows_of,
)

LAYOUT = "11Pd9q"
THREADS, LANES, ROWS, MOST_RANK = 128, 16, 4, 4


@functools.cache
def _kernel(
    activations: torch.dtype, kind: torch.dtype, states: int, rows: int, rank: int
) -> cuda.Kernel:
    vector = pack(states, kind)
    return _variant(activations, kind, vector, _lanes(states, vector), rows, rank)


@functools.cache
def _variant(
    activations: torch.dtype, kind: torch.dtype, vector: int, lanes: int, rows: int, rank: int
) -> cuda.Kernel:
    definitions = {
        **names(activations, PARTS.get(kind, kind)),
        "STATE": cuda.NAMES[kind],
        "LANES": lanes,
        "VECTOR": vector,
        "ROWS": rows,
        "RANK": rank,
    }
    return cuda.Kernel("step_siso.cu", "siso_step", definitions, LAYOUT, overlaps=True)


def _lanes(states: int, vector: int) -> int:
    lanes = 1
    while lanes < LANES and lanes * vector < states:
        lanes *= 2
    return lanes


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of S4D and S4 with 32 complex states a channel."""
    found = [
        _kernel(activations, torch.complex64, 32, rows, rank)
        for activations in (torch.float32, torch.bfloat16)
        for rank in (0, 1)
        for rows in ((1, ROWS) if activations is torch.float32 or rank == 0 else (ROWS,))
    ]
    found.append(_kernel(torch.float32, torch.float32, 64, ROWS, 0))
    found.append(_kernel(torch.float64, torch.complex128, 32, 1, 0))
    return found


@kernel
def siso_step(
    device: int,
    u: Tensor,
    state: Tensor,
    a: Tensor,
    B: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    C_re: Tensor,
    C_im: Tensor | None,
    D: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.siso_step`."""
    kind, activations = a.dtype, u.dtype
    real = PARTS.get(kind, kind)
    width, states = a.shape[-2:]
    rank = 0 if U is None or V is None else U.shape[-3]
    count = u.numel() // width if width else 0
    if not fit(activations, real) or count == 0 or states == 0 or rank > MOST_RANK:
        return None
    if kind is real and (C_im is not None or rank):
        return None

    def of_rows(t: Tensor, tail: int) -> tuple[Tensor, int]:
        if t.ndim <= tail:
            return ready(t, kind), 0
        shape = (*state.shape[:-2], *t.shape[t.ndim - tail :])
        return rows_of(t.expand(shape), count, tail, kind)

    x, u_row = rows_of(u, count, 1, activations)
    h, h_row = rows_of(state, count, 2, kind)
    a, a_row = of_rows(a, 2)
    B, B_row = of_rows(B, 2)
    low, high, low_row = None, None, 0
    if U is not None and V is not None and rank:
        low, low_row = of_rows(U, 3)
        high, high_row = of_rows(V, 3)
        if low_row != high_row:  # one of them varies, or its rows lie apart
            shape = (*state.shape[:-2], *U.shape[-3:])
            low, high = (ready(t.expand(shape), kind) for t in (U, V))
            low_row = low.numel() // count
    channels = C_re.shape[0] if C_re.ndim > 2 else 1
    C_re = ready(C_re, real)
    C_im, D = (None if t is None else ready(t, real) for t in (C_im, D))
    y, new = u.new_empty((*u.shape[:-1], channels * width)), next_state(state, kind)
    lanes = _lanes(states, pack(states, kind))
    varying = count == 1 or a_row or B_row or low_row
    rows = 1 if varying else min(ROWS, lanes)
    blocks = ceil(width, THREADS // lanes) * ceil(count, rows)
    _kernel(activations, kind, states, rows, rank).launch(
        device, blocks, THREADS, 0, x.data_ptr(), h.data_ptr(), a.data_ptr(), B.data_ptr(),
        address(low), address(high), C_re.data_ptr(), address(C_im), address(D), y.data_ptr(),
        new.data_ptr(), scale, count, width, states, channels, u_row, h_row, a_row, B_row, low_row,
    )  # fmt: skip
    return y, new


cuda.KERNELS["siso_step"] = kernels
