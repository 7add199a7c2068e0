# SPDX-License-Identifier: MIT
"""What ``mode="auto"`` chooses: convolution or scan, and how a long convolution is cut.

The numbers come from ``python -m benchmarks.modes``; docs/convolution.md has its tables.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import cpu
from lrnnx_core.models._common import check_sizes
from lrnnx_core.sequences import Layout
from lrnnx_core.types import Mode

CPU_WORK = 512
"""Samples times stored states of a channel from which plain PyTorch convolves; never with one."""
CPU_STATES = 256
"""Stored states of a channel up to which the compiled CPU backend scans, whatever the length."""
CUDA_KERNELS = importlib.util.find_spec("cupy") is not None
"""Whether a GPU has the library's kernels; a constant, so that torch.compile can read it."""
CUDA_FUSED = 256
"""Stored states of a channel up to which a GPU scans, whatever the length, where it has kernels."""
CUDA_STATES = 2**27
"""States of all rows, samples and channels from which a GPU without kernels convolves."""
CHUNK = {"cpu": 4096, "cuda": 2**16}
"""Samples a chunk of a convolution that is cut without being asked to, by the kind of device."""


def chooses_by_length() -> bool:
    """Return whether ``auto`` may look at the length.

    While torch.export traces it scans: what is exported holds for every length.
    """
    return not torch.compiler.is_exporting()


def prefers_convolution(connectivity: str, u: Tensor, states: int) -> bool:
    """Return whether ``auto`` convolves where nothing varies in time.

    Args:
        connectivity: ``siso`` or ``mimo``, of the registry.
        u: the input (..., L, H).
        states: stored states, of a channel (siso) or of the layer (mimo).
    """
    if connectivity == "mimo" or not chooses_by_length():
        return False
    if u.device.type == "cuda":
        if states <= CUDA_FUSED and CUDA_KERNELS:
            return False
        return u.numel() * states > CUDA_STATES
    length = u.shape[-2]
    if states <= CPU_STATES and cpu.in_force():
        return False
    return states > 1 and length > 16 and length * states >= CPU_WORK


def chunk_length(where: str, chunk_size: int | None, u: Tensor) -> int:
    """Return how many samples of u (..., L, H) a convolution takes at once; L for all of them.

    Raises:
        ValueError: a chunk_size < 1.
    """
    length = u.shape[-2]
    if chunk_size is None:
        # while torch.compile traces, a loop over chunks would compile the length in
        chunk = CHUNK.get(u.device.type, CHUNK["cuda"])
        return chunk if not torch.compiler.is_compiling() and length >= 2 * chunk else length
    check_sizes(where, chunk_size=chunk_size)
    return min(chunk_size, length)


def resolve_mode(
    where: str,
    mode: Mode,
    *,
    steady: bool,
    prefers: bool,
    kernel: Tensor | None,
    **given: int | None,
) -> Mode:
    """Return the mode that is run.

    Args:
        where: the caller, for messages.
        mode: what was asked for; ``auto`` convolves where that can be and is asked for or better.
        steady: whether nothing varies in time.
        prefers: whether a convolution is the quicker one then.
        kernel: a precomputed one asks for the convolution.
        **given: options of a convolution; each one that is not None asks for it as well.

    Raises:
        ValueError: an option of a convolution where the call scans.
    """
    if mode == "auto":
        asked = kernel is not None or (steady and any(v is not None for v in given.values()))
        mode = "conv" if asked or (steady and prefers) else "scan"
    for name, value in given.items():
        if value is not None and mode != "conv":
            raise ValueError(
                f"{where}: {name} = {value} is for a convolution, and this call scans; use "
                "mode='conv' without integration_timesteps, mask and reset, or leave it out"
            )
    return mode


def check_planned(where: str, max_bytes: int | None, kernel: Tensor | None) -> None:
    """Raise unless a cap on the memory of a contraction is one, and there is a contraction."""
    if max_bytes is None:
        return
    check_sizes(where, max_bytes=max_bytes)
    if kernel is not None:
        raise ValueError(f"{where}: give kernel or max_bytes, not both")


def in_chunks(
    run: Callable[[Tensor, Any, Layout], tuple[Tensor, Tensor]],
    x: Tensor,
    state: Tensor | None,
    layout: Layout,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Run over x (..., L, H) in chunks of ``size`` samples, the state carried from one to the next.

    Args:
        run: ``(x, state, layout) -> (y, state)`` of a part of the sequence.
        x: the input.
        state: before the first sample.
        layout: nothing in it but ``lengths``.
        size: samples a chunk.
    """
    length = x.shape[-2]

    def part(start: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        piece, here = x.narrow(-2, start, min(size, length - start)), layout
        if layout.lengths is not None:
            within = (layout.lengths - start).clamp(0, piece.shape[-2])
            here = layout._replace(lengths=within)
        return run(piece, state, here)

    y, last = part(0, state)
    if size >= length:
        return y, last
    outputs = [y]
    for start in range(size, length, size):
        y, last = part(start, last)
        outputs.append(y)
    return torch.cat(outputs, dim=-2), last
