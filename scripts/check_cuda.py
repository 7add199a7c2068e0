# SPDX-License-Identifier: MIT
"""Compile every CUDA kernel for every architecture, without a GPU: `python scripts/check_cuda.py`.

Prints the registers of each kernel and fails on a compile error, or on register spills of a kernel
that is not in `MAY_SPILL`. Needs NVRTC alone: `pip install nvidia-cuda-nvrtc==13.0.88`. Without
``--every``, what is rare is left out on the architectures between others.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lrnnx_core.backends import cuda

KIB = 1024
# Multiprocessors of a common device (T4, A100, 3090, 4090, H100, B200, 5090), then shared memory of
# a multiprocessor and of a block (CUDA C++ programming guide, technical specifications per compute
# capability).
ARCHITECTURES = {
    75: cuda.Limits(40, 64 * KIB, 64 * KIB),
    80: cuda.Limits(108, 164 * KIB, 163 * KIB),
    86: cuda.Limits(82, 100 * KIB, 99 * KIB),
    89: cuda.Limits(128, 100 * KIB, 99 * KIB),
    90: cuda.Limits(132, 228 * KIB, 227 * KIB),
    100: cuda.Limits(148, 228 * KIB, 227 * KIB),
    120: cuda.Limits(170, 100 * KIB, 99 * KIB),
}
FLOAT16_ON = 90
"""Where float16 is compiled too: elsewhere bfloat16 stands for it, which differs in two
instructions of conversion."""
BETWEEN = (86, 89, 100)
"""Architectures for which the compiler does what it does for their neighbours."""
RARE = frozenset({"bfloat16", "float64", "complex128", "bilinear", "dirac"})
"""Words of a label that are compiled for the others alone."""
MAY_SPILL: dict[tuple[str, int], int] = {
    ("selective_scan_backward float32 mamba x2 n4 lanes 4", 75): 44,
    ("selective_scan_backward bfloat16 float32 mamba x2 n4 lanes 4", 75): 28,
    ("selective_scan_backward float16 float32 mamba x2 n4 lanes 4", 75): 28,
    ("selective_scan_backward float32 mamba reset x2 n4 lanes 4", 75): 56,
    ("selective_scan_backward float32 zoh x2 n4 lanes 4", 75): 108,
    ("selective_scan_backward float32 dirac x2 n4 lanes 4", 75): 44,
    ("selective_scan_backward float32 mamba timed x2 n4 lanes 4", 75): 52,
    ("selective_scan_backward float32 mamba timed state_only decay 1 x2 n4 lanes 4", 75): 76,
    ("selective_scan_backward float32 mamba x2 n4 lanes 4", 80): 12,
    ("selective_scan_backward float32 mamba reset x2 n4 lanes 4", 80): 44,
    ("selective_scan_backward float32 zoh x2 n4 lanes 4", 80): 96,
    ("selective_scan_backward float32 bilinear x2 n4 lanes 4", 80): 40,
    ("selective_scan_backward float32 dirac x2 n4 lanes 4", 80): 12,
    ("selective_scan_backward float32 mamba timed x2 n4 lanes 4", 80): 8,
    ("selective_scan_backward float32 mamba timed state_only decay 1 x2 n4 lanes 4", 80): 20,
    ("selective_scan_backward float32 mamba reset x2 n4 lanes 4", 86): 32,
    ("selective_scan_backward float32 zoh x2 n4 lanes 4", 86): 80,
    ("selective_scan_backward float32 bilinear x2 n4 lanes 4", 86): 12,
    ("selective_scan_backward float32 mamba timed state_only decay 1 x2 n4 lanes 4", 86): 16,
    ("selective_scan_backward float32 mamba reset x2 n4 lanes 4", 89): 32,
    ("selective_scan_backward float32 zoh x2 n4 lanes 4", 89): 80,
    ("selective_scan_backward float32 bilinear x2 n4 lanes 4", 89): 12,
    ("selective_scan_backward float32 mamba timed state_only decay 1 x2 n4 lanes 4", 89): 16,
    ("selective_scan_backward float32 mamba reset x2 n4 lanes 4", 90): 48,
    ("selective_scan_backward float32 zoh x2 n4 lanes 4", 90): 96,
    ("selective_scan_backward float32 bilinear x2 n4 lanes 4", 90): 44,
    ("selective_scan_backward float32 zoh x2 n4 lanes 4", 100): 36,
    ("selective_scan_backward float32 zoh x2 n4 lanes 4", 120): 28,
    ("selective_step float32 mamba loop lanes 16 rows 2", 100): 4,
    ("mamba_step bfloat16 mamba lanes 4 rows 4", 75): 4,
    ("mamba_step float32 mamba lanes 4 rows 4", 75): 4,
    ("mamba_step bfloat16 zoh lanes 4 rows 4", 75): 4,
    ("mamba_step bfloat16 zoh lanes 4 rows 4", 80): 4,
    ("mamba_step bfloat16 mamba lanes 4 rows 4", 86): 8,
    ("mamba_step float32 mamba lanes 4 rows 4", 86): 12,
    ("mamba_step bfloat16 zoh lanes 4 rows 4", 86): 8,
    ("mamba_step bfloat16 mamba lanes 4 rows 4", 89): 8,
    ("mamba_step float32 mamba lanes 4 rows 4", 89): 12,
    ("mamba_step bfloat16 zoh lanes 4 rows 4", 89): 8,
    ("mamba_step bfloat16 zoh lanes 4 rows 4", 90): 4,
    ("mamba_step float32 mamba lanes 4 rows 4", 100): 4,
    ("mamba_step_mixed bfloat16 outputs 16 rows 2", 120): 4,
    ("mamba_step float32 mamba lanes 4 rows 4", 120): 12,
    ("mamba_step bfloat16 zoh lanes 4 rows 4", 120): 12,
    ("linear_step float64 group 128 outputs 1 rows 1", 120): 8,
    ("add_norm float64", 90): 8,
    ("s4d_chunks float32 group 8 tiles 8", 80): 52,
    ("s4d_chunks bfloat16 group 8 tiles 8", 80): 36,
    ("s4d_chunks_backward float32 group 8 tiles 8", 80): 68,
    ("s4d_chunks_backward float32 group 4 tiles 4", 80): 24,
    ("s4d_chunks_backward bfloat16 group 8 tiles 8", 80): 64,
    ("s4d_chunks float32 group 8 tiles 8", 90): 32,
    ("s4d_chunks bfloat16 group 8 tiles 8", 90): 32,
    ("s4d_chunks_backward float32 group 8 tiles 8", 90): 68,
    ("s4d_chunks_backward float32 group 4 tiles 4", 90): 16,
    ("s4d_chunks_backward bfloat16 group 8 tiles 8", 90): 68,
    ("s4d_chunks float32 group 8 tiles 8", 100): 48,
    ("s4d_chunks bfloat16 group 8 tiles 8", 100): 24,
    ("s4d_chunks_backward bfloat16 group 8 tiles 8", 100): 140,
    ("s4d_chunks_backward float32 group 8 tiles 8", 100): 124,
    ("s4d_chunks_backward float32 group 4 tiles 4", 100): 4,
    ("causal_conv1d_backward bfloat16 second x4", 75): 32,
    ("causal_conv1d_backward bfloat16 second x4", 80): 40,
    ("causal_conv1d_backward bfloat16 second x4", 86): 36,
    ("causal_conv1d_backward bfloat16 second x4", 89): 36,
    ("causal_conv1d_backward bfloat16 second x4", 90): 60,
    ("causal_conv1d_backward bfloat16 second x4", 100): 88,
    ("causal_conv1d_backward bfloat16 second x4", 120): 64,
    ("causal_conv1d_backward bfloat16 inner 96 x4", 80): 216,
    ("causal_conv1d_backward bfloat16 inner 96 x4", 86): 216,
    ("causal_conv1d_backward bfloat16 inner 96 x4", 89): 216,
    ("causal_conv1d_backward bfloat16 inner 96 x4", 90): 222,
    ("causal_conv1d_backward bfloat16 inner 96 x4", 100): 104,
    ("causal_conv1d_backward bfloat16 inner 96 x4", 120): 112,
    ("causal_conv1d_backward float32 x4", 100): 48,
    ("causal_conv1d_backward float32 x4", 120): 32,
    ("causal_conv1d_backward float32 second x4", 100): 224,
    ("causal_conv1d_backward float32 second x4", 120): 272,
    ("causal_conv1d_backward float64 x2", 100): 4,
    ("causal_conv1d_backward float64 x2", 120): 16,
    ("trilinear_wide float32", 80): 44,
    ("trilinear_wide float32 across", 80): 52,
    ("trilinear_wide float32", 90): 72,
    ("trilinear_wide float32 across", 90): 44,
    ("trilinear_wide float32", 100): 20,
    ("trilinear_wide float32 across", 100): 24,
    ("trilinear_narrow float32", 100): 24,
}
"""(what `label` returns, architecture) -> bytes of spill stores that are accepted.

