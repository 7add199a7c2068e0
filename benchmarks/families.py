"""Time whole sequences by linear recurrences, attention and gated RNNs: docs/linear-rnns.md.

    python -m benchmarks.families [--device cuda] [--dtype bfloat16] [--json FILE]
    python -m benchmarks.families --table docs/benchmarks/families.json

The second prints the tables of the page from the records of several runs, by a name each.

One mixer each, forward and forward + backward, at growing lengths with the number of samples of
the batch held fixed: what is linear in the length stays level. A time is the median of repeats
after a warm-up. ``-`` is a length left out because the one before took over ten seconds.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.choosing.networks import OTHERS, mixer
from lrnnx_core import registry
from lrnnx_nn.files import read_json, write_json

NAMES = ("s4d", "s5", "mamba", "rglru", "attn", "gru", "lstm")
PATIENCE = 10.0


def timed(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Return the median of ``repeats`` calls in milliseconds, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
        if times[0] > 1e3 * PATIENCE:
            return times[0]
    return median(times[1:])


def measure(name: str, length: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of a forward without gradients and of a training step."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    layer = mixer(name, options.d_model).to(options.device).to(dtype)
    u = torch.randn(
        options.samples // length, length, options.d_model, device=options.device, dtype=dtype,
        requires_grad=True,
    )  # fmt: skip
    gradient = torch.randn_like(u)

    def forward() -> None:
        with torch.no_grad():
            layer(u)

    def training() -> None:
        layer(u).backward(gradient)

    if options.device == "cuda":
        torch.cuda.empty_cache()
    found = {"forward": timed(forward, options.device, options.repeats)}
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found["training"] = timed(training, options.device, options.repeats)
    if options.device == "cuda":
        found["MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def by_device(records: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the records in one group a device, by its kind."""
    groups: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        groups.setdefault(name.split()[0], {})[name] = record
    return groups


def table(records: Mapping[str, Any]) -> str:
    """Return a Markdown table, a row a mixer and run, forward / training in milliseconds."""
    lengths = sorted({int(n) for r in records.values() for row in r["ms"].values() for n in row})
    rows = ["| mixer | " + " | ".join(f"L = {n:,}" for n in lengths) + " |"]
    rows.append("|---" * (len(lengths) + 1) + "|")
    for record in records.values():
        for name, times in record["ms"].items():
            title = OTHERS.get(name) or registry.get(name).title
            found = [times.get(str(n)) for n in lengths]
            cells = [f"{_ms(x['forward'])} / {_ms(x['training'])}" if x else "–" for x in found]
            rows.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16384, help="batch times length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--names", nargs="+", default=list(NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print tables, measure nothing")
    options = parser.parse_args()
    if options.table is not None:
        for device, runs in by_device(read_json(options.table)).items():
            print(f"{device}\n\n{table(runs)}\n")
        return
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(f"{options.device} ({where}), torch {torch.__version__}, {options.dtype}")
    print(f"{options.threads} threads, d_model {options.d_model}, {options.samples} samples; ms")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.names:
        found[name], slow = {}, False
        for length in options.lengths:
            if not slow:
                row = measure(name, length, options)
                slow = row["training"] > 1e3 * PATIENCE
                found[name][str(length)] = row
        rows = [found[name].get(str(n)) for n in options.lengths]
        cells = [f"{r['forward']:.1f} / {r['training']:.1f}" if r else "-" for r in rows]
        print(f"{name:8s}" + "".join(f"{cell:>22s}" for cell in cells), flush=True)
    if options.json is not None:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "table")}
        record = {"name": where, "torch": torch.__version__, **settings, "ms": found}
        write_json(options.json, record)


if __name__ == "__main__":
    main()
