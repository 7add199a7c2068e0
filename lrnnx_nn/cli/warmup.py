# SPDX-License-Identifier: MIT
"""``lrnnx warmup``: compile kernels before they are needed, into the cache on disk."""

from __future__ import annotations

import argparse
import time


def run(arguments: argparse.Namespace) -> int:
    """Compile every kernel for the device.

    Raises:
        ValueError: no CUDA device of that name, CuPy is missing, or a kernel cannot be compiled.
    """
    import torch

    from lrnnx_core.backends import cuda

    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        raise ValueError(
            f"warmup: no device {arguments.device!r}, expected cuda or cuda:N"
        ) from None
    if device.type != "cuda":
        raise ValueError(f"warmup: device {arguments.device!r}, expected cuda or cuda:N")
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
