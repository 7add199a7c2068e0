"""S4: by blocks of time or as a convolution, with C or C~ stored, forward and with gradients.

    python -m benchmarks.cpu.s4 [--threads 1] [--repeat 3]

All in turns in one process, the best of the repeats. ``mode="auto"`` follows this table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from lrnnx_core import s4

# N, H, B, L
SIZES = ((16, 64, 1, 1024), (16, 64, 16, 1024), (64, 64, 16, 1024), (64, 128, 4, 4096))
WAYS = (("scan", False), ("conv", False), ("scan", True), ("conv", True))


def call(
    params: dict[str, torch.Tensor], u: torch.Tensor, mode: str, l_kernel: int | None, train: bool
) -> Callable[[], object]:
    """Return a run, followed by a backward pass if ``train``."""

    def run() -> object:
        if not train:
            with torch.no_grad():
                return s4.scan(params, u, mode=mode, l_kernel=l_kernel)
        leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        y, _ = s4.scan(leaves, u, mode=mode, l_kernel=l_kernel)
        return y.sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"CPU, {options.threads} threads, torch {torch.__version__}, float32, ms")
    names = [f"{mode} {'C~' if stored else 'C'}" for mode, stored in WAYS]
    print(f"{'N':>4}{'H':>5}{'B':>4}{'L':>7}  {'':9}" + "".join(f"{name:>10}" for name in names))
    for n, width, batch, length in SIZES:
        torch.manual_seed(0)
        params, u = s4.init(width, n), torch.randn(batch, length, width)
        truncated = s4.c_to_ctilde(params, length)
        for train in (False, True):
            calls = [
                call(truncated if stored else params, u, mode, length if stored else None, train)
                for mode, stored in WAYS
            ]
            found = [float("inf")] * len(calls)
            for turn in range(options.repeat + 1):
                for i, run in enumerate(calls):
                    start = time.perf_counter()
                    run()
                    if turn:
                        found[i] = min(found[i], time.perf_counter() - start)
            what = "gradients" if train else "forward"
            row = "".join(f"{1e3 * seconds:10.1f}" for seconds in found)
            print(f"{n:4}{width:5}{batch:4}{length:7}  {what:9}{row}")


if __name__ == "__main__":
    main()
