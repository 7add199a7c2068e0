# SPDX-License-Identifier: MIT
# pyright: basic
"""Run kernels that hold no GIL on a few threads of this process.

The shares of a run are fixed by the number of items and workers alone, so that a result is bitwise
the same each time. The threads are those of torch's own operators, OpenMP's: after an operator they
spin for some milliseconds, waiting for the next one, and on a machine with no core to spare other
threads would have to share a core with them. Where torch has no OpenMP that can be reached, and in
a forked child, whose OpenMP waits for threads that the fork did not copy, Python's threads serve.

Whoever calls takes shares too, all that no other thread has begun: a run inside another one, or
many at once from several Python threads, cannot wait for each other.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

WORTH = 150_000  # nanoseconds of a share that pay for handing it to a thread
MOST = 256  # threads; they are started as they are needed


class _Threads:
    """The executor of this process, where OpenMP does not serve."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.executor: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[..., Any]) -> Future[Any] | None:
        with self.lock:
            if self.executor is None:
                self.executor = ThreadPoolExecutor(MOST, thread_name_prefix="lrnnx")
            try:
                return self.executor.submit(function)
            except RuntimeError:  # the interpreter is shutting down, or threads have run out
                return None

    def run(self, work: Callable[[], None], workers: int) -> None:
        """Call ``work`` here and in up to ``workers - 1`` threads, until all have returned."""
        handed = [self.submit(work) for _ in range(workers - 1)]
        try:
            work()
        finally:
            for future in handed:
                if future is not None and not future.cancel():
                    future.result()


class _Team:
    """The threads of the OpenMP that torch runs its operators on.

    ``GOMP_parallel`` is what GCC makes of ``#pragma omp parallel``; LLVM's and Intel's libraries on
    Linux have it too.
    """

    def __init__(self, parallel: Any) -> None:
        entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        parallel.restype = None
        parallel.argtypes = (entry, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self.parallel = parallel
        self.runs: dict[int, Callable[[], None]] = {}
        self.enter = entry(lambda token: self.runs[token]())

    def run(self, work: Callable[[], None], workers: int) -> None:
        """Call ``work`` in up to ``workers`` threads, this one among them, until all have returned.

        Inside another region OpenMP gives no thread but the one that asks.
        """
        errors: list[BaseException] = []

        def guarded() -> None:  # nobody above would see an interrupt
            try:
                work()
            except BaseException as error:  # noqa: BLE001  (raised below)
                errors.append(error)

        token = id(guarded)
        self.runs[token] = guarded
        try:
            self.parallel(self.enter, token, workers, 0)
        finally:
            del self.runs[token]
        work()  # nothing is left but where an interrupt came before the first line of ``guarded``
        if errors:
            raise errors[0]


def _find() -> _Threads | _Team:
    if torch.backends.openmp.is_available():
        try:
            # The symbol of the very library that torch is linked to: others have other threads.
            return _Team(ctypes.CDLL(torch._C.__file__).GOMP_parallel)
        except (AttributeError, OSError):
            pass
    return _Threads()


def _forget() -> None:
    global _threads
    _threads = _Threads()


_threads = _find()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def workers(items: int, nanoseconds: float) -> int:
    """Return how many workers to `run`: at most torch's threads, 1 where little is to be done.

    Args:
        items: independent pieces.
        nanoseconds: what one thread needs for all of them, roughly.
    """
    if nanoseconds < 2 * WORTH:  # a decoder's step
        return 1
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
    waiting = list(range(workers - 1, -1, -1))
    errors: dict[int, BaseException] = {}

    def work() -> None:
        while True:
            try:
                i = waiting.pop()
            except IndexError:
                return
            try:
                kernel(bounds[i], bounds[i + 1], i, *arguments)
            except BaseException as error:  # noqa: BLE001  (raised below)
                errors[i] = error

    _threads.run(work, workers)
    if errors:
        raise errors[min(errors)]
