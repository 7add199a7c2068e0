# SPDX-License-Identifier: MIT
"""What the launchers of single steps on CUDA share: which tensors kernels read as they lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import cuda, donation, library

MOST_ROWS = 256
"""Rows up to which kernels multiply by matrices themselves: cuBLAS is quicker with more."""
SHARED = 48 * 1024
"""Bytes of shared memory that a block has without asking."""
PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}
REALS = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
ALIGNED = 16  # bytes that memory is read at once, at most


def kernel(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step for CUDA tensors from ``launch(device, *arguments)`` of the same name.

    What ``launch`` returns None for, plain PyTorch computes.
    """
    name = launch.__name__

    @wraps(launch)
    def step(*arguments: Any) -> Any:
        device, result = _device(name, arguments), None
        if cuda.ready():
            if device == torch.cuda.current_device():
                result = launch(device, *arguments)
            else:
                with torch.cuda.device(device):
                    result = launch(device, *arguments)
        return library.default(name)(*arguments) if result is None else result

    return step


def _device(name: str, arguments: tuple[Any, ...]) -> int:
    first = arguments[0]
    device = first.get_device()
    for t in arguments:
        if isinstance(t, Tensor) and t.get_device() != device:
            raise ValueError(f"{name}: a tensor is on {t.device}, the first one on {first.device}")
    return device


def fit(activations: torch.dtype, real: torch.dtype | None) -> bool:
    """Return whether there are kernels for activations of one dtype and states of another."""
    if real not in REALS:
        return False
    return activations is real or (activations in HALVES and real is torch.float32)


def names(activations: torch.dtype, real: torch.dtype) -> dict[str, object]:
    """Return the definitions of these dtypes."""
    return {"DTYPE": cuda.NAMES[activations], "REAL": cuda.NAMES[real]}


def ready(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t compact, aligned, without lazy bits and of this dtype."""
    if t.is_conj() or t.is_neg():
        t = t.resolve_conj().resolve_neg()
    t = t if t.dtype is dtype else t.to(dtype)
    if t.is_contiguous():
        return t if t.data_ptr() % ALIGNED == 0 else t.clone()
    return t.contiguous()


def rows_of(t: Tensor, count: int, tail: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return t (*batch, *tail axes) with every row as of `ready`, and the stride of rows.

    Args:
        t: any strides.
        count: of the rows, at least 1.
        tail: axes of a row.
        dtype: of the result.
    """
    if t.is_contiguous() or t.is_conj() or t.is_neg():
        t = ready(t, dtype)
        return t, t.numel() // count
    t = t if t.dtype is dtype else t.to(dtype)
    shape = t.shape[t.ndim - tail :]
    flat = t.reshape(count, *shape)
    stride, size, compact = flat.stride(), 1, True
    for axis in range(tail, 0, -1):
        compact &= stride[axis] == size or shape[axis - 1] == 1
        size *= shape[axis - 1]
    near = (flat.data_ptr() | (stride[0] * flat.element_size() if count > 1 else 0)) % ALIGNED
    if not compact or (near and tail):
        flat = flat.clone(memory_format=torch.contiguous_format)
        return flat, size
    return flat, stride[0]


def either(
    t: Tensor | None, activations: torch.dtype, real: torch.dtype
) -> tuple[Tensor | None, int]:
    """Return parameters that are stored in either dtype, and whether it is the real one."""
    if t is None:
        return None, 0
    narrow = t.dtype is activations and activations is not real
    return ready(t, activations if narrow else real), int(not narrow)


def address(t: Tensor | None) -> int:
    """Return where a tensor is, 0 for None."""
    return 0 if t is None else t.data_ptr()


def next_state(old: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for the state that follows, see `donation.new_state`."""
    if old.is_conj() or old.is_neg():
        return torch.empty(old.shape, dtype=dtype, device=old.device)
    return donation.new_state(old, old.shape, dtype)


def pack(size: int, dtype: torch.dtype, lanes: int = 1) -> int:
    """Return how many neighbours of ``size`` numbers are read at once, so that lanes have work."""
    vector = ALIGNED // dtype.itemsize
    while vector > 1 and (size % vector or size // vector < lanes):
        vector //= 2
    return max(vector, 1)


def ceil(numerator: int, denominator: int) -> int:
    """Return the quotient rounded up."""
    return -(-numerator // denominator)
