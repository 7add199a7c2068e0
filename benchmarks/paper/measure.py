# SPDX-License-Identifier: MIT
"""Clocks and cells of the published sweeps: one model at one size, in one way, with deviation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.paper import jax_layers
from lrnnx_nn import LRU, S5, Mamba

D_STATE = 16
MODELS: dict[str, Any] = {"LRU": LRU, "S5": S5, "Mamba": Mamba}
WAYS = ("eager", "compiled", "graph", "jax")


class Size(NamedTuple):
    """Of a cell."""

    length: int
    width: int
    batch: int


class Protocol(NamedTuple):
    """How often a cell is run; a cell that takes longer than ``seconds`` makes fewer runs."""

    warm: int = 10
    runs: int = 90
    repeats: int = 5
    seconds: float = 1.5


def layer_of(model: str, size: Size, device: str) -> Any:
    torch.manual_seed(0)
    return MODELS[model](size.width, D_STATE).to(device)


def training(model: str, way: str, size: Size, device: str) -> Callable[[], Any]:
    """Return one forward and backward by input and parameters."""
    layer = layer_of(model, size, device)
    u = torch.randn(size.batch, size.length, size.width, device=device, requires_grad=True)
    if way == "jax":
        return jax_layers.training(model, layer, u)
    if way == "compiled":
        layer = torch.compile(layer)
    weights = [u, *layer.parameters()]
    cotangent = torch.ones_like(u)

    def run() -> Any:
        return torch.autograd.grad(layer(u), weights, cotangent)

    return captured(run) if way == "graph" else run


def inference(model: str, way: str, size: Size, device: str) -> Callable[[], Any]:
    """Return ``length`` steps, each on a fresh input and the state of the one before."""
    layer = layer_of(model, size, device).eval()
    inputs = torch.randn(size.length, size.batch, size.width, device=device)
    if way == "jax":
        return jax_layers.inference(model, layer, inputs)
    step = torch.compile(layer.step) if way == "compiled" else layer.step
    start = layer.init_state((size.batch,))

    def run() -> Tensor:
        state, outputs = start, []
        with torch.no_grad():
            for u in inputs.unbind(0):
                y, state = step(u, state)
                outputs.append(y)
        return torch.stack(outputs)

    return captured(run) if way == "graph" else run


KINDS = {"training": training, "inference": inference}


def once(model: str, kind: str, way: str, sizes: list[Size], device: str) -> None:
    """Run cells one time each: what is compiled for them stands in caches on disk then."""
    for size in sizes:
        KINDS[kind](model, way, size, device)()


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call as one replay of a CUDA graph; the results stand at fixed addresses."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def milliseconds(run: Callable[[], Any], protocol: Protocol, device: str) -> dict[str, float]:
    """Return mean and deviation over the repeats of the time of a run, and how many were made.

    The host counts: the clock starts when the device is idle and stops when the last run is done.
    """

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def timed(count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        return (time.perf_counter() - start) / count

    run()
    once = timed(1)
    room = protocol.seconds / max(once, 1e-6)
    warm = max(1, min(protocol.warm, int(room / 10)))
    runs = max(1, min(protocol.runs, int(room / protocol.repeats)))
    timed(warm)
    times = [1e3 * timed(runs) for _ in range(protocol.repeats)]
    return {
        "mean_ms": statistics.mean(times),
        "deviation_ms": statistics.stdev(times) if len(times) > 1 else 0.0,
        "runs": runs,
    }
