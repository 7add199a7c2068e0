# SPDX-License-Identifier: MIT
"""What the benchmarks of the CUDA kernels share: clocks, ceilings, the table, the JSON file.

Times are medians of CUDA events with the host's part hidden: the GPU sleeps while a call is
enqueued. The ceilings are measured in the same run: bytes moved by a copy and by an addition, and
the rate of ex2. A floor is what a case cannot beat: its bytes over the better ceiling, or its
exponentials over their rate, whichever takes longer.

A benchmark is a function of a `Session`. With ``--tiny`` it runs every case at a small size, once
and on any device, to see that it runs: such times mean nothing and are not written.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import cuda

ROOT = Path(__file__).parent.parent.parent
ASLEEP = 4_000_000  # cycles, about two milliseconds, in which a call is enqueued
Row = dict[str, float]

EX2 = r"""
extern "C" __global__ void exponentials(float* out, int rounds) {
    float a = threadIdx.x * 1e-3f, b = a + 0.1f, c = a + 0.2f, d = a + 0.3f;
    for (int i = 0; i < rounds; ++i) {
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(a));
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(b));
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(c));
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(d));
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = a + b + c + d;
}
"""
COLUMNS = (  # key of a row, heading, format
    ("forward", "fwd ms", ".4f"),
    ("both", "fwd+bwd", ".4f"),
    ("error", "error", ".1e"),
    ("peak_mib", "MiB", ".0f"),
)


class Session:
    """One run of one benchmark: measures, prints rows as they come, and keeps the report.

    Args:
        quick: leave the peers out.
        tiny: small sizes, no real times.
    """

    def __init__(self, quick: bool = False, tiny: bool = False) -> None:
        self.quick, self.tiny = quick, tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.report: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "ceilings_TB_per_s": self._bandwidth(),
            "ex2_per_ns": self._exponentials(),
            "cases": {},
            "skipped": {},
        }

    # ------------------------------------------------------------------ clocks

    def median_ms(self, f: Callable[[], Any], repeat: int = 21) -> float:
        """Return the median GPU time of a call."""
        if self.device == "cpu":
            start = time.perf_counter()
            f()
            return (time.perf_counter() - start) * 1e3
        for _ in range(1 if self.tiny else 3):
            f()
        times = []
        for _ in range(1 if self.tiny else repeat):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(ASLEEP)
            start.record()
            f()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def graph_ms(self, f: Callable[[], Any], calls: int = 1) -> float:
        """Return the time of one of ``calls`` calls captured together in a CUDA graph."""
        if self.device == "cpu":
            return self.median_ms(f)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                f()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                f()
        return self.median_ms(graph.replay) / calls

    def host_us(self, f: Callable[[], Any], repeat: int = 300) -> float:
        """Return the median time that the CPU spends on a call."""
        for _ in range(1 if self.tiny else 50):
            f()
        times = []
        for _ in range(1 if self.tiny else repeat):
            self.synchronize()
            start = time.perf_counter()
            f()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    def peak_mib(self, f: Callable[[], Any]) -> float:
        """Return the most memory that a call allocates beyond what is there."""
        if self.device == "cpu":
            f()
            return math.nan
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    # ------------------------------------------------------------------ ceilings

    def _bandwidth(self) -> dict[str, float]:
        x, y = torch.randn(2, 2**16 if self.tiny else 2**26, device=self.device)
        z = torch.empty_like(x)
        return {
            "copy": 2 * x.nbytes / self.median_ms(lambda: z.copy_(x)) / 1e9,
            "add": 3 * x.nbytes / self.median_ms(lambda: torch.add(x, y, out=z)) / 1e9,
        }

    def _exponentials(self) -> float | None:
        """Return ex2.approx instructions a nanosecond of the whole device, None without a GPU."""
        if self.device == "cpu":
            return None
        import cupy

        blocks, threads, rounds = 132 * 16, 256, 512
        out = torch.empty(blocks * threads, device="cuda")
        kernel = cupy.RawKernel(EX2, "exponentials")
        import numpy

        def run() -> None:
            with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
                kernel((blocks,), (threads,), (out.data_ptr(), numpy.int32(rounds)))

        return 4 * rounds * blocks * threads / self.median_ms(run) / 1e6

    def floor_ms(self, bytes_moved: float, exponentials: float = 0) -> float:
        """Return the time that no implementation can beat on this device."""
        memory = bytes_moved / max(self.report["ceilings_TB_per_s"].values()) / 1e9
        rate = self.report["ex2_per_ns"]
        return max(memory, exponentials / rate / 1e6 if rate else 0.0)

    # ------------------------------------------------------------------ inputs

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Return normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        real = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        return torch.randn(shape, generator=generator, device=self.device, dtype=real).to(dtype)

    # ------------------------------------------------------------------ the table

    def heading(self) -> None:
        top = self.report["ceilings_TB_per_s"]
        rate = self.report["ex2_per_ns"]
        print(
            f"{self.report['device']}, torch {torch.__version__}; TB/s: copy {top['copy']:.2f}, "
            f"add {top['add']:.2f}" + (f"; ex2 {rate / 1e3:.2f}e12/s" if rate else "")
        )
        titles = "".join(f"{title:>10}" for _, title, _ in COLUMNS)
        print(f"{'case':<34}{'':<24}{titles}{'floors':>18}")

    def case(
        self,
        name: str,
        floors: Sequence[float],
        ours: Callable[[], Row],
        peers: dict[str, Callable[[], Row]] | None = None,
        others: dict[str, Callable[[], Row]] | None = None,
    ) -> None:
        """Measure one case and print its rows.

        Args:
            name: of the case.
            floors: in ms, forward, then forward + backward if that is measured.
            ours: measures lrnnx-core; a failure ends the run.
            peers: measure other libraries, as far as they can be imported and run.
            others: measure other ways into lrnnx-core, like ``ours``.
        """
        rows: dict[str, Any] = {"floor_ms": list(floors)}
        self.report["cases"][name] = rows
        for who, measure in {"lrnnx-core": ours, **(others or {})}.items():
            self._row(name, who, measure(), floors)
        for who, measure in ({} if self.quick else peers or {}).items():
            try:
                row = measure()
            except Exception as error:  # noqa: BLE001  # a peer that does not run is no failure
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
                self.report["skipped"][f"{who}, {name}"] = reason
                print(f"{name:<34}{who:<24} skipped: {reason}")
            else:
                self._row(name, who, row, floors)
            gc.collect()

    def _row(self, name: str, who: str, row: Row, floors: Sequence[float]) -> None:
        known = {k: v for k, v in row.items() if not math.isnan(v)}
        self.report["cases"][name][who] = known
        cells = "".join(
            f"{format(row[key], style) if key in known else '':>10}" for key, _, style in COLUMNS
        )
        rest = "  ".join(f"{k} {v:.4g}" for k, v in known.items() if k not in dict(_KEYS))
        limits = " / ".join(f"{f:.4f}" for f in floors)
        print(f"{name:<34}{who:<24}{cells}{limits:>18}  {rest}".rstrip(), flush=True)

    def note(self, key: str, values: dict[str, float]) -> None:
        """Keep and print numbers that belong to no case, such as the host's time."""
        self.report[key] = values
        print(f"{key}:", {k: round(v, 1) for k, v in values.items()})


_KEYS = tuple((key, title) for key, title, _ in COLUMNS)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the error against float64, relative in the 2-norm."""
    return float((got.to(expected.dtype) - expected).norm() / expected.norm())


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="no peers")
    found.add_argument("--tiny", action="store_true", help="small sizes; times that mean nothing")
    return found


def run(measure: Callable[[Session], None], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one benchmark and return its report; exit where there is no GPU."""
    if not arguments.tiny and not (torch.cuda.is_available() and cuda.ready()):
        sys.exit(f"benchmarks.cuda: needs a CUDA device and CuPy: {cuda.pip_line()}")
    session = Session(arguments.quick, arguments.tiny)
    session.heading()
    measure(session)
    return session.report


def main(description: str | None, measure: Callable[[Session], None]) -> int:
    """Run one benchmark from the command line; write JSON where asked."""
    options = parser(description)
    options.add_argument("--json", metavar="FILE")
    arguments = options.parse_args()
    report = run(measure, arguments)
    if arguments.json and not arguments.tiny:
        write(report, Path(arguments.json))
    return 0


def write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
