# SPDX-License-Identifier: MIT
# pyright: basic
"""How the kernels of single steps reach tensors: by address, for a step takes few microseconds.

A NumPy array of a tensor costs a microsecond, and a step has a dozen tensors. The caller holds the
tensors while a kernel runs; each is contiguous and of the kernel's dtype, complex ones as pairs.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import extending, types
from torch import Tensor

from lrnnx_core.backends.cpu.compiling import FASTMATH

LIKE = {torch.float32: np.zeros(1, np.float32), torch.float64: np.zeros(1, np.float64)}
"""An array of each dtype that kernels run in; they take one to know theirs."""
intrinsic: Any = extending.intrinsic  # pyright reads its other form alone
SCHEMES = {"mamba": 0, "dirac": 1, "zoh": 2, "bilinear": 3}
"""What kernels call the named discretizations."""
PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}
"""The dtype of the parts of complex numbers."""


def ready(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t contiguous, without lazy bits and of this dtype."""
    if t.dtype is dtype and t.is_contiguous() and not t.is_neg() and not t.is_conj():
        return t
    return t.resolve_conj().resolve_neg().to(dtype).contiguous()


def _scope(builder):
    """Return the metadata that tell memory which a kernel writes from what it only reads."""
    module = builder.module
    domain = module.add_metadata(["lrnnx step"])
    return module.add_metadata([module.add_metadata(["written", domain])])


def optional(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return `ready`, None for None."""
    return None if t is None else ready(t, dtype)


def address(t: Tensor | None) -> int:
    """Return where the numbers of a tensor are, 0 for None."""
    return 0 if t is None else t.data_ptr()


def small_batch(batch: int, products: int) -> bool:
    """Return whether a kernel's own loops over weights are quicker than matrix products of torch.

    Args:
        batch: rows.
        products: multiplications a row.
    """
    return batch < 4 or batch * products < 100_000


@intrinsic
def at(typingctx, address, start, like):
    """Return a pointer to the ``start``-th number of the dtype of ``like`` at ``address``."""
    result = types.CPointer(like.dtype)

    def codegen(context, builder, signature, args):
        base = builder.inttoptr(args[0], context.get_value_type(result))
        return builder.gep(base, [args[1]])

    return result(types.int64, types.int64, like), codegen


@intrinsic
def take(typingctx, pointer, index):
    """Return a number that the kernel never writes."""

    def codegen(context, builder, signature, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        value.set_metadata("noalias", _scope(builder))
        return value

    return pointer.dtype(pointer, types.int64), codegen


@intrinsic
def put(typingctx, pointer, index, value):
    """Write a number where `take` never reads."""

    def codegen(context, builder, signature, args):
        done = builder.store(args[2], builder.gep(args[0], [args[1]]))
        done.set_metadata("alias.scope", _scope(builder))
        return context.get_dummy_value()

    return types.none(pointer, types.int64, pointer.dtype), codegen


@intrinsic
def peek(typingctx, pointer, index):
    """Return a number that the kernel may have written."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(args[0], [args[1]]))

    return pointer.dtype(pointer, types.int64), codegen


_sums = numba.njit(nogil=True, error_model="numpy", fastmath=FASTMATH, forceinline=True)


@_sums
def dot(a, b, size, zero):
    """Return the inner product of ``size`` numbers that are only read, and ones made before."""
    total = zero
    for i in range(size):
        total += take(a, i) * peek(b, i)
    return total


@_sums
def dot_read(a, b, size, zero):
    """Return the inner product of ``size`` numbers that are only read."""
    total = zero
    for i in range(size):
        total += take(a, i) * take(b, i)
    return total


@_sums
def convolve(out, x, before, after, weight, bias, width, taps, like):
    """Write the last sample of a causal convolution of each channel, and what it has seen last.

    x (W,) comes after ``before`` (K - 1, W); ``after`` gets the last K - 1 of them. The weight at
    its address is (W, K).
    """
    zero = like.dtype.type(0)
    w, shift = at(weight, 0, like), at(bias, 0, like)
    for e in range(width):
        start = take(shift, e) if bias != 0 else zero
        put(out, e, start + take(w, e * taps + taps - 1) * take(x, e))
    for k in range(taps - 1):
        for e in range(width):
            seen = take(before, k * width + e)
            put(out, e, peek(out, e) + take(w, e * taps + k) * seen)
            if k > 0:
                put(after, (k - 1) * width + e, seen)
    if taps > 1:
        for e in range(width):
            put(after, (taps - 2) * width + e, take(x, e))
