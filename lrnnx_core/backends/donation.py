# SPDX-License-Identifier: MIT
"""Which states a step may overwrite with the states that follow them.

A step is a pure function, except where its caller gives the states it passes in away: a captured
CUDA graph, which would copy every new state into the memory of the old one after the step. Kernels
of steps ask `new_state` for the memory of their outputs; they read each element of a state before
they write it, in the same thread or behind a barrier.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class _Given(threading.local):
    memory: frozenset[int] = frozenset()


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


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
