# SPDX-License-Identifier: MIT
"""Time torch.compile of every layer on a GPU: forward and training, beside eager and a CUDA graph.

    python -m benchmarks.cuda.compiled [NAME ...] [--jobs 8] [--json FILE]

Batch 8, width 256, 2048 samples, float32, TF32 matrix products off. Every layer is compiled whole
(``fullgraph=True``) in a process of its own, several at once; they are timed one by one, while
none compiles. The times are those of the clock on the wall, the host's work included, which is
what compiling spares; the ways take turns too. What the compiled layer gives and its gradients are
compared with eager ones.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.timing import write
from lrnnx_nn import LAYERS

SIZE = (8, 2048, 256)
MODES = {"torch.compile": "default", "reduce-overhead": "reduce-overhead"}
STATES = {"mamba": 16, "stream": 16}
TURNS, RUNS = 7, 10


@contextmanager
def held(lock: Path, *, alone: bool) -> Iterator[None]:
    """Compile beside others, or time alone: nobody does the one while somebody does the other."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            torch.cuda.synchronize()
            fcntl.flock(file, fcntl.LOCK_UN)


def timed(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median time of a call in ms, the ways taking turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, call in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(RUNS):
                call()
            torch.cuda.synchronize()
            found[name].append((time.perf_counter() - start) / RUNS * 1e3)
    return {name: round(statistics.median(times), 4) for name, times in found.items()}


def difference(got: list[Any], want: list[Any]) -> float:
    """Return the largest difference of a tensor, relative to its largest number."""
    pairs = zip(got, want, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def measure(name: str, lock: Path) -> dict[str, Any]:
    """Compile one layer in every mode, check it and time it."""
    with held(lock, alone=False):
        ways, row = compiled(name)
    with held(lock, alone=True):
        for kind, calls in ways.items():
            row[kind] = timed(calls)
    return row


def compiled(name: str) -> tuple[dict[str, dict[str, Callable[[], Any]]], dict[str, Any]]:
    """Return the calls to time, by kind and way, and what compiling took and changed."""
    torch.manual_seed(0)
    eager = LAYERS[name](SIZE[-1], STATES.get(name, 64)).cuda()
    u = torch.randn(SIZE, device="cuda")
    x = u.clone().requires_grad_()

    def forward(call: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return call(u)

    def training(call: Any, weights: list[Any]) -> list[Any]:
        torch.compiler.cudagraph_mark_step_begin()
        y = call(x)
        return [y, *torch.autograd.grad(y.square().mean(), weights)]

    weights = [x, *eager.parameters()]
    ways: dict[str, dict[str, Callable[[], Any]]] = {}
    ways["forward"] = {"eager": partial(forward, eager)}
    ways["training"] = {"eager": partial(training, eager, weights)}
    row: dict[str, Any] = {"compile_s": {}, "difference": {}}
    want = [t.detach().clone() for t in training(eager, weights)]
    for way, mode in MODES.items():
        layer = copy.deepcopy(eager)
        call, own = torch.compile(layer, fullgraph=True, mode=mode), [x, *layer.parameters()]
        start = time.perf_counter()
        for _ in range(3):
            forward(call)
        got: list[Any] = []
        for _ in range(3):
            got = [t.detach().clone() for t in training(call, own)]
        torch.cuda.synchronize()
        row["compile_s"][way] = round(time.perf_counter() - start, 1)
        row["difference"][way] = difference(got, want)
        ways["forward"][way] = partial(forward, call)
        ways["training"][way] = partial(training, call, own)
    return ways, row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(LAYERS))
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.cuda.compiled: needs a CUDA device")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "size": SIZE,
        "layers": {}, "failed": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
            lock = Path(folder) / "lock"
            jobs = {name: pool.submit(measure, name, lock) for name in arguments.names}
            for name, job in jobs.items():
                try:
                    report["layers"][name] = row = job.result()
                except Exception as error:  # noqa: BLE001  # the others are worth having
                    report["failed"][name] = f"{type(error).__name__}: {error}"[:300]
                    print(name, "failed:", report["failed"][name], flush=True)
                    continue
                print(name, row, flush=True)
    if arguments.json:
        write(report, arguments.json)
    slower = [
        f"{name}, {kind}, {way}"
        for name, row in report["layers"].items()
        for kind in ("forward", "training")
        for way in MODES
        if row[kind][way] > row[kind]["eager"]
    ]
    print("slower than eager:", "; ".join(slower) or "none")
    return len(report["failed"])


if __name__ == "__main__":
    sys.exit(main())
