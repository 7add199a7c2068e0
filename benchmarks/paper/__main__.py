# SPDX-License-Identifier: MIT
"""The sweeps that the paper of lrnnx publishes: LRU, S5 and Mamba, training and inference.

    python -m benchmarks.paper [--models S5] [--ways eager jax] [--jobs 8] [--folder FOLDER]
    python -m benchmarks.paper --render

Training is forward and backward of one layer, inference as many steps as the sequence is long, one
after the other. Lengths 8 ... 2048 at batch 32 and width 128; widths 16 ... 256 and batches
8 ... 128 at length 512; d_state 16, float32. 10 warm-ups, 90 runs, 5 repeats: mean and deviation of
the repeats (fewer runs where a cell takes long; the file says how many). The host's time counts.

Cells measured on the same kind of device are kept from an earlier run of a part. With ``--jobs``
so many processes fill the caches of the compilers first (torch.compile, XLA), then the cells are
timed one after another in this one. Figures of another device are never overwritten.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper import page
from benchmarks.paper.measure import (
    D_STATE,
    KINDS,
    MODELS,
    WAYS,
    Protocol,
    Size,
    milliseconds,
    once,
)
from lrnnx_nn.files import read_json, write_json

FOLDER = Path(__file__).parent.parent.parent / "docs" / "benchmarks"
BASE = Size(512, 128, 32)
SWEEPS = {
    "length": [BASE._replace(length=2**n) for n in range(3, 12)],
    "width": [BASE._replace(width=2**n) for n in range(4, 9)],
    "batch": [BASE._replace(batch=2**n) for n in range(3, 8)],
}
TINY = {"length": [Size(4, 8, 2), Size(8, 8, 2)], "width": [], "batch": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--seconds", type=float, default=Protocol().seconds, help="a cell, about")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile ahead")
    parser.add_argument("--tiny", action="store_true", help="see that it runs; writes nothing")
    parser.add_argument("--render", action="store_true", help="page and figure alone")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/jax_cache")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    file = arguments.folder / "paper.json"
    if not arguments.render and not arguments.tiny:
        other = measured_elsewhere(file)
        if other is not None:
            parser.error(f"{file} holds figures of {other}, name another --folder for these")
    if not arguments.render:
        if arguments.jobs > 1:
            compile_ahead(arguments)
        report = sweep(arguments, file)
        print(report["skipped"])
        if arguments.tiny:
            return
    page.write(read_json(file), arguments.folder)


def compile_ahead(arguments: argparse.Namespace) -> None:
    """Run every cell that a compiler compiles once, in several processes."""
    ways = [w for w in arguments.ways if w in ("compiled", "jax")]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        cells = itertools.product(arguments.models, arguments.kinds, ways)
        sizes = sizes_of(arguments.sweeps, arguments.tiny)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        jobs = {cell: pool.submit(once, *cell, sizes, device) for cell in cells}
        for cell, job in jobs.items():
            if job.exception() is not None:  # the measurement will say it again
                print("compiling ahead:", *cell, repr(job.exception())[:200], flush=True)


def sizes_of(sweeps: Iterable[str], tiny: bool) -> list[Size]:
    """Return the sizes of some sweeps, each once."""
    table = TINY if tiny else SWEEPS
    return list(dict.fromkeys(size for name in sweeps for size in table[name]))


def device_name() -> str:
    """Return what is measured here."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def measured_elsewhere(file: Path) -> str | None:
    """Return the device whose cells a file holds, if it is another one than this."""
    found = read_json(file)["device"] if file.is_file() else device_name()
    return None if found == device_name() else str(found)


def kept(file: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of an earlier run on the same device with the same software."""
    if not file.is_file():
        return []
    before = read_json(file)
    same = all(before[name] == about[name] for name in ("device", "torch", "d_state", "protocol"))
    return before["cells"] if same else []


def sweep(arguments: argparse.Namespace, file: Path | None = None) -> dict[str, Any]:
    """Measure every cell; one that does not run is named with its reason.

    The file, if given, is written as cells come, and what it held of others stays.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    protocol = Protocol(1, 1, 1, 0.1) if arguments.tiny else Protocol(seconds=arguments.seconds)
    report: dict[str, Any] = {
        "device": device_name(),
        "torch": torch.__version__,
        "d_state": D_STATE,
        "base": BASE._asdict(),
        "protocol": protocol._asdict(),
        "cells": [],
        "skipped": {},
    }
    file = None if arguments.tiny else file
    cells = {page.key(c): c for c in (kept(file, report) if file is not None else [])}
    for model, kind, way in itertools.product(arguments.models, arguments.kinds, arguments.ways):
        if way == "graph" and device == "cpu":
            continue
        torch.compiler.reset()
        measured: list[float] = []
        for size in sizes_of(arguments.sweeps, arguments.tiny):
            cell: dict[str, Any] = {"model": model, "kind": kind, "way": way, **size._asdict()}
            cells.pop(page.key(cell), None)
            try:
                run = KINDS[kind](model, way, size, device)
                cell |= milliseconds(run, protocol, device)
            except Exception as error:
                if way == "eager":
                    raise
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                report["skipped"][f"{model}, {kind}, {way}, {tuple(size)}"] = reason[:200]
                continue
            cells[page.key(cell)] = cell
            measured.append(cell["mean_ms"])
            del run
            gc.collect()
        report["cells"] = list(cells.values())
        if file is not None:
            write_json(file, report)
        shown = " ".join(f"{ms:.3f}" for ms in measured)
        print(f"{model} {kind} {way}: {shown} ms", flush=True)
    return report


if __name__ == "__main__":
    main()
