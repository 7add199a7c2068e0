# SPDX-License-Identifier: MIT
# pyright: basic
"""Load the CUDA C++ sources through CuPy and launch their kernels on torch's streams.

A `Kernel` is one entry point of one source with its compile-time definitions; it is compiled for an
architecture at its first launch there, by NVRTC and without a compiler on the machine, and CuPy
keeps the result on disk. Its arguments are one struct, packed here field by field by a declared
layout: no value reaches a kernel that was not converted to the type which the kernel reads, and the
source asserts the layout's size. Launches go to torch's current stream of the device, so they can
be captured into CUDA graphs; outputs and scratch memory are torch's.

CuPy is imported when the first CUDA tensor arrives. Without it CUDA tensors run the pure PyTorch
operators, which is said once.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import re
import struct
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrnnx_core.backends.transforms import current_stream_handle

LARGEST_GRID = 2**31 - 1
WARP = 32
NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}
"""How numbers.cuh calls each dtype."""
MOST_COMPILERS = 16  # threads of `warm_up`
OVERLAP = os.environ.get("LRNNX_CUDA_OVERLAP") != "0"
"""Whether a `Kernel` that ``overlaps`` may begin while the one before it still runs."""
OVERLAP_CAPABILITY, OVERLAP_DRIVER = (9, 0), 12_030


class CudaBackendError(RuntimeError):
    """The CUDA kernels cannot be compiled or loaded; the message says what cures it."""


def source_dir() -> Path:
    """Return the folder of the CUDA sources: the checkout's ``cuda/``, else the wheel's copy.

    The checkout is preferred where it stands beside the package, since an editable install may
    carry an old copy.

    Raises:
        FileNotFoundError: neither is there; the installation is broken.
    """
    here = Path(__file__).resolve().parent
    root = here.parent.parent
    if (root / "cuda").is_dir() and (root / "pyproject.toml").is_file():
        return root / "cuda"
    if (here / "_cuda").is_dir():
        return here / "_cuda"
    raise FileNotFoundError(
        f"no CUDA sources in {root / 'cuda'} or {here / '_cuda'}; reinstall lrnnx-core"
    )


@functools.cache
def source(name: str) -> str:
    """Return a source with its headers pasted in, once each.

    CuPy's cache on disk knows the text it compiles and not what that includes; and so nothing but
    this folder's text reaches the compiler.

    Raises:
        FileNotFoundError: no such file, or a header that is not in the folder.
    """
    folder, pasted = source_dir(), set[str]()

    def paste(file: str) -> str:
        lines: list[str] = [f'#line 1 "{file}"\n']
        for number, line in enumerate((folder / file).read_text().splitlines(keepends=True), 1):
            header = re.match(r'#include "([\w.]+)"', line)
            if header is None:
                lines.append("\n" if line.startswith("#pragma once") else line)
            elif header[1] not in pasted:
                pasted.add(header[1])
                lines.append(f'{paste(header[1])}\n#line {number + 1} "{file}"\n')
        return "".join(lines)

    return paste(name)


def pip_line() -> str:
    """Return the pip command that brings the CuPy which fits this torch."""
    major = (torch.version.cuda or "13").split(".")[0]
    return f'pip install "lrnnx-core[cuda{12 if major == "12" else 13}]"'


class Kernel:
    """One entry point of a CUDA source.

    Args:
        file: name of the source in ``cuda/``.
        entry: name of the ``extern "C"`` function; its one argument is ``struct Arguments``.
        definitions: compile-time choices, ``-DNAME=VALUE``.
        layout: the fields of ``Arguments`` in the language of `struct`, native alignment: ``P``
            pointer, ``q`` long long, ``i`` int, ``f`` float, ``d`` double.
        shared: the most dynamic shared memory a launch asks for, in bytes.
        overlaps: whether a launch may begin while the kernel before it on the stream still runs:
            the source waits for that itself (``await_previous`` in memory.cuh). It does on devices
            of compute capability 9.0 and above, unless LRNNX_CUDA_OVERLAP=0 is set.
    """

    def __init__(
        self,
        file: str,
        entry: str,
        definitions: Mapping[str, object],
        layout: str,
        shared: int = 0,
        *,
        overlaps: bool = False,
    ) -> None:
        self.file, self.entry, self.shared = file, entry, shared
        self.overlaps = overlaps
        self._struct = struct.Struct("@" + layout + "0P")
        self.options = (
            "-std=c++17",
            *(f"-D{name}={value}" for name, value in definitions.items()),
            f"-DARGUMENT_BYTES={self._struct.size}",
        )
        self._functions: dict[int, int] = {}
        self._overlapping: set[int] = set()  # devices
        self._modules: list[Any] = []
        self._loading = threading.Lock()
        self._local = _Frame(self._struct.size)

    def __repr__(self) -> str:
        return f"Kernel({self.file}, {self.entry}, {' '.join(self.options)})"

    def launch(self, device: int, blocks: int, threads: int, shared: int, *values: float) -> None:
        """Run on torch's current stream of CUDA device ``device``, which must be the current one.

        Args:
            device: index of the device of every pointer.
            blocks: size of the grid.
            threads: size of a block.
            shared: bytes of dynamic shared memory.
            *values: one for every field of the layout.

        Raises:
            CudaBackendError: the kernel cannot be compiled or loaded.
            ValueError: the grid is larger than CUDA allows.
            struct.error: a value does not have its field's type, or one too many or few.
        """
        function = self._functions.get(device)
        if function is None:
            function = self._load(device)
        frame = self._local
        if device not in frame.devices:  # a new thread has no current context yet
            _runtime().setDevice(device)
            frame.devices.add(device)
        if blocks > LARGEST_GRID:
            raise ValueError(f"{self.entry}: {blocks} blocks, CUDA allows {LARGEST_GRID}")
        self._struct.pack_into(frame.buffer, 0, *values)
        if OVERLAP and device in self._overlapping:
            stream = current_stream_handle(device)
            _launch_overlapping(function, blocks, threads, shared, stream, frame)
            return
        _launch_kernel(
            function, blocks, 1, 1, threads, 1, 1, shared, current_stream_handle(device),
            frame.parameters, 0,
        )  # fmt: skip

    def compile(self, device: int) -> None:
        """Compile and load for a device ahead of the first launch.

        Raises:
            CudaBackendError: the kernel cannot be compiled or loaded.
        """
        if device not in self._functions:
            self._load(device)

    def _load(self, device: int) -> int:
        cupy = _compiler()
        with self._loading:  # threads may compile different kernels at the same time
            if device not in self._functions:
                with torch.cuda.device(device), _explained(cupy):
                    module = cupy.RawModule(code=source(self.file), options=self.options)
                    function = module.get_function(self.entry)
                    if self.shared:
                        function.max_dynamic_shared_size_bytes = self.shared
                    if self.overlaps and _can_overlap(device, cupy):
                        self._overlapping.add(device)
                    self._functions[device] = function.kernel.ptr
                self._modules.append(module)  # the function lives as long as its module
            return self._functions[device]


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``; the value is a union of 64 bytes, of which an integer is the first."""

    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_uint64 * 8))


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("blocks", "blocks_y", "blocks_z")),
        *((name, ctypes.c_uint) for name in ("threads", "threads_y", "threads_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Frame(threading.local):
    """A thread's packed arguments of one kernel, and what points to them."""

    def __init__(self, size: int) -> None:
        self.devices: set[int] = set()
        self.buffer = ctypes.create_string_buffer(size)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.parameters = ctypes.addressof(self._pointers)
        self.config = _Config(0, 1, 1, 0, 1, 1, 0, None, None, 1)
        self._attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        self.config.attributes = ctypes.pointer(self._attribute)
        self.config_at = ctypes.addressof(self.config)


_lock = threading.RLock()


def _compiler() -> Any:
    """Return CuPy, once it is known that the driver runs what it compiles."""
    with _lock:
        cupy = cupy_module()
        if cupy is None:
            raise CudaBackendError(f"CuPy is missing: {pip_line()}")
        _check_driver(cupy)
        return cupy


def _launch_kernel(*arguments: int) -> None:
    """Replace this very name by the driver's function at the first call."""
    global _launch_kernel
    cupy = cupy_module()
    if cupy is None:
        raise CudaBackendError(f"CuPy is missing: {pip_line()}")
    _launch_kernel = cupy.cuda.driver.launchKernel
    _launch_kernel(*arguments)


def _launch_overlapping(
    function: int, blocks: int, threads: int, shared: int, stream: int, frame: _Frame
) -> None:
    config = frame.config
    config.blocks, config.threads, config.shared, config.stream = blocks, threads, shared, stream
    status = _driver()(frame.config_at, function, frame.parameters, None)
    if status:
        raise importlib.import_module("cupy.cuda").driver.CUDADriverError(status)


@functools.cache
def _driver() -> Any:
    """Return the driver's launch with attributes, which CuPy does not bind."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    launch = ctypes.CDLL(name).cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    launch.restype = ctypes.c_int
    return launch


def _can_overlap(device: int, cupy: Any) -> bool:
    """Return whether the device can and the driver can capture it into a graph."""
    return (
        torch.cuda.get_device_capability(device) >= OVERLAP_CAPABILITY
        and cupy.cuda.runtime.driverGetVersion() >= OVERLAP_DRIVER
    )


def _runtime() -> Any:
    return importlib.import_module("cupy.cuda").runtime


@functools.cache
def cupy_module() -> Any | None:
    """Return CuPy, or None where it is not installed, which is warned of once.

    Raises:
        CudaBackendError: CuPy is there and cannot make the folder of its cache.
    """
    try:
        return importlib.import_module("cupy")
    except OSError as error:  # CuPy makes the folder of its cache when it is imported
        raise CudaBackendError(_cache_message(error)) from error
    except ImportError as error:
        cause = "" if isinstance(error, ModuleNotFoundError) else f" (it is broken: {error})"
        warnings.warn(
            "CuPy is missing, so lrnnx-core runs CUDA tensors in plain PyTorch, which is right "
            f"but slower{cause}: {pip_line()}",
            stacklevel=2,
        )
        return None


@functools.cache
def ready() -> bool:
    """Return whether CUDA tensors run compiled kernels; asks for CuPy the first time."""
    return torch.version.hip is None and cupy_module() is not None


def _check_driver(cupy: Any) -> None:
    driver = cupy.cuda.runtime.driverGetVersion()
    compiler, _ = nvrtc_version()
    if driver // 1000 < compiler:
        raise CudaBackendError(
            f"the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10} and CuPy "
            f"compiles for CUDA {compiler}: update the driver, or "
            'pip uninstall cupy-cuda13x and pip install "lrnnx-core[cuda12]"'
        )


def nvrtc_version() -> tuple[int, int]:
    """Return the version of the run-time compiler that CuPy uses.

    Raises:
        CudaBackendError: it cannot be loaded.
    """
    try:
        return importlib.import_module("cupy.cuda").nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        major = (torch.version.cuda or "13").split(".")[0]
        raise CudaBackendError(
            f"CuPy finds no NVRTC, CUDA's run-time compiler ({_first_line(error)}): "
            f'pip install "cupy-cuda{major}x[ctk]"'
        ) from error


class _explained:
    """Turn what CuPy raises into an error that names the cure."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise CudaBackendError(_cache_message(error)) from error
        compiler = importlib.import_module("cupy.cuda.compiler")
        if isinstance(error, compiler.CompileException):
            raise CudaBackendError(
                f"NVRTC refused a kernel of lrnnx-core; please report this. {error}"
            ) from error
        if isinstance(error, self._cupy.cuda.driver.CUDADriverError):
            raise CudaBackendError(
                f"the NVIDIA driver refused a compiled kernel ({_first_line(error)}); it supports "
                f"CUDA {self._cupy.cuda.runtime.driverGetVersion() // 1000}, NVRTC is "
                f"{'.'.join(map(str, nvrtc_version()))}: update the driver"
            ) from error
        if isinstance(error, ImportError | RuntimeError):
            nvrtc_version()  # the usual cause, explained there
            raise CudaBackendError(f"CuPy cannot load a kernel: {_first_line(error)}") from error


def _cache_message(error: OSError) -> str:
    folder = os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")
    return (
        f"CuPy cannot use its cache of compiled kernels in {folder} ({error}): set CUPY_CACHE_DIR "
        "to a writable folder"
    )


def _first_line(error: BaseException | None) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Limits(NamedTuple):
    """What a kernel's shape depends on.

    Attributes:
        multiprocessors: their number.
        shared: bytes of shared memory of a multiprocessor.
        shared_per_block: how much of it one block may have.
    """

    multiprocessors: int
    shared: int
    shared_per_block: int


@functools.cache
def limits(device: int) -> Limits:
    """Return those of a CUDA device."""
    p = torch.cuda.get_device_properties(device)
    return Limits(
        p.multi_processor_count,
        p.shared_memory_per_multiprocessor,
        p.shared_memory_per_block_optin,
    )


def merge_batch(
    batch: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[int, list[tuple[int, int]]] | None:
    """Merge batch dimensions to two, (outer, inner), for kernels that know no more.

    Args:
        batch: the dimensions.
        strides: of every tensor, over these dimensions.

    Returns:
        The inner size, and (outer, inner) strides of every tensor; None where that takes a copy.
    """
    if not batch:
        return 1, [(0, 0)] * len(strides)
    if len(batch) == 1:
        return batch[0], [(0, s[0]) for s in strides]
    sizes: list[int] = []
    kept: list[list[int]] = []  # strides of every tensor, for each size
    for dim, size in enumerate(batch):
        here = [s[dim] for s in strides]
        if size == 1:
            continue
        if sizes and all(k == size * s for k, s in zip(kept[-1], here, strict=True)):
            sizes[-1] *= size
            kept[-1] = here
        else:
            sizes.append(size)
            kept.append(here)
    if len(sizes) > 2:
        return None
    while len(sizes) < 2:
        sizes.insert(0, 1)
        kept.insert(0, [0] * len(strides))
    return sizes[1], [(o, i) for o, i in zip(*kept, strict=True)]


KERNELS: dict[str, Callable[[Limits], list[Kernel]]] = {}
"""Operator -> every kernel it may launch on a device, for `warm_up` and the compile check."""


def listed(device: int) -> list[Kernel]:
    """Return the kernels of every operator for a device, each one once."""
    return list(dict.fromkeys(k for kernels in KERNELS.values() for k in kernels(limits(device))))


def warm_up(device: int) -> int:
    """Compile every kernel for a device ahead of its first use; return how many there are.

    As many at a time as there are processors, sixteen at most.

    Raises:
        CudaBackendError: CuPy is missing, or a kernel cannot be compiled.
    """
    found = listed(device)
    _compiler()  # what is wrong with the installation is said once, before there are threads
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_COMPILERS)) as pool:
        for _ in pool.map(lambda kernel: kernel.compile(device), found):
            pass  # the first error ends it; what has not begun is cancelled
    return len(found)
