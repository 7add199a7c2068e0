# SPDX-License-Identifier: MIT
"""What the benchmarks of the compiled CPU kernels share: clocks, ceilings, tables, JSON files.

All implementations of a case run in one process, on the same cores, in turns: the machine's moods
hit all alike. A time is the best of the rounds. The process is bound to as many cores as it may use
threads, so that libraries with a thread pool of their own (jax) get no more than the others.

The ceilings are measured in the same process: bytes moved by a copy, the rate of `torch.exp`, and
that of a matrix product. A floor is what a case cannot beat with them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.memory import resident

ROOT = Path(__file__).parent.parent.parent
OURS = "lrnnx-core"
PLAIN = "lrnnx-core, plain torch"
SWITCH = "LRNNX_CPU_BACKEND"
SETTLE = 0.02  # seconds of quiet before a turn


class Way(NamedTuple):
    """One implementation of a case: calls that wait for their result.

    ``output`` gives what ``forward`` computes, to be compared before the clock starts; None where
    the numbers cannot be the same (an own initialisation).
    """

    forward: Callable[[], Any]
    train: Callable[[], Any] | None = None
    output: Callable[[], Tensor] | None = None


@contextmanager
def plain_torch() -> Iterator[None]:
    """Let lrnnx-core run without its compiled kernels."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def torch_way(function: Callable[..., Tensor], *inputs: Tensor, plain: bool = False) -> Way:
    """Return the way that calls ``function(*inputs)``, and differentiates it by floating inputs."""
    leaves = [
        t.detach().clone().requires_grad_(True) if t.is_floating_point() or t.is_complex() else t
        for t in inputs
    ]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def train() -> None:
        y = function(*leaves)
        torch.autograd.backward(y, torch.ones_like(y))
        for leaf in leaves:
            leaf.grad = None

    return in_plain_torch(Way(forward, train, forward)) if plain else Way(forward, train, forward)


def module_way(layer: torch.nn.Module, u: Tensor, compare: bool = True) -> Way:
    """Return the way that calls a Module, and differentiates it by input and parameters."""
    leaf = u.detach().clone().requires_grad_(True)

    def result(x: Tensor) -> Tensor:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    def forward() -> Tensor:
        with torch.no_grad():
            return result(u)

    def train() -> None:
        y = result(leaf)
        torch.autograd.backward(y, torch.ones_like(y))
        leaf.grad = None
        layer.zero_grad()

    return Way(forward, train, forward if compare else None)


def in_plain_torch(way: Way) -> Way:
    """Return a way of lrnnx-core with its compiled kernels switched off."""

    def off(call: Callable[[], Any] | None) -> Any:
        if call is None:
            return None

        def run() -> Any:
            with plain_torch():
                return call()

        return run

    return Way(*map(off, way))


def jax_way(function: Callable[..., Any], *inputs: Tensor) -> Way:
    """Return the way that calls a jitted jax function, and its gradient by all inputs."""
    import jax
    import jax.numpy as jnp

    arrays = [jnp.asarray(t.detach().numpy()) for t in inputs]
    forward = jax.jit(function)
    gradient = jax.jit(
        jax.grad(lambda *a: function(*a).sum().real, argnums=tuple(range(len(arrays))))
    )
    return Way(
        lambda: jax.block_until_ready(forward(*arrays)),
        lambda: jax.block_until_ready(gradient(*arrays)),
        lambda: torch.from_numpy(__import__("numpy").array(forward(*arrays))),
    )


