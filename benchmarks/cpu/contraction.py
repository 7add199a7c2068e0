# SPDX-License-Identifier: MIT
"""Measure what the contraction planner gains over fixed orders of y = Re C (K * (B u)).

    python benchmarks/cpu/contraction.py [--threads 1] [--shapes 60] [--repeat 5] [--train] [--fit]

For random shapes the three orders run in turns in one process, so that what disturbs one disturbs
all; each time is the best of the repeats. The table compares the order `lrnnx_core.ops.contract`
chooses with always `kernel`, always `project`, always `frequency`, and with the paper's rule
(`kernel` where 1/H + 1/H_out > 1/B + 1/J, else `project`), as ratios of times, and says how well
the estimated costs rank the times. ``--fit`` searches the cost constants that fit these times best.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import random
import time
from typing import NamedTuple

import torch

from lrnnx_core.ops import contract, projected_convolution
from lrnnx_core.ops.contract import ORDERS, Plan, Sizes

CONSTANTS = ("FFT", "BATCHED", "MOVED", "CALL")
LARGEST = 4e9  # estimated cost of the dearest order that is still run


class Row(NamedTuple):
    plan: Plan
    seconds: dict[str, float]


def shapes(count: int, seed: int) -> list[Plan]:
    """Draw shapes of powers of two, real and complex, such that all three orders can be run."""
    pick = random.Random(seed)
    found: dict[Sizes, Plan] = {}
    while len(found) < count:
        batch, width, out = (2 ** pick.randint(0, 6) for _ in range(3))
        if pick.random() < 0.5:
            out = width
        p = contract.plan(
            batch, 2 ** pick.randint(6, 13), width, 2 ** pick.randint(2, 9), out,
            is_complex=pick.random() < 0.5,
        )  # fmt: skip
        if max(c.cost for c in p.candidates) < LARGEST:
            found[p.sizes] = p
    return list(found.values())


def measure(p: Plan, repeat: int, train: bool) -> Row:
    s = p.sizes
    g = torch.Generator().manual_seed(0)
    dtype = torch.complex64 if s.is_complex else torch.float32

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_(train)

    u = draw(s.batch, s.length, s.d_in, dtype=torch.float32)
    K, B, C = draw(s.taps, s.channels), draw(s.channels, s.d_in), draw(s.d_out, s.channels)
    best = dict.fromkeys(ORDERS, math.inf)
    results = {}
    for turn in range(repeat + 1):
        for order in ORDERS:
            start = time.perf_counter()
            y = projected_convolution(u, K, B, C, order=order)
            if train:
                torch.autograd.grad(y.sum(), (u, K, B, C))
            elapsed = time.perf_counter() - start
            if turn:  # the first warms caches and plans up
                best[order] = min(best[order], elapsed)
            results[order] = y.detach()
    scale = results["project"].abs().max()
    for order, y in results.items():
        assert (y - results["project"]).abs().max() < 1e-4 * scale, order
    return Row(p, best)


def simple_rule(s: Sizes) -> str:
    full = 1 / s.d_in + 1 / s.d_out > 1 / s.batch + 1 / s.channels
    return "kernel" if full else "project"


def mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def ranks(values: list[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [rank for _, rank in sorted((i, r) for r, i in enumerate(order))]


def spearman(a: list[float], b: list[float]) -> float:
    n = len(a)
    apart = sum((x - y) ** 2 for x, y in zip(ranks(a), ranks(b), strict=True))
    return 1 - 6 * apart / (n * (n * n - 1))


def costs(p: Plan) -> dict[str, float]:
    return {c.order: c.cost for c in p.candidates}


def report(rows: list[Row]) -> None:
    choices = {
        "planner": [r.plan.order for r in rows],
        **{f"always {order}": [order] * len(rows) for order in ORDERS},
        "paper's rule": [simple_rule(r.plan.sizes) for r in rows],
    }
    fastest = [min(r.seconds.values()) for r in rows]
    planned = [r.seconds[r.plan.order] for r in rows]
    print(f"\n{'policy':<18}{'is fastest':>11}{'time / fastest':>16}{'worst':>8}{'/ planner':>11}")
    for name, orders in choices.items():
        times = [r.seconds[o] for r, o in zip(rows, orders, strict=True)]
        loss = [t / f for t, f in zip(times, fastest, strict=True)]
        against = [t / p for t, p in zip(times, planned, strict=True)]
        hits = sum(x == 1.0 for x in loss) / len(rows)
        print(f"{name:<18}{hits:>11.0%}{mean(loss):>16.2f}{max(loss):>8.1f}{mean(against):>11.2f}")
    points = [(costs(r.plan)[o], r.seconds[o]) for r in rows for o in ORDERS]
    pairs = [
        (costs(r.plan)[a] / costs(r.plan)[b], r.seconds[a] / r.seconds[b])
        for r in rows
        for a, b in itertools.combinations(ORDERS, 2)
    ]
    clear = [(x, y) for x, y in pairs if not 1 / 1.25 < y < 1.25]
    right = sum((x > 1) == (y > 1) for x, y in clear) / len(clear)
    print(
        f"\nrank correlation of cost and time over {len(points)} runs: "
        f"{spearman(*map(list, zip(*points, strict=True))):.3f}\n"
        f"of {len(clear)} pairs of orders that differ by a quarter or more, "
        f"{right:.0%} are ranked right"
    )


def fit(rows: list[Row]) -> None:
    """Search the constants that make cost proportional to time, by ratios."""

    def deviation() -> float:
        contract._plan.cache_clear()
        logs = []
        for r in rows:
            now = costs(contract._plan(r.plan.sizes, "auto", None))
            logs += [math.log(r.seconds[o] / now[o]) for o in ORDERS]
        centre = sum(logs) / len(logs)
        return sum((x - centre) ** 2 for x in logs) / len(logs)

    best = deviation()
    print("before", {k: getattr(contract, k) for k in CONSTANTS}, f"{math.sqrt(best):.3f}")
    factor = 2.0
    while factor > 1.05:
        improved = False
        for name in CONSTANTS:
            for step in (factor, 1 / factor):
                old = getattr(contract, name)
                setattr(contract, name, old * step)
                now = deviation()
                if now < best - 1e-6:
                    best, improved = now, True
                else:
                    setattr(contract, name, old)
        if not improved:
            factor = math.sqrt(factor)
    print("after ", {k: getattr(contract, k) for k in CONSTANTS}, f"{math.sqrt(best):.3f}")
    contract._plan.cache_clear()
    report([r._replace(plan=contract._plan(r.plan.sizes, "auto", None)) for r in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--fit", action="store_true", help="search cost constants")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    what = "forward and backward" if options.train else "forward"
    print(f"torch {torch.__version__}, {options.threads} thread(s), {platform.machine()}, {what}")
    print(f"{'B':>4}{'L':>6}{'H':>5}{'J':>5}{'out':>5}  {'':<8}", end="")
    print("".join(f"{o + ' ms':>15}" for o in ORDERS), "  planner    rule")
    rows = []
    for p in shapes(options.shapes, options.seed):
        row = measure(p, options.repeat, options.train)
        rows.append(row)
        s = p.sizes
        kind = "complex" if s.is_complex else "real"
        print(f"{s.batch:>4}{s.length:>6}{s.d_in:>5}{s.channels:>5}{s.d_out:>5}  {kind:<8}", end="")
        print("".join(f"{1e3 * row.seconds[o]:>15.3f}" for o in ORDERS), end="  ")
        print(f" {p.order:<10} {simple_rule(s)}", flush=True)
    report(rows)
    if options.fit:
        fit(rows)


if __name__ == "__main__":
    main()
