# SPDX-License-Identifier: MIT
# pyright: basic
"""Run kernels that hold no GIL on a few threads of this process.

The shares of a run are fixed by the number of items and workers alone, so that a result is bitwise
the same each time. Whoever calls takes the first share, and then every other one that no thread has
begun: a run inside another one, or many at once from several Python threads, cannot wait for each
other. A forked child starts threads of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

WORTH = 150_000  # nanoseconds of a share that pay for handing it to a thread
MOST = 256  # threads; they are started as they are needed


class _Threads:
    """The executor of this process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop threads that a forked child does not have, and a lock that may be held for ever."""
        self.lock = threading.Lock()
        self.executor: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any] | None:
        with self.lock:
            if self.executor is None:
                self.executor = ThreadPoolExecutor(MOST, thread_name_prefix="lrnnx")
            try:
                return self.executor.submit(function, *arguments)
            except RuntimeError:  # the interpreter is shutting down, or threads have run out
                return None


_threads = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.forget)


def workers(items: int, nanoseconds: float) -> int:
    """Return how many workers to `run`: at most torch's threads, 1 where little is to be done.

    Args:
        items: independent pieces.
        nanoseconds: what one thread needs for all of them, roughly.
    """
    return max(1, min(torch.get_num_threads(), items, int(nanoseconds // WORTH)))


def run(kernel: Callable[..., Any], workers: int, items: int, *arguments: Any) -> None:
    """Call ``kernel(begin, end, worker, *arguments)`` for contiguous shares of [0, items).

    Raises:
        Exception: what the first worker (by number) that failed raised, after all have ended.
    """
    if workers <= 1:
        kernel(0, items, 0, *arguments)
        return
    bounds = [items * i // workers for i in range(workers + 1)]

    def share(i: int) -> None:
        kernel(bounds[i], bounds[i + 1], i, *arguments)

    handed = [(i, _threads.submit(share, i)) for i in range(1, workers)]
    errors: dict[int, BaseException] = {}

    def attempt(i: int, work: Callable[..., Any], *given: Any) -> None:
        try:
            work(*given)
        except BaseException as error:  # noqa: BLE001  (raised below)
            errors[i] = error

    attempt(0, share, 0)
    for i, future in reversed(handed):
        if future is None or future.cancel():
            attempt(i, share, i)
    for i, future in handed:
        if future is not None and not future.cancelled():
            attempt(i, future.result)
    if errors:
        raise errors[min(errors)]
