"""Time the selective scan on the CPU against mambapy and transformers' slow path.

    python -m benchmarks.cpu.selective_scan [--threads 2] [--lengths 256 1024] [--repeat 3]

Every implementation computes the same from the same inputs (checked first), in one process, with
the same threads, in turns; the table holds the best of the repeats. Memory is the growth of the
peak resident size over the inputs, each measured in a process of its own.
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
from lrnnx_core.ops import selective_scan

MODULE = "benchmarks.cpu.selective_scan"
Inputs = dict[str, Tensor]


def inputs(batch: int, length: int, width: int, states: int, grad: bool) -> Inputs:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x = {
        "u": draw(batch, length, width),
        "dt": draw(batch, length, width) - 3,
        "A": -torch.arange(1, states + 1.0).repeat(width, 1),
        "B": draw(batch, length, states),
        "C": draw(batch, length, states),
        "D": torch.ones(width),
    }
    return {k: v.requires_grad_(grad) for k, v in x.items()}


def ours(x: Inputs) -> Tensor:
    return selective_scan(**x, softplus=True)[0]


def mambapy(x: Inputs) -> Tensor:
    from mambapy.pscan import pscan

    delta = torch.nn.functional.softplus(x["dt"])
    a = torch.exp(delta.unsqueeze(-1) * x["A"])
    b = delta.unsqueeze(-1) * x["B"].unsqueeze(2) * x["u"].unsqueeze(-1)
    return (pscan(a, b) @ x["C"].unsqueeze(-1)).squeeze(3) + x["D"] * x["u"]


def transformers(x: Inputs) -> Tensor:
    """Do what transformers' Mamba does without its CUDA packages: a loop over time steps."""
    delta = torch.nn.functional.softplus(x["dt"])
    a = torch.exp(delta.unsqueeze(-1) * x["A"])
    b = delta.unsqueeze(-1) * x["B"].unsqueeze(2) * x["u"].unsqueeze(-1)
    h = torch.zeros_like(b[:, 0])
    outputs = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        outputs.append(torch.matmul(h, x["C"][:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1) + x["D"] * x["u"]


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Tensor]] = {
    "lrnnx (plain torch)": ours,
    "mambapy": mambapy,
    "step loop (transformers)": transformers,
}


def seconds(function: Callable[[Inputs], Tensor], x: Inputs, train: bool) -> float:
    start = time.perf_counter()
    if train:
        function(x).sum().backward()
    else:
        with torch.no_grad():
            function(x)
    return time.perf_counter() - start


def report_peak(name: str, shape: tuple[int, int, int, int], train: bool) -> None:
    small = inputs(1, 8, shape[2], shape[3], train)
    seconds(IMPLEMENTATIONS[name], small, train)  # what is allocated once
    x = inputs(*shape, train)
    before = resident("VmRSS")
    seconds(IMPLEMENTATIONS[name], x, train)
    print(resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument(
        "--loop-limit", type=int, default=512, help="longest L the step loop is trained at"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        report_peak(options.peak, tuple(options.shape), options.train)
        return
    print(
        f"{platform.processor() or platform.machine()} CPU, {options.threads} threads, torch "
        f"{torch.__version__}, B {options.batch} E {options.width} N {options.states}, float32"
    )
    columns = ("fwd ms", "train ms", "train/ours", "fwd MiB", "train MiB")
    print(f"{'':26}{'L':>6}" + "".join(f"{c:>11}" for c in columns))
    for length in options.lengths:
        shape = (options.batch, length, options.width, options.states)
        x = inputs(*shape, True)
        expected = ours(x).detach()
        best: dict[tuple[str, bool], float] = {}
        for _ in range(options.repeat):
            for name, function in IMPLEMENTATIONS.items():
                torch.testing.assert_close(function(x).detach(), expected, rtol=1e-3, atol=1e-3)
                for train in (False, True):
                    if name.startswith("step") and train and length > options.loop_limit:
                        best[name, train] = math.nan
                        continue
                    took = seconds(function, x, train)
                    best[name, train] = min(best.get((name, train), took), took)
        base = best["lrnnx (plain torch)", True]
        for name in IMPLEMENTATIONS:
            times = best[name, False] * 1e3, best[name, True] * 1e3
            trained = math.nan if math.isnan(times[1]) else peak(MODULE, name, shape, True)
            row = (*times, times[1] / base / 1e3, peak(MODULE, name, shape, False), trained)
            cells = (f"{v:11.{2 if i == 2 else 0}f}" for i, v in enumerate(row))
            print(f"{name:26}{length:6}" + "".join(cells))


if __name__ == "__main__":
    main()
