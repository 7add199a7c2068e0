"""Time `mode="conv"` against `mode="scan"` of time-invariant layers: what `mode="auto"` rests on.

    python -m benchmarks.modes [--device cpu] [--threads 1] [--models s4d s5] [--json FILE]

For every model, state count and length: forward and forward + backward of one layer, the two modes
in turns in one process, the best of the repeats. The last columns are the ratio scan / conv (above
one the convolution is faster) and what `auto` chooses; the last line says how much time `auto`
loses against the better mode, over all rows.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnnx_core import registry
from lrnnx_core.models._auto import prefers_convolution

LENGTHS = (8, 16, 32, 64, 128, 256, 1024, 4096, 16384)
STATES = {"siso": (2, 4, 16, 64), "mimo": (8, 32, 128)}
LARGEST = 2**27
"""Most state values (B L H N, or B L P) a row may hold at once."""


def seconds(call: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    model: registry.Model, d_state: int, u: Tensor, repeat: int, budget: float = 1.0
) -> dict[tuple[str, bool], float]:
    """Return seconds by (mode, train), the best of the repeats."""
    generator = torch.Generator().manual_seed(0)
    params = model.init(u.shape[-1], d_state, generator=generator)
    params = {k: v.to(u.device).requires_grad_() for k, v in params.items()}
    x = u.clone().requires_grad_()

    def forward(mode: str) -> None:
        with torch.no_grad():
            model.scan(params, u, mode=mode)

    def train(mode: str) -> None:
        y, _ = model.scan(params, x, mode=mode)
        y.sum().backward()

    best: dict[tuple[str, bool], float] = {}
    for turn in range(repeat + 1):  # the first one warms up
        for mode in ("conv", "scan"):
            for trained, call in ((False, forward), (True, train)):
                took = seconds(lambda call=call, mode=mode: call(mode), u.device)
                if turn:
                    best[mode, trained] = min(best.get((mode, trained), math.inf), took)
        if turn and sum(best.values()) * turn > budget:
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=["s4d", "s5"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{where}, {options.threads} threads, torch {torch.__version__}, B {options.batch}, "
        f"H {options.width}, float32; milliseconds"
    )
    print(
        f"{'model':12}{'N':>5}{'L':>7} | {'conv':>9}{'scan':>9}{'ratio':>7} |"
        f"{'conv':>9}{'scan':>9}{'ratio':>7} | auto   (forward | training)"
    )
    rows, lost, best_total = [], 0.0, 0.0
    for name in options.models:
        model = registry.get(name)
        for d_state in STATES[model.connectivity]:
            for length in options.lengths:
                per = options.width if model.connectivity == "siso" else 1
                if options.batch * length * per * d_state > LARGEST:
                    continue
                u = torch.randn(options.batch, length, options.width, device=device)
                best = measure(model, d_state, u, options.repeat)
                state = model.init_state(model.init(options.width, d_state)).shape
                auto = prefers_convolution(model.connectivity, u, state[-1])
                mode = "conv" if auto else "scan"
                cells = []
                for train in (False, True):
                    conv, scan = (best[m, train] for m in ("conv", "scan"))
                    cells += [f"{1e3 * conv:9.3f}{1e3 * scan:9.3f}{scan / conv:7.2f} |"]
                    lost += best[mode, train] / min(conv, scan)
                    best_total += 1
                print(f"{name:12}{d_state:5}{length:7} |{''.join(cells)} {mode}", flush=True)
                rows.append(
                    {"model": name, "d_state": d_state, "length": length, "auto": mode}
                    | {f"{m}_{'train' if t else 'forward'}": s for (m, t), s in best.items()}
                )
    print(f"auto takes {lost / best_total:.3f} x the better mode's time, the mean over rows")
    if options.json:
        options.json.write_text(json.dumps({"device": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
