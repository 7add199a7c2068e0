"""Time the Vandermonde and Cauchy sums on the CPU against the whole matrix in plain torch.

    python -m benchmarks.cpu.vandermonde_cauchy [--threads 2] [--lengths 1024 4096] [--repeat 3]

Both forms compute the same from the same inputs (checked first), in one process, with the same
threads, in turns; the table holds the best of the repeats. Memory is the growth of the peak
resident size over the inputs, each measured in a process of its own; a form whose matrix is larger
than --limit MiB is not run.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.memory import peak, resident
from lrnnx_core.ops import cauchy, vandermonde

MODULE = "benchmarks.cpu.vandermonde_cauchy"
Inputs = tuple[Tensor, Tensor, Tensor]
Shape = tuple[int, int, int]


def inputs(heads: int, states: int, grad: bool) -> Inputs:
    """Return coefficients, poles of S4D-Lin and steps."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(heads, states, dtype=torch.complex64, generator=g)
    frequencies = math.pi * torch.arange(states).expand(heads, states)
    poles = torch.complex(torch.full((heads, states), -0.5), frequencies)
    x = v, poles, torch.logspace(-3, -1, heads)
    return tuple(t.requires_grad_(grad) for t in x)  # type: ignore[return-value]


def sums(x: Inputs, length: int, backend: str) -> Tensor:
    v, poles, dt = x
    return vandermonde(v, poles * dt.unsqueeze(-1), length, backend=backend)  # type: ignore[arg-type]


def fractions(x: Inputs, length: int, backend: str) -> Tensor:
    v, poles, dt = x
    return torch.view_as_real(cauchy(v, poles, 2 / dt, length, backend=backend))  # type: ignore[arg-type]


IMPLEMENTATIONS: dict[str, Callable[[Inputs, int], Tensor]] = {
    "vandermonde": lambda x, length: sums(x, length, "auto"),
    "vandermonde, whole matrix": lambda x, length: sums(x, length, "reference"),
    "cauchy": lambda x, length: fractions(x, length, "auto"),
    "cauchy, whole matrix": lambda x, length: fractions(x, length, "reference"),
}


def run(name: str, x: Inputs, length: int, train: bool) -> None:
    if train:
        IMPLEMENTATIONS[name](x, length).sum().backward()
    else:
        with torch.no_grad():
            IMPLEMENTATIONS[name](x, length)


def seconds(name: str, x: Inputs, length: int, train: bool) -> float:
    start = time.perf_counter()
    run(name, x, length, train)
    return time.perf_counter() - start


def matrix(name: str, shape: Shape) -> float:
    """Return MiB of the whole matrix, 0 for a form that has none."""
    heads, states, length = shape
    nodes = length // 2 + 1 if name.startswith("cauchy") else length
    return heads * states * nodes * 8 / 2**20 if "whole" in name else 0.0


def report_peak(name: str, shape: Shape, train: bool) -> None:
    heads, states, length = shape
    run(name, inputs(2, states, train), 64, train)  # what is allocated once
    x = inputs(heads, states, train)
    before = resident("VmRSS")
    run(name, x, length, train)
    print(resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--limit", type=float, default=1500, help="MiB of the largest matrix")
    parser.add_argument("--peak", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        report_peak(options.peak, tuple(options.shape), options.train)
        return
    print(
        f"{platform.processor() or platform.machine()} CPU, {options.threads} threads, torch "
        f"{torch.__version__}, H {options.heads} N {options.states} complex64"
    )
    columns = ("fwd ms", "train ms", "fwd ratio", "train ratio", "fwd MiB", "train MiB")
    print(f"{'':26}{'L':>6}" + "".join(f"{c:>12}" for c in columns))
    for length in options.lengths:
        shape = (options.heads, options.states, length)
        x = inputs(options.heads, options.states, True)
        names = [n for n in IMPLEMENTATIONS if matrix(n, shape) <= options.limit]
        best: dict[tuple[str, bool], float] = {}
        for name in names:
            ours = IMPLEMENTATIONS[name.split(",")[0]](x, length).detach()
            scale = ours.abs().max().item()
            got = IMPLEMENTATIONS[name](x, length).detach()
            torch.testing.assert_close(got, ours, rtol=0, atol=1e-4 * scale)
        for _ in range(options.repeat):
            for name in names:
                for train in (False, True):
                    took = seconds(name, x, length, train)
                    best[name, train] = min(best.get((name, train), took), took)
        for name in IMPLEMENTATIONS:
            if name not in names:
                print(f"{name:26}{length:6}   not run: a matrix of {matrix(name, shape):.0f} MiB")
                continue
            base = name.split(",")[0]
            times = [best[name, train] for train in (False, True)]
            ratios = [best[name, train] / best[base, train] for train in (False, True)]
            memory = [peak(MODULE, name, shape, train) for train in (False, True)]
            row = (*(f"{t * 1e3:12.1f}" for t in times), *(f"{r:12.1f}" for r in ratios))
            print(f"{name:26}{length:6}" + "".join(row) + "".join(f"{m:12.0f}" for m in memory))


if __name__ == "__main__":
    main()
