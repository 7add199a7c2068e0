# SPDX-License-Identifier: MIT
"""The sweeps that the paper of lrnnx publishes: LRU, S5 and Mamba, training and inference.

    python -m benchmarks.paper [--out docs/benchmarks/paper.json] [--models S5] [--ways eager jax]
    python -m benchmarks.paper --draw

Training is forward and backward of one layer, inference as many steps as the sequence is long, one
after the other. Lengths 8 ... 2048 at batch 32 and width 128; widths 16 ... 256 and batches
8 ... 128 at length 512; d_state 16, float32. 10 warm-ups, 90 runs, 5 repeats: mean and deviation of
the repeats (fewer runs where a cell takes long; the file says how many). The host's time counts.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.measure import (
    D_STATE,
    MODELS,
    WAYS,
    Protocol,
    Size,
    inference,
    milliseconds,
    training,
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
KINDS = {"training": training, "inference": inference}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER / "paper.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--seconds", type=float, default=Protocol().seconds, help="a cell, about")
    parser.add_argument("--tiny", action="store_true", help="see that it runs; writes nothing")
    parser.add_argument("--draw", action="store_true", help="figure and table alone")
    arguments = parser.parse_args()
    if not arguments.draw:
        report = sweep(arguments)
        if arguments.tiny:
            return
        write_json(arguments.out, report)
    draw(read_json(arguments.out), arguments.out.with_suffix(".png"))


def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell; one that does not run is named with its reason."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    protocol = Protocol(1, 1, 1, 0.1) if arguments.tiny else Protocol(seconds=arguments.seconds)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "d_state": D_STATE,
        "base": BASE._asdict(),
        "protocol": protocol._asdict(),
        "cells": [],
        "skipped": {},
    }
    sizes = TINY if arguments.tiny else SWEEPS
    for model in arguments.models:
        for kind in arguments.kinds:
            for way in arguments.ways:
                if way == "graph" and device == "cpu":
                    continue
                torch.compiler.reset()
                for size in dict.fromkeys(s for name in arguments.sweeps for s in sizes[name]):
                    cell = {"model": model, "kind": kind, "way": way, **size._asdict()}
                    try:
                        run = KINDS[kind](model, way, size, device)
                        cell |= milliseconds(run, protocol, device)
                    except Exception as error:
                        if way == "eager":
                            raise
                        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                        report["skipped"][f"{model}, {kind}, {way}, {tuple(size)}"] = reason[:200]
                        continue
                    report["cells"].append(cell)
                    del run
                    gc.collect()
                last = report["cells"][-1] if report["cells"] else {}
                print(model, kind, way, f"{last.get('mean_ms', float('nan')):.3f} ms", flush=True)
    print(report["skipped"])
    return report


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw time against each size, a row a model and kind, and print where a peer is ahead."""
    from lrnnx_nn import viz
    from lrnnx_nn.viz._style import figure_of, finish

    cells = report["cells"]
    rows = [(m, k) for k in KINDS for m in MODELS if any(c["model"] == m for c in cells)]
    figure = figure_of(11.0, 2.5 * len(rows), f"One layer, d_state 16, {report['device']}")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    colours = dict(zip(WAYS, (viz.BLUE, viz.ORANGE, viz.GREEN, viz.BLACK), strict=True))
    base = report["base"]
    for (model, kind), panels in zip(rows, grid, strict=True):
        for sweep, axes in zip(("length", "width", "batch"), panels, strict=True):
            fixed = [k for k in base if k != sweep]
            for way in WAYS:
                points = sorted(
                    (c[sweep], c["mean_ms"], c["deviation_ms"])
                    for c in cells
                    if (c["model"], c["kind"], c["way"]) == (model, kind, way)
                    and all(c[k] == base[k] for k in fixed)
                )
                if points:
                    x, y, error = zip(*points, strict=True)
                    axes.errorbar(x, y, error, color=colours[way], marker="o", ms=3, label=way)
            axes.set(xscale="log", yscale="log", xlabel=sweep, ylabel=f"{model}, {kind}, ms")
            finish(axes, legend=False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    viz.save_figure(figure, path)
    behind(cells)


def behind(cells: list[dict[str, Any]]) -> None:
    """Print every cell at which the best of our ways takes longer than the peer."""
    names = ("model", "kind", "length", "width", "batch")
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for c in cells:
        groups.setdefault(tuple(c[n] for n in names), {})[c["way"]] = c["mean_ms"]
    both = {k: g for k, g in groups.items() if "jax" in g and len(g) > 1}
    losing = 0
    for key, found in both.items():
        best = min(ms for way, ms in found.items() if way != "jax")
        if best > found["jax"]:
            losing += 1
            print("behind jax:", *key, f"{best:.3f} ms, jax {found['jax']:.3f} ms")
    print(f"ahead of jax in {len(both) - losing} of {len(both)} cells")


if __name__ == "__main__":
    main()
