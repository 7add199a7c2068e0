# SPDX-License-Identifier: MIT
"""Time the linear scan on a GPU against what memory allows and against its peers.

    python benchmarks/cuda/linear_scan.py [--json FILE] [--quick]

Medians of CUDA events. The host's part is hidden: the GPU sleeps while a call is enqueued. The
ceilings are measured in the same run: bytes read and written by a copy and by an addition, over the
time. "floor" is the bytes a case must move over the better ceiling; forward 3 arrays (2 where a is
constant), backward 5 (3). Every implementation is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import blocked, cuda, cuda_linear_scan
from lrnnx_core.ops import linear_scan

F32, BF16, C64 = torch.float32, torch.bfloat16, torch.complex64
CASES: dict[str, tuple[tuple[int, int, int], torch.dtype, bool]] = {
    "16384 rows, L 4096": ((8, 4096, 2048), F32, False),
    "16384 rows, L 4096, constant a": ((8, 4096, 2048), F32, True),
    "256 rows, L 65536": ((1, 65536, 256), F32, False),
    "16384 rows, L 4096, bf16": ((8, 4096, 2048), BF16, False),
    "16384 rows, L 4096, complex64": ((8, 4096, 2048), C64, False),
    "256 rows, L 65536, complex64": ((1, 65536, 256), C64, False),
}


def median_ms(f: Callable[[], Any], repeat: int = 21) -> float:
    """Return the median GPU time of a call."""
    for _ in range(3):
        f()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # half a millisecond, in which the call is enqueued
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_us(f: Callable[[], Any], repeat: int = 300) -> float:
    """Return the median time that the CPU spends on a call."""
    for _ in range(50):
        f()
    times = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Return TB/s of a copy and of an addition."""
    x, y = torch.randn(2, 2**26, device="cuda")
    z = torch.empty_like(x)
    copy = 2 * x.nbytes / median_ms(lambda: z.copy_(x)) / 1e9
    add = 3 * x.nbytes / median_ms(lambda: torch.add(x, y, out=z)) / 1e9
    return {"copy": copy, "add": add}


def problem(shape: tuple[int, int, int], dtype: torch.dtype, constant: bool) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    batch, length, channels = shape
    real = torch.float32 if dtype == BF16 else dtype
    a = torch.randn(
        batch, 1 if constant else length, channels, generator=g, device="cuda", dtype=real
    )
    a = a / (1 + a.abs())
    b = torch.randn(shape, generator=g, device="cuda", dtype=real)
    return [a.to(dtype), b.to(dtype)]


def triton_scan(a: Tensor, b: Tensor) -> Tensor:
    """Scan by torch.compile of the associative scan."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(x: Any, y: Any) -> Any:
        return y[0] * x[0], y[0] * x[1] + y[1]

    return associative_scan(combine, (a, b), dim=1, combine_mode="pointwise")[1]


def jax_times(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return forward and forward + backward of jax.lax.associative_scan in ms."""
    import os

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    x, y = (jax.dlpack.from_dlpack(t.detach()) for t in (a, b))

    def scan(x: Any, y: Any) -> Any:
        def combine(p: Any, q: Any) -> Any:
            return q[0] * p[0], q[0] * p[1] + q[1]

        return jax.lax.associative_scan(combine, (x, y), axis=1)[1]

    def both(x: Any, y: Any, g: Any) -> Any:
        h, pull = jax.vjp(scan, x, y)
        return h, pull(g)

    def timed(f: Any, *inputs: Any) -> float:
        f(*inputs)
        times = []
        for _ in range(11):
            jax.block_until_ready(inputs)
            start = time.perf_counter()
            jax.block_until_ready(f(*inputs))
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    return timed(jax.jit(scan), x, y), timed(jax.jit(both), x, y, y)


def check(h: Tensor, a: Tensor, b: Tensor) -> float:
    """Return the relative error on the last 64 channels of the first batch element."""
    wide = torch.complex128 if b.is_complex() else torch.float64
    part = slice(-64, None)
    expected = blocked.linear_scan(
        a[:1, :, part].to(wide), b[:1, :, part].to(wide), None, None, False
    )[0]
    return float((h[:1, :, part].to(wide) - expected).norm() / expected.norm())


def ours(a: Tensor, b: Tensor) -> dict[str, float]:
    h, last = cuda_linear_scan.linear_scan(a, b, None, None, False)
    error = check(h, a, b)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward = median_ms(lambda: cuda_linear_scan.linear_scan(a, b, None, None, False))
    both = median_ms(
        lambda: (
            cuda_linear_scan.linear_scan(a, b, None, None, False),
            cuda_linear_scan.linear_scan_backward(a, h, None, None, b, last, False),
        )
    )
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"forward": forward, "both": both, "error": error, "peak_mib": peak}


def compiled(a: Tensor, b: Tensor) -> dict[str, float]:
    f = torch.compile(triton_scan)
    error = check(f(a, b), a, b)
    return {"forward": median_ms(lambda: f(a, b), 11), "error": error}


def main() -> int:
    """Print the table; write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="no peers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not cuda.ready():
        sys.exit(f"linear_scan: needs a CUDA device and CuPy: {cuda.pip_line()}")
    top = ceilings()
    best = max(top.values())
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ceilings_TB_per_s": top,
        "cases": {},
    }
    print(f"{report['device']}, torch {torch.__version__}; TB/s: copy {top['copy']:.2f}, "
          f"add {top['add']:.2f}")  # fmt: skip
    print(f"{'case':<32}{'':<22}{'fwd ms':>9}{'floor':>8}{'fwd+bwd':>9}{'floor':>8}{'error':>9}"
          f"{'MiB':>7}")  # fmt: skip
    for name, (shape, dtype, constant) in CASES.items():
        a, b = problem(shape, dtype, constant)
        forward_bytes = b.nbytes * 2 + a.nbytes
        floors = (
            forward_bytes / best / 1e9,
            (forward_bytes + 3 * b.nbytes + 2 * a.nbytes) / best / 1e9,
        )
        rows: dict[str, dict[str, float]] = {"lrnnx-core": ours(a, b)}
        if not arguments.quick and dtype == F32 and not constant:
            for peer, f in (("torch.compile", compiled), ("jax", None)):
                try:
                    if f is None:
                        forward, both = jax_times(a, b)
                        rows["jax associative_scan"] = {"forward": forward, "both": both}
                    else:
                        rows["torch.compile"] = f(a, b)
                except Exception as error:  # noqa: BLE001  # a peer that does not run is no failure
                    warnings.warn(f"{peer} does not run: {error}", stacklevel=1)
        report["cases"][name] = {"floor_ms": floors, **rows}
        for who, row in rows.items():
            print(
                f"{name:<32}{who:<22}{row['forward']:>9.4f}{floors[0]:>8.3f}"
                f"{row.get('both', float('nan')):>9.4f}{floors[1]:>8.3f}"
                f"{row.get('error', float('nan')):>9.1e}{row.get('peak_mib', float('nan')):>7.0f}",
                flush=True,
            )
        del a, b
    a, b = problem((2, 16, 8), F32, False)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    report["host_us"] = {
        "leaf": host_us(lambda: cuda_linear_scan.linear_scan(a, b, None, None, False)),
        "forward": host_us(lambda: linear_scan(x, y)),
        "forward_backward": host_us(lambda: torch.autograd.grad(linear_scan(x, y)[0], (x, y), b)),
        "mul_forward_backward": host_us(lambda: torch.autograd.grad(x * y, (x, y), b)),
    }
    print("host, microseconds:", {k: round(v) for k, v in report["host_us"].items()})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
