# SPDX-License-Identifier: MIT
"""``lrnnx warmup``: compile kernels before they are needed, into the cache on disk."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from lrnnx_nn.optional import pip_line

if TYPE_CHECKING:
    import torch


def run(arguments: argparse.Namespace) -> int:
    """Compile every kernel for the device.

    Raises:
        ValueError: no device of that name, numba or CuPy is missing, or a kernel cannot be
            compiled.
    """
    import torch

    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        raise ValueError(
            f"warmup: no device {arguments.device!r}, expected cuda, cuda:N or cpu"
        ) from None
    if device.type == "cpu":
        return _cpu()
    if device.type == "cuda":
        return _cuda(device)
    raise ValueError(f"warmup: device {arguments.device!r}, expected cuda, cuda:N or cpu")


def _cpu() -> int:
    from lrnnx_core.backends import cpu

    if not cpu.installed():
        raise ValueError(f"warmup: numba is missing; {pip_line('cpu')}")
    print(f"operators of {len(cpu.modules())} modules; compiling kernels that are not kept yet")
    start = time.perf_counter()
    try:
        count = cpu.warm()
    except ImportError as error:
        raise ValueError(f"warmup: {error}") from error
    seconds = time.perf_counter() - start
    from lrnnx_core.backends.cpu import compiling

    folder = compiling.cache_folder()
    kept = "not kept: no folder can be written" if folder is None else f"kept in {folder}"
    print(f"{count} kernels ready in {seconds:.1f} s, {compiling.compiled()} of them new; {kept}")
    return 0


def _cuda(device: torch.device) -> int:
    import torch

    from lrnnx_core.backends import cuda

    if not torch.cuda.is_available():
        raise ValueError("warmup: torch sees no CUDA device; `lrnnx doctor` says why")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"warmup: {device}, there are {torch.cuda.device_count()} CUDA devices")
    name = torch.cuda.get_device_name(index)
    print(f"{len(cuda.listed(index))} kernels for {name}; compiling those that are not kept yet")
    start = time.perf_counter()
    try:
        count = cuda.warm_up(index)
    except cuda.CudaBackendError as error:
        raise ValueError(f"warmup: {error}") from error
    seconds = time.perf_counter() - start
    print(f"{count} kernels ready in {seconds:.1f} s")
    return 0