def wide(t: Tensor) -> Tensor:
    """Return a result in double precision."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float64))


class Session:
    """One run of one benchmark at one number of threads.

    Args:
        threads: of every implementation.
        rounds: in which all ways of a case take turns.
        tiny: small sizes, once, to see that everything runs; such times mean nothing.
        peers: whether other libraries run too.
    """

    def __init__(
        self, threads: int, rounds: int = 7, *, tiny: bool = False, peers: bool = True
    ) -> None:
        self.threads, self.rounds, self.tiny, self.peers = threads, rounds, tiny, peers
        self.cases: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.curves: dict[str, dict[str, list[list[float]]]] = {}
        self.ceilings = self._ceilings()

    def _ceilings(self) -> dict[str, float]:
        size = 2**12 if self.tiny else 2**24
        n = 64 if self.tiny else 1024
        x, z = torch.randn(2, size)
        m, out = torch.randn(2, n, n)
        small = torch.randn(2**14)
        result = torch.empty_like(small)
        ways = {
            "copy": Way(lambda: z.copy_(x)),
            "exp": Way(lambda: torch.exp(small, out=result)),
            "gemm": Way(lambda: torch.mm(m, m, out=out)),
        }
        took = {name: row["forward"] * 1e-3 for name, row in self._turns(ways, 5).items()}
        return {
            "copy_GB_per_s": 2 * x.nbytes / took["copy"] / 1e9,
            "exp_per_ns": small.numel() / took["exp"] / 1e9,
            "gemm_GFLOP_per_s": 2 * n**3 / took["gemm"] / 1e9,
        }

    def floor_ms(self, moved: float = 0, exps: float = 0, flops: float = 0) -> float:
        """Return the time under which the ceilings leave no room."""
        top = self.ceilings
        seconds = max(
            moved / top["copy_GB_per_s"] / 1e9,
            exps / top["exp_per_ns"] / 1e9,
            flops / top["gemm_GFLOP_per_s"] / 1e9,
        )
        return seconds * 1e3

    def case(
        self,
        name: str,
        floors: tuple[float, float | None],
        ways: dict[str, Callable[[], Way]],
        *,
        tolerance: float = 1e-3,
        key: str | None = None,
    ) -> None:
        """Check and time one case.

        Args:
            name: of the case.
            floors: ms, forward and training (None where nothing is trained).
            ways: make the implementations; `OURS` first. One of another library that cannot be
                imported or run is left out with its reason.
            tolerance: of the outputs' difference to ours, relative in the 2-norm.
            key: whom to compare with, `OURS` by default.
        """
        made: dict[str, Way] = {}
        expected: Tensor | None = None
        for who, make in ways.items():
            own = who.startswith("lrnnx")
            if not (own or self.peers):
                continue
            try:
                way = make()
                way.forward()
                if way.train is not None:
                    way.train()
                got = None if way.output is None else wide(way.output())
            except Exception as error:  # a peer that does not run is no failure
                if own:
                    raise
                reason = (str(error).splitlines() or [""])[0][:160]
                self.skipped[f"{who}, {name}"] = f"{type(error).__name__}: {reason}"
                print(f"{name:<34}{who:<30} skipped: {self.skipped[f'{who}, {name}']}")
                continue
            if expected is None:
                expected = got
            elif got is not None:
                error = float((got - expected).norm() / expected.norm())
                if not error < tolerance:
                    raise ValueError(f"{name}: {who} computes something else ({error:.1e})")
            made[who] = way
        rows = self._turns(made, self.rounds)
        self.cases[name] = {"floor_ms": floors, "rows": rows}
        self._print(name)

    def _turns(self, ways: dict[str, Way], rounds: int) -> dict[str, dict[str, float]]:
        """Time every call of every way, in turns; return the best times in ms.

        Each turn begins with a pause and a call that is not counted: worker threads of the library
        before it still spin on the cores for a while.
        """
        calls = {
            (who, kind): call
            for who, way in ways.items()
            for kind, call in (("forward", way.forward), ("train", way.train))
            if call is not None
        }
        inner: dict[Any, int] = {}
        for which, call in calls.items():  # a call or more for 10 ms
            call()
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            inner[which] = 1 if self.tiny else max(1, min(1000, int(0.01 / max(took, 1e-7))))
        best = dict.fromkeys(calls, float("inf"))
        gc.collect()
        gc.disable()
        try:
            for _ in range(1 if self.tiny else rounds):
                for which, call in calls.items():
                    if len(calls) > 1 and not self.tiny:
                        time.sleep(SETTLE)
                        call()
                    start = time.perf_counter()
                    for _ in range(inner[which]):
                        call()
                    took = (time.perf_counter() - start) / inner[which]
                    best[which] = min(best[which], took)
        finally:
            gc.enable()
        rows: dict[str, dict[str, float]] = {who: {} for who in ways}
        for (who, kind), took in best.items():
            rows[who][kind] = took * 1e3
        return rows

    def curve(
        self,
        name: str,
        lengths: Sequence[int],
        make: Callable[[str, int], Way],
        who: Sequence[str],
        floor: Callable[[int], tuple[float, float]],
        limit: float = 1.5,
    ) -> None:
        """Time ``make(who, L)`` over lengths on one thread, others until a call takes ``limit`` s.

        Points are [L, forward ms, training ms, MiB that training adds to the peak]; of the floor,
        [L, forward ms, training ms].
        """
        if self.threads > 1:
            return
        lines: dict[str, list[list[float]]] = {w: [] for w in who if self.peers or w == OURS}
        over: set[str] = set()
        for length in lengths[:2] if self.tiny else lengths:
            ways: dict[str, Way] = {}
            for w in lines:
                if w in over:
                    continue
                try:
                    ways[w] = make(w, length)
                    start = time.perf_counter()
                    ways[w].forward()
                    if w != OURS and time.perf_counter() - start > limit:
                        raise TimeoutError
                except Exception:
                    if w == OURS:
                        raise
                    over.add(w)
                    ways.pop(w, None)
            for w, row in self._turns(ways, 3).items():
                trained = row.get("train")
                call = ways[w].train
                grown = None if call is None else growth_mib(call)
                lines[w].append([length, row["forward"], trained, grown])
                if w != OURS and row.get("train", row["forward"]) > 1e3 * limit:
                    over.add(w)
            last = {w: v[-1][1] for w, v in lines.items() if v and v[-1][0] == length}
            print(f"{name} L {length}: " + ", ".join(f"{w} {ms:.3g}" for w, ms in last.items()))
        lines["floor"] = [[n, *floor(n)] for n, *_ in lines[OURS]]
        self.curves[name] = lines

    def _print(self, name: str) -> None:
        found = self.cases[name]
        ours = found["rows"].get(OURS, {})
        for who, row in found["rows"].items():
            cells = ""
            for i, kind in enumerate(("forward", "train")):
                if kind not in row:
                    cells += f"{'':>21}"
                    continue
                times = f"{row[kind] / ours[kind]:.1f}x" if kind in ours else ""
                floor = found["floor_ms"][i]
                over = "" if not floor else f" ({row[kind] / floor:.1f} fl)"
                cells += f"{row[kind]:>10.3f}{times:>7}{over:>11}"
            print(f"{name:<36}{who:<32}{cells}", flush=True)

    def report(self) -> dict[str, Any]:
        """Return everything measured, for JSON."""
        return {
            "threads": self.threads,
            "ceilings": self.ceilings,
            "cases": self.cases,
            "curves": self.curves,
            "skipped": self.skipped,
        }


def growth_mib(call: Callable[[], Any]) -> float | None:
    """Return by how much a call raises the peak of the resident memory; None off Linux.

    What the C library keeps of earlier calls is given back first, so that it is counted again.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def machine() -> dict[str, Any]:
    """Return what a reader must know of the machine and the packages."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in (
        "torch",
        "numba",
        "numpy",
        "jax",
        "mambapy",
        "transformers",
        "s5-pytorch",
        "lru-pytorch",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    flags = ""
    try:
        text = Path("/proc/cpuinfo").read_text()
        cpu = next(
            r.split(":", 1)[1].strip() for r in text.splitlines() if r.startswith("model name")
        )
        known = next(r for r in text.splitlines() if r.startswith("flags")).split()
        flags = "AVX-512" if "avx512f" in known else "AVX2" if "avx2" in known else ""
    except (OSError, StopIteration):
        pass
    return {"cpu": cpu, "vectors": flags, "packages": packages}


def bind(threads: int) -> None:
    """Confine this process to ``threads`` cores, and torch to as many threads."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < threads:
            raise ValueError(f"{threads} threads, and this process may use {len(cores)} cores")
        os.sched_setaffinity(0, cores[:threads])
    torch.set_num_threads(threads)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options of every benchmark of this folder."""
    options = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--rounds", type=int, default=7, help="in which all take turns")
    options.add_argument("--quick", action="store_true", help="leave other libraries out")
    options.add_argument("--tiny", action="store_true", help="see that it runs; writes nothing")
    return options


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report, numbers to four digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [short(v) for v in value]
        return value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(short(report), indent=1) + "\n")
