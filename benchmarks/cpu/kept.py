"""What a Module keeps in evaluation: time with and without the kept kernel and discretization.

    python -m benchmarks.cpu.kept [--threads 1] [--repeat 5]

The same layer, the same input, in turns in one process, without gradients: `train()` computes the
kernel (or A_bar and B_bar) at every call, `eval()` at the first one. The best of the repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from lrnnx_core import registry
from lrnnx_nn.layers import LAYERS


def best(calls: dict[str, Callable[[], object]], repeat: int, inner: int) -> dict[str, float]:
    """Return seconds a call of each, the best of the repeats, taken in turns."""
    found = dict.fromkeys(calls, float("inf"))
    for turn in range(repeat + 1):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            if turn:
                found[name] = min(found[name], (time.perf_counter() - start) / inner)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"CPU, {options.threads} threads, torch {torch.__version__}, B {options.batch}, "
        f"H {options.width}, float32"
    )
    print(f"{'model':12}{'call':>14}{'computed ms':>13}{'kept ms':>10}{'ratio':>7}")
    for name, layer_type in LAYERS.items():
        if registry.get(name).kind != "lti":
            continue
        torch.manual_seed(0)
        layer = layer_type(options.width, 64)

        def computed(call: Callable[[], object], layer: torch.nn.Module = layer) -> object:
            layer.train()
            return call()

        def kept(call: Callable[[], object], layer: torch.nn.Module = layer) -> object:
            if layer.training:
                layer.eval()
            return call()

        rows: list[tuple[str, Callable[[], object], int]] = []
        for length in options.lengths:
            u = torch.randn(options.batch, length, options.width)
            rows.append((f"forward {length}", lambda layer=layer, u=u: layer(u), 3))
        u_t = torch.randn(options.batch, options.width)
        state = layer.init_state((options.batch,))
        rows.append(("step", lambda layer=layer, s=state, u=u_t: layer.step(u, s), 50))
        with torch.no_grad():
            for what, call, inner in rows:
                calls = {
                    "computed": lambda call=call, run=computed: run(call),
                    "kept": lambda call=call, run=kept: run(call),
                }
                took = best(calls, options.repeat, inner)
                a, b = (1e3 * took[k] for k in ("computed", "kept"))
                print(f"{name:12}{what:>14}{a:13.3f}{b:10.3f}{a / b:7.2f}", flush=True)


if __name__ == "__main__":
    main()
