# SPDX-License-Identifier: MIT
"""What the caller of a step says of memory: states that it gives away, weights that nobody writes.

A step is a pure function, except where its caller gives the states it passes in away: a captured
CUDA graph, which would copy every new state into the memory of the old one after the step. Kernels
of steps ask `new_state` for the memory of their outputs; they read each element of a state before
they write it, in the same thread or behind a barrier.

The other promise is that weights stay as they are: a kernel may then read them before the kernels
launched ahead of it have ended.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class _Given(threading.local):
    memory: frozenset[int] = frozenset()
    settled: frozenset[int] = frozenset()


_given = _Given()


@contextmanager
def donating(states: Iterable[Tensor]) -> Generator[None]:
    """Give the memory of these tensors, and of no others, away inside the block.

    It holds for the steps that this thread takes. Each must be the only reader of the state that it
    is given, and the last one.
    """
    before, _given.memory = _given.memory, frozenset(map(_address, states))
    try:
        yield
    finally:
        _given.memory = before


def new_state(old: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory for the state after a step: ``old`` itself if it was given away.

    A tensor that is no contiguous one of this shape and dtype is never overwritten.
    """
    shape = torch.Size(shape)
    if (
        _given.memory
        and old.dtype is dtype
        and old.shape == shape
        and old.is_contiguous()
        and _address(old) in _given.memory
    ):
        return old
    return old.new_empty(shape, dtype=dtype)


@contextmanager
def settling(weights: Iterable[Tensor]) -> Generator[None]:
    """Promise that no kernel writes the memory of these tensors, and of no others, for a while.

    It holds for what this thread launches inside the block: neither that, nor what the stream
    still runs when the first of it starts, writes there. A captured CUDA graph starts when all
    before it has ended.
    """
    before, _given.settled = _given.settled, frozenset(map(_address, weights))
    try:
        yield
    finally:
        _given.settled = before


def settled(weight: Tensor) -> bool:
    """Return whether nobody writes a tensor's memory, as `settling` has promised."""
    return bool(_given.settled) and _address(weight) in _given.settled


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
