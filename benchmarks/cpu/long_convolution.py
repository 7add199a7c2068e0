"""Time and memory of long convolutions: linear in L, and bounded beside input and output.

    python -m benchmarks.cpu.long_convolution [--threads 1] [--models s4d s5 lru] [--width 16]

Forward passes in `mode="conv"`, each length in a process of its own, which runs a short sequence
first. Memory is the growth of the peak resident size over what the process held before the input
was made, so input and output are in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.memory import resident
from lrnnx_core import registry

LENGTHS = tuple(2**n + 1 for n in (14, 16, 18, 20))


def measure(name: str, length: int, width: int, chunk_size: int | None) -> dict[str, Any]:
    """Return seconds and MiB of one forward pass in this process."""
    model = registry.get(name)
    params = model.init(width, 64, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"mode": "conv", "chunk_size": chunk_size}
    with torch.no_grad():
        model.scan(params, torch.randn(1, 100, width), mode="conv")
        before = resident("VmRSS")
        u = torch.randn(1, length, width)
        start = time.perf_counter()
        y, _ = model.scan(params, u, **options)
        seconds = time.perf_counter() - start
    if not bool(torch.isfinite(y).all()):
        raise RuntimeError(f"{name}: the output is not finite")
    return {"seconds": seconds, "MiB": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=["s4d", "s5", "lru"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        name, length, whole = options.one
        size = int(length) if whole == "whole" else None
        print(json.dumps(measure(name, int(length), options.width, size)))
        return
    print(f"CPU, {options.threads} threads, torch {torch.__version__}, B 1, H {options.width}")
    head = f"{'model':12}{'L':>9} | {'ms':>8}{'us a sample':>13}{'MiB':>7}"
    print(f"{head} | {'at once: ms':>12}{'MiB':>7}")
    for name in options.models:
        for length in options.lengths:
            rows = []
            for how in ("chunks", "whole"):
                command = [
                    sys.executable, "-m", "benchmarks.cpu.long_convolution", "--one", name,
                    str(length), how, "--threads", str(options.threads), "--width",
                    str(options.width),
                ]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append(json.loads(done.stdout))
            ms = [1e3 * row["seconds"] for row in rows]
            print(
                f"{name:12}{length:9} | {ms[0]:8.0f}{1e3 * ms[0] / length:13.2f}"
                f"{rows[0]['MiB']:7.0f} | {ms[1]:12.0f}{rows[1]['MiB']:7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
