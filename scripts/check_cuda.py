# SPDX-License-Identifier: MIT
"""Compile every CUDA kernel for every architecture, without a GPU: `python scripts/check_cuda.py`.

Prints the registers of each kernel and fails on a compile error, or on register spills of a kernel
that is not in `MAY_SPILL`. Needs NVRTC alone: `pip install nvidia-cuda-nvrtc==13.0.88`.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lrnnx_core.backends import cuda

KIB = 1024
# Shared memory of a multiprocessor and of a block (CUDA C++ programming guide, technical
# specifications per compute capability); the number of multiprocessors does not matter here.
ARCHITECTURES = {
    75: cuda.Limits(1, 64 * KIB, 64 * KIB),
    80: cuda.Limits(1, 164 * KIB, 163 * KIB),
    86: cuda.Limits(1, 100 * KIB, 99 * KIB),
    89: cuda.Limits(1, 100 * KIB, 99 * KIB),
    90: cuda.Limits(1, 228 * KIB, 227 * KIB),
    100: cuda.Limits(1, 228 * KIB, 227 * KIB),
    120: cuda.Limits(1, 100 * KIB, 99 * KIB),
}
MAY_SPILL: dict[tuple[str, int], int] = {}
"""(what `label` returns, architecture) -> bytes of spill stores that are accepted."""


class Compiled(NamedTuple):
    """What the compiler says of one kernel."""

    registers: int
    static_shared: int
    spill: int
    error: str = ""


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
        return Compiled(0, 0, 0, report)

    def number(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, report))

    return Compiled(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes smem"),
        number(r"(\d+) bytes spill stores"),
        "" if "Used" in report else f"the compiler reports no kernel: {report}",
    )


def label(kernel: cuda.Kernel) -> str:
    """Return a short name: entry point and the choices that tell its variants apart."""
    choices = dict(o[2:].split("=") for o in kernel.options if o.startswith("-D"))
    pack = "" if choices.get("PACK", "1") == "1" else f" x{choices['PACK']}"
    varying = " constant" if choices.get("VARYING") == "false" else ""
    return f"{kernel.entry} {choices['DTYPE']}{pack}{varying}"


def main() -> int:
    """Compile everything, print the table, return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES]
    )
    parser.add_argument("--only", default="", help="kernels whose name holds this text")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    nvrtc = load_nvrtc()
    jobs = {
        (label(kernel), arch): kernel
        for arch in arguments.arch
        for kernels in cuda.KERNELS.values()
        for kernel in kernels(ARCHITECTURES[arch])
        if arguments.only in label(kernel)
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = pool.map(lambda job: compile_kernel(nvrtc, job[1], job[0][1]), jobs.items())
        compiled = dict(zip(jobs, results, strict=True))
    names = list(dict.fromkeys(name for name, _ in jobs))
    width = max(map(len, names))
    print(f"{'registers':<{width}} " + "".join(f"{f'sm_{a}':>8}" for a in arguments.arch))
    failures: list[str] = []
    for name in names:
        cells = ""
        for arch in arguments.arch:
            result, kernel = compiled[name, arch], jobs[name, arch]
            spill = result.spill > MAY_SPILL.get((name, arch), 0)
            shared = result.static_shared + kernel.shared > ARCHITECTURES[arch].shared_per_block
            cells += (
                f"{'error' if result.error else result.registers:>7}{'s' if result.spill else ' '}"
            )
            if result.error:
                failures.append(f"{name} sm_{arch}: {result.error}")
            if spill:
                failures.append(f"{name} sm_{arch}: spills {result.spill} bytes")
            if shared:
                failures.append(
                    f"{name} sm_{arch}: {result.static_shared + kernel.shared} bytes of "
                    "shared memory do not fit"
                )
        print(f"{name:<{width}} {cells}")
    print(f"\n{len(jobs)} kernels compiled, {len(failures)} failures")
    print("\n".join(failures), file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