`--accept` prints the entries for what spills now.
"""


class Compiled(NamedTuple):
    """What the compiler says of one kernel."""

    registers: int
    static_shared: int
    spill: int
    error: str = ""
    seconds: float = 0.0


def load_nvrtc() -> ctypes.CDLL:
    """Return the library of the wheel nvidia-cuda-nvrtc."""
    try:
        files = metadata.files("nvidia-cuda-nvrtc") or []
    except metadata.PackageNotFoundError:
        sys.exit("check_cuda: NVRTC is missing: pip install nvidia-cuda-nvrtc==13.0.88")
    found = {
        Path(f).name: str(f.locate()) for f in files if ".so" in f.name and "alt" not in f.name
    }
    libraries = [found[name] for name in sorted(found)]  # libnvrtc-builtins first: NVRTC opens it
    return [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in libraries][-1]


def compile_kernel(nvrtc: ctypes.CDLL, kernel: cuda.Kernel, architecture: int) -> Compiled:
    """Compile as CuPy would, to machine code."""
    start = time.thread_time()
    options = (
        f"-arch=sm_{architecture}",
        "-ftz=true",
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
        *kernel.options,
    )
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = cuda.source(kernel.file).encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, kernel.file.encode(), 0, None, None)
    array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    report = log.value.decode()
    if failed:
        return Compiled(0, 0, 0, report, time.thread_time() - start)

    def number(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, report))

    return Compiled(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes smem"),
        number(r"(\d+) bytes spill stores"),
        "" if "Used" in report else f"the compiler reports no kernel: {report}",
        time.thread_time() - start,
    )


# Definition -> (the value that goes without saying, how any other one is written), in the order of
# a label. What follows from these or from the device (warps, stages, bytes) is left out.
WORDS = {
    "STATE": ("", "{}"),
    "WEIGHT": ("", "weight {}"),
    "B_TYPE": ("", "B {}"),
    "C_TYPE": ("", "C {}"),
    "SCHEME": ("", "{}"),
    "TAPS": ("4", "{} taps"),
    "SILU": ("true", "no silu"),
    "SECOND": ("false", "second"),
    "INNER": ("0", "inner {}"),
    "VARYING": ("true", "constant"),
    "B_VARIES": ("true", "constant B"),
    "C_VARIES": ("true", "constant C"),
    "SOFTPLUS": ("true", "no softplus"),
    "GATE": ("true", "no gate"),
    "RESET": ("false", "reset"),
    "TIMED": ("false", "timed"),
    "STATE_ONLY": ("false", "state_only"),
    "DECAY": ("0", "decay {}"),
    "ADJOINT": ("false", "adjoint"),
    "SPLIT": ("false", "split"),
    "LOOP": ("false", "loop"),
    "PACK": ("1", "x{}"),
    "PER_LANE": ("", "n{}"),
    "LANES": ("", "lanes {}"),
    "GROUP": ("", "group {}"),
    "OUTPUTS": ("", "outputs {}"),
    "ROWS": ("", "rows {}"),
    "HEIGHT": ("", "rows {}"),
    "SHARES": ("", "shares {}"),
    "LANE_ROWS": ("", "lane {}"),
    "LANE_OUTPUTS": ("", "x {}"),
    "RANK": ("0", "rank {}"),
    "TILES": ("", "tiles {}"),
    "SIDE": ("", "side {}"),
    "ACROSS": ("16", "across {}"),
    "STATE_WIDTH": ("", "h{}"),
    "MATRIX_WIDTH": ("", "m{}"),
    "LAYER": ("0", "mean"),
    "SPREAD": ("0", "few rows"),
    "SETTLED": ("false", "settled"),
    "ALONG": ("true", "across"),
}


def label(kernel: cuda.Kernel) -> str:
    """Return a short name: entry point and the choices that tell its variants apart.

    The same on every architecture for what is the same variant there.
    """
    choices = dict(o[2:].split("=") for o in kernel.options if o.startswith("-D"))
    dtype, full = choices["DTYPE"], choices.get("VECTOR")
    plain = {"STATE": dtype, "WEIGHT": dtype, "B_TYPE": dtype, "C_TYPE": dtype}
    plain |= {} if full is None else {"STATE_WIDTH": full, "MATRIX_WIDTH": full}
    words = [
        form.format(choices[name].lower())
        for name, (silent, form) in WORDS.items()
        if name in choices and choices[name] != plain.get(name, silent)
    ]
    return " ".join((kernel.entry, dtype, *words))


def collect(
    architectures: Sequence[int], every: bool = False
) -> dict[tuple[str, int], cuda.Kernel]:
    """Return the kernels to compile under their label and architecture; all of them if ``every``.

    Raises:
        ValueError: two kernels have the same label, so one would go unchecked.
    """
    found: dict[tuple[str, int], cuda.Kernel] = {}
    for architecture in architectures:
        for kernels in cuda.KERNELS.values():
            for kernel in kernels(ARCHITECTURES[architecture]):
                name = label(kernel)
                half = architecture != FLOAT16_ON and "-DDTYPE=float16" in kernel.options
                rare = architecture in BETWEEN and RARE & set(name.split())
                if (half or rare) and not every:
                    continue
                there = found.setdefault((name, architecture), kernel)
                if there is not kernel:
                    raise ValueError(f"one label for two kernels: {there} and {kernel}")
    return found


def table(compiled: Mapping[tuple[str, int], Compiled]) -> str:
    """Return the registers of each kernel, one line a kernel, an "s" where it spills."""
    names, architectures = (list(dict.fromkeys(k)) for k in zip(*compiled, strict=True))
    width = max(map(len, names))
    lines = [f"{'registers':<{width}} " + "".join(f"{f'sm_{a}':>8}" for a in architectures)]
    for name in names:
        cells = ""
        for architecture in architectures:
            x = compiled.get((name, architecture))  # a size may have another variant elsewhere
            text = "" if x is None else "error" if x.error else str(x.registers)
            cells += f"{text:>7}{'s' if x is not None and x.spill else ' '}"
        lines.append(f"{name:<{width}} {cells}")
    return "\n".join(lines)


def failures_of(
    jobs: Mapping[tuple[str, int], cuda.Kernel], compiled: Mapping[tuple[str, int], Compiled]
) -> list[str]:
    """Return what is wrong: errors, spills that are not accepted, too much shared memory."""
    failures: list[str] = []
    for (name, architecture), x in compiled.items():
        where, accepted = f"{name} sm_{architecture}", MAY_SPILL.get((name, architecture), 0)
        shared = x.static_shared + jobs[name, architecture].shared
        if x.error:
            failures.append(f"{where}: {x.error}")
        if x.spill > accepted:
            failures.append(f"{where}: spills {x.spill} bytes, {accepted} are accepted")
        if shared > ARCHITECTURES[architecture].shared_per_block:
            failures.append(f"{where}: {shared} bytes of shared memory do not fit")
    return failures


def spent(compiled: Mapping[tuple[str, int], Compiled]) -> str:
    """Return the compiler's seconds, by entry point, the longest first."""
    seconds: dict[str, float] = defaultdict(float)
    for (name, _), x in compiled.items():
        seconds[name.split()[0]] += x.seconds
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{entry} {s:.0f} s" for entry, s in ordered)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile everything, print the table, return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES]
    )
    parser.add_argument("--only", default="", help="kernels whose name holds this text")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--every", action="store_true", help="leave nothing out")
    parser.add_argument(
        "--accept", action="store_true", help="also print what spills as entries of MAY_SPILL"
    )
    arguments = parser.parse_args(argv)
    jobs = {
        k: v for k, v in collect(arguments.arch, arguments.every).items() if arguments.only in k[0]
    }
    if not jobs:
        parser.error(f"no kernel has {arguments.only!r} in its name")
    nvrtc = load_nvrtc()
    start = time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = pool.map(lambda job: compile_kernel(nvrtc, job[1], job[0][1]), jobs.items())
        compiled = dict(zip(jobs, results, strict=True))
    seconds = time.perf_counter() - start
    failures = failures_of(jobs, compiled)
    print(table(compiled))
    if arguments.accept:
        print("\nMAY_SPILL: dict[tuple[str, int], int] = {")
        for (name, architecture), x in compiled.items():
            if x.spill:
                print(f'    ("{name}", {architecture}): {x.spill},')
        print("}")
    print(f"\nprocessor time: {spent(compiled)}")
    print(f"{len(jobs)} kernels compiled in {seconds:.0f} s, {len(failures)} failures")
    print("\n".join(failures), file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
