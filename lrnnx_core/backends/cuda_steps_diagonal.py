# SPDX-License-Identifier: MIT
"""One step of a state that channels share on CUDA: launches of cuda/step_diagonal.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lrnnx_core.backends import cuda
from lrnnx_core.backends.cuda_steps import (
    MOST_ROWS,
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

LAYOUT = "12Pd12q"
ENTRIES = ("diagonal_drive", "diagonal_read")
ROWS = 8  # that a warp works on together where there is more than one
Steps = tuple[Tensor, Tensor | None, bool, str]  # dt, timesteps, state_only, scheme


@functools.cache
def _kernel(
    entry: str, activations: torch.dtype, real: torch.dtype, scheme: str, split: bool, rows: int,
    vector: int,
) -> cuda.Kernel:  # fmt: skip
    definitions = {
        "ENTRY": ENTRIES.index(entry),
        **names(activations, real),
        "SCHEME": scheme.upper(),
        "SPLIT": "true" if split else "false",
        "EXACT_ANGLES": 1,
        "ROWS": rows,
        "COLUMNS": 1 if rows == 1 else 2,
        "WARPS": 2 if rows == 1 else 4,
        "VECTOR": vector,
    }
    return cuda.Kernel("step_diagonal.cu", entry, definitions, LAYOUT, overlaps=True)


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels of S5, LRU and Event-SSM: discrete ones, and under irregular time."""
    found: list[cuda.Kernel] = []
    for activations, real, vector, most in (
        (torch.float32, torch.float32, 2, ROWS), (torch.bfloat16, torch.float32, 2, ROWS),
        (torch.float64, torch.float64, 1, 1),
    ):  # fmt: skip
        for rows in sorted({1, most}):
            for entry in ENTRIES:
                found.append(_kernel(entry, activations, real, "none", False, rows, vector))
    for scheme, split in (("zoh", False), ("zoh", True)):
        found.append(
            _kernel("diagonal_drive", torch.float32, torch.float32, scheme, split, ROWS, 2)
        )
    return found


@kernel
def diagonal_step(
    device: int,
    u: Tensor,
    state: Tensor,
    a: Tensor,
    gain: Tensor | None,
    B: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.diagonal_step`."""
    return _step(device, u, state, a, gain, B, C_re, C_im, D, scale, None)


@kernel
def flow_step(
    device: int,
    u: Tensor,
    state: Tensor,
    A: Tensor,
    dt: Tensor,
    timesteps: Tensor | None,
    B: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    scale: float,
    state_only: bool,
    scheme: str,
) -> tuple[Tensor, Tensor] | None:
    """Leaf; the contract is that of `lrnnx_core.ops._step_formulas.flow_step`."""
    steps = (dt, timesteps, state_only, scheme)
    return _step(device, u, state, A, None, B, C_re, C_im, D, scale, steps)


def _step(
    device: int,
    u: Tensor,
    state: Tensor,
    a: Tensor,
    gain: Tensor | None,
    B: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    scale: float,
    flow: Steps | None,
) -> tuple[Tensor, Tensor] | None:
    kind, activations = a.dtype, u.dtype
    real = PARTS.get(kind)
    (states, width), outputs = B.shape, C_re.shape[0]
    count = u.numel() // width if width else 0
    if real is None or not fit(activations, real) or not 0 < count <= MOST_ROWS:
        return None
    if states == 0 or outputs == 0:
        return None

    def of_rows(t: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int]:
        if t is None or t.ndim <= 1:
            return (None if t is None else ready(t, dtype)), 0
        return rows_of(t.expand(state.shape), count, 1, dtype)

    dt, timesteps, state_only, scheme = (None, None, False, "none") if flow is None else flow
    x, u_row = rows_of(u, count, 1, activations)
    h, h_row = rows_of(state, count, 1, kind)
    decay, a_row = of_rows(a, kind)
    gain, gain_row = of_rows(gain, kind)
    dt, dt_row = of_rows(dt, real)
    elapsed, elapsed_row = None, 0
    if timesteps is not None:
        elapsed, elapsed_row = rows_of(timesteps, count, 0, real)
    B, C_re, C_im, D = ready(B, kind), ready(C_re, real), ready(C_im, real), ready(D, real)
    y, new = u.new_empty((*u.shape[:-1], outputs)), next_state(state, kind)
    values = (
        x.data_ptr(), h.data_ptr(), address(decay), address(gain), address(dt), address(elapsed),
        B.data_ptr(), new.data_ptr(), C_re.data_ptr(), C_im.data_ptr(), D.data_ptr(), y.data_ptr(),
        scale, count, width, states, outputs, u_row, h_row, a_row, gain_row, dt_row, elapsed_row,
        D.ndim > 1, state_only,
    )  # fmt: skip
    rows = 1 if count == 1 else ROWS
    split = scheme in ("zoh", "bilinear") and elapsed is not None and state_only
    most = min(2, pack(2, kind))
    for entry, size, columns, form in (
        ("diagonal_drive", width, states, (scheme, split)),
        ("diagonal_read", states, outputs, ("none", False)),
    ):
        found = _kernel(entry, activations, real, *form, rows, 1 if size % 2 else most)
        threads = 64 if rows == 1 else 128
        blocks = ceil(columns, 2 if rows == 1 else 8) * ceil(count, rows)
        found.launch(device, blocks, threads, 0, *values)
    return y, new


cuda.KERNELS["diagonal_step"] = kernels
