# SPDX-License-Identifier: MIT
# pyright: basic
"""Cauchy sums on CUDA: launches of cuda/cauchy.cu. The contract is that of `blocked_sums`."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lrnnx_core.backends import blocked_sums, cuda, library

DTYPES = (torch.float32, torch.float64)
LAYOUTS = {"forward": "6P6qd", "backward": "7P8qd", "sums": "9P5q"}
ENTRIES = {"forward": "cauchy", "backward": "cauchy_backward", "sums": "cauchy_sums"}
THREADS = {"forward": 128, "backward": 256, "sums": 128}
EACH = {"forward": {1: 4, 2: 2, 4: 2}, "backward": {1: 2, 2: 2, 4: 2}}
"""Frequencies, or states, of a thread, by the rows that it sums."""
TILE = 1024  # frequencies of a block of the backward


@functools.cache
def kernel(step: str, dtype: torch.dtype, rows: int) -> cuda.Kernel:
    """Return a kernel.

    Args:
        step: "forward", "backward" or "sums" (of the backward's tiles).
        dtype: of all tensors.
        rows: that are summed together.
    """
    definitions: dict[str, object] = {
        "DTYPE": cuda.NAMES[dtype],
        "ROWS": rows,
        "THREADS": THREADS[step],
        step.upper(): 1,
    }
    if step in EACH:
        definitions["EACH"] = EACH[step][rows]
    if step == "backward":
        definitions["TILE"] = TILE
    return cuda.Kernel("cauchy.cu", ENTRIES[step], definitions, LAYOUTS[step])


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels that the library's models launch."""
    problems = [(torch.float32, 4), (torch.float32, 1), (torch.float64, 4)]
    return [kernel(step, *problem) for problem in problems for step in ENTRIES]


def together(rows: int) -> int:
    """Return how many rows are summed together, one reciprocal for all of them."""
    return min(4, 1 << max(rows - 1, 0).bit_length())


def lanes(states: int) -> int:
    """Return the threads that the states of a block of the backward lie on."""
    return min(cuda.WARP, 1 << max(-(-states // 2) - 1, 0).bit_length())


def cauchy(
    alpha: Tensor, beta: Tensor, square: Tensor, rho: Tensor, a: Tensor, length: int
) -> Tensor:
    """Leaf: (*batch, R, H, length // 2 + 1, 2), as `blocked_sums.cauchy`."""
    tensors = (alpha, beta, square, rho, a)
    if not cuda.ready():
        return blocked_sums.cauchy(*tensors, length)
    device = _check("cauchy", *tensors)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return cauchy(*tensors, length)
    count, N = length // 2 + 1, alpha.shape[-1]
    out = torch.empty((*alpha.shape[:-1], count, 2), dtype=alpha.dtype, device=alpha.device)
    if not out.numel() or not N:
        return out.zero_()
    P, R, H = blocked_sums.merged(alpha.shape[:-1], square, rho, a.unsqueeze(-1))
    first = blocked_sums.first_nodes(square, P, H)
    alpha, beta = alpha.contiguous(), beta.contiguous()
    square, rho, a = (t[first].contiguous() for t in (square, rho, a))
    rows = together(R)
    groups, tiles = -(-R // rows), -(-count // (THREADS["forward"] * EACH["forward"][rows]))
    kernel("forward", alpha.dtype, rows).launch(
        device, P * H * groups * tiles, THREADS["forward"], 0,
        *(t.data_ptr() for t in (alpha, beta, square, rho, a, out)),
        R, H, N, length, groups, tiles, 0.5 / length,
    )  # fmt: skip
    return out


def cauchy_backward(
    grad: Tensor,
    alpha: Tensor,
    beta: Tensor,
    square: Tensor,
    rho: Tensor,
    a: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Leaf: the gradients of all five tensors, as `blocked_sums.cauchy_backward`."""
    tensors = (grad, alpha, beta, square, rho, a)
    if not cuda.ready():
        return blocked_sums.cauchy_backward(*tensors, length)
    device = _check("cauchy_backward", *tensors)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return cauchy_backward(*tensors, length)
    R, H, N = alpha.shape[-3:]
    da, db, ds, dr, dx = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors[1:])
    if not alpha.numel():
        return da.zero_(), db.zero_(), ds.zero_(), dr.zero_(), dx.zero_()
    tensors = tuple(t.contiguous() for t in tensors)
    P, rows = math.prod(alpha.shape[:-3]), together(R)
    groups, tiles, wide = -(-R // rows), -(-(length // 2 + 1) // TILE), lanes(N)
    chunks = -(-N // (wide * EACH["backward"][rows]))
    fields = (P * H, groups, tiles, 2 * rows + 3, N)
    partial = torch.empty(fields, dtype=alpha.dtype, device=alpha.device)
    kernel("backward", alpha.dtype, rows).launch(
        device, P * H * groups * tiles * chunks, THREADS["backward"], 0,
        *(t.data_ptr() for t in tensors), partial.data_ptr(),
        R, H, N, length, groups, tiles, chunks, wide, 0.5 / length,
    )  # fmt: skip
    _, _, beta, _, rho, a = tensors
    kernel("sums", alpha.dtype, rows).launch(
        device, P * H, THREADS["sums"], 0,
        *(t.data_ptr() for t in (partial, beta, rho, a, da, db, ds, dr, dx)),
        R, H, N, groups, tiles,
    )  # fmt: skip
    return da, db, ds, dr, dx


def _check(operator: str, x: Tensor, *others: Tensor) -> int:
    device = x.get_device()
    if x.dtype not in DTYPES:
        raise ValueError(f"{operator}: dtype {x.dtype} on CUDA, expected float32 or float64")
    for other in others:
        if other.get_device() != device:
            raise ValueError(f"{operator}: tensors are on {x.device} and {other.device}")
        if other.dtype != x.dtype:
            raise ValueError(f"{operator}: tensors are {x.dtype} and {other.dtype}")
    return device


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["cauchy"] = kernels
    return (
        library.implement("cauchy", "cuda", cauchy),
        library.implement("cauchy_backward", "cuda", cauchy_backward),
    )
