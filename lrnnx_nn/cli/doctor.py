# SPDX-License-Identifier: MIT
"""``lrnnx doctor``: what is installed, what is missing, and the pip line that brings it."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lrnnx_nn.optional import pip_line


class Finding(NamedTuple):
    """One line of the report; ``remedy`` is empty where nothing is to be done."""

    what: str
    found: str
    remedy: str = ""


def run(arguments: argparse.Namespace) -> int:
    """Print the report; a missing optional package is no failure."""
    findings = [finding for look in _LOOKS for finding in look()]
    width = max(len(finding.what) for finding in findings)
    for what, found, remedy in findings:
        print(f"{what:<{width}}  {found}" + (f"  ->  {remedy}" if remedy else ""))
    missing = sum(bool(finding.remedy) for finding in findings)
    print(f"\n{missing} optional part(s) missing" if missing else "\nnothing is missing")
    return 0


def _python() -> list[Finding]:
    import torch

    cuda = torch.version.cuda
    return [
        Finding("Python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("lrnnx-core", _version("lrnnx-core") or "not installed, run from a checkout"),
        Finding("torch", f"{torch.__version__} ({f'CUDA {cuda}' if cuda else 'no CUDA'})"),
        Finding("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
    ]


def _numba() -> list[Finding]:
    from lrnnx_core.backends import library

    numba = _package("numba", "cpu", "CPU kernels")
    if numba.remedy:
        return [numba, Finding("CPU ops", "plain PyTorch (no numba)")]
    try:
        plain = library.plain_on_cpu()
    except ValueError as error:
        return [numba, Finding("CPU ops", str(error), "unset LRNNX_CPU_BACKEND")]
    if plain:
        return [numba, Finding("CPU ops", "plain PyTorch (LRNNX_CPU_BACKEND=torch)")]
    try:
        compiling = importlib.import_module("lrnnx_core.backends.cpu.compiling")
    except ImportError as error:
        return [numba, Finding("CPU ops", f"plain PyTorch ({error})", "another numba or numpy")]
    folder = compiling.cache_folder()
    cache = Finding("CPU cache", str(folder))
    if folder is None:
        cache = Finding("CPU cache", "no folder can be written", "set NUMBA_CACHE_DIR to one")
    return [numba, Finding("CPU ops", "compiled, by numba"), cache]


def _demo() -> list[Finding]:
    packages = ("aeon", "matplotlib", "rich", "safetensors", "scipy", "statsmodels")
    return [_package(name, "demo", "lrnnx train") for name in packages]


def _sources() -> list[Finding]:
    from lrnnx_core.backends import cuda

    operators = Finding("CUDA ops", ", ".join(sorted(cuda.KERNELS)))
    try:
        return [operators, Finding("CUDA source", str(cuda.source_dir()))]
    except FileNotFoundError as error:
        return [operators, Finding("CUDA source", "missing", str(error))]


def _gpu() -> list[Finding]:
    import torch

    driver = cuda_driver()
    if driver is None:
        found = [Finding("driver", "no NVIDIA driver")]
    else:
        found = [Finding("driver", f"supports CUDA {driver[0]}.{driver[1]}")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            memory = f"{p.total_memory / 2**30:.0f} GiB"
            found.append(Finding(f"GPU {i}", f"{p.name}, sm_{p.major}{p.minor}, {memory}"))
    elif driver is None:
        found.append(Finding("GPU", "none"))
    else:
        why = "this torch has no CUDA" if torch.version.cuda is None else "torch cannot use it"
        found.append(Finding("GPU", why, "a CUDA build of torch, see pytorch.org"))
    return found + _cupy(driver)


def _cupy(driver: tuple[int, int] | None) -> list[Finding]:
    """Look for CuPy and NVRTC; without a driver nobody needs them."""
    import torch

    major = int((torch.version.cuda or "0").split(".")[0]) or (driver[0] if driver else 0)
    line = pip_line("cuda12" if major == 12 else "cuda13")
    remedy = line if driver is not None else ""
    idle = "" if driver is not None else " (not needed without an NVIDIA GPU)"
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return [
            Finding("CuPy", "missing" + idle, remedy),
            Finding("NVRTC", "missing" + idle, remedy),
        ]
    found = [Finding("CuPy", str(cupy.__version__))]
    try:
        version = importlib.import_module("cupy.cuda").nvrtc.getVersion()
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return [*found, Finding("NVRTC", f"cannot be loaded ({error})", remedy)]
    found.append(Finding("NVRTC", ".".join(map(str, version))))
    if driver is not None and driver[0] < version[0]:
        found[-1] = found[-1]._replace(remedy="a newer NVIDIA driver, or " + pip_line("cuda12"))
    return [*found, _kernel_cache()]


def _kernel_cache() -> Finding:
    """Look for the folder in which CuPy keeps compiled kernels."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "0") not in ("", "0"):
        return Finding("cache", "in memory only (CUPY_CACHE_IN_MEMORY)")
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache").expanduser()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return Finding("cache", str(folder))
    return Finding("cache", f"{folder} is not writable", "set CUPY_CACHE_DIR to one that is")


def cuda_driver() -> tuple[int, int] | None:
    """Return the CUDA version that the NVIDIA driver supports, None without a driver."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    version = ctypes.c_int()
    try:
        code = ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if code else (version.value // 1000, version.value % 1000 // 10)


def _package(name: str, extra: str, purpose: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, f"missing, for {purpose}", pip_line(extra))
    return Finding(name, version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


_LOOKS: tuple[Callable[[], list[Finding]], ...] = (_python, _numba, _demo, _sources, _gpu)
